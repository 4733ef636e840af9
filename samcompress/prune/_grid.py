"""Maps of tokens in pieces: whole windows, and what is left at the right and below."""

from __future__ import annotations

from torch import Tensor


def bands(length: int, side: int) -> list[tuple[int, int]]:
    """Cut an axis into whole windows and the rest.

    Returns:
        For each of at most two bands, how long it is and how long each of its windows.

    Example:
        >>> bands(64, 14), bands(28, 14), bands(5, 14)
        ([(56, 14), (8, 8)], [(28, 14)], [(5, 5)])
    """
    rest = length % side
    whole = [(length - rest, side)] if length > rest else []
    return whole + ([(rest, rest)] if rest else [])


def tile(x: Tensor, height: int, width: int) -> Tensor:
    """(B, h, w, C) to its (B·count, height, width, C) windows, which must fit."""
    batch, h, w, channels = x.shape
    cut = x.reshape(batch, h // height, height, w // width, width, channels)
    return cut.transpose(2, 3).reshape(-1, height, width, channels)


def untile(windows: Tensor, batch: int, height: int) -> Tensor:
    """(B·count, height', width', C) windows to the (B, height, w, C) that they make up."""
    _, rows, columns, channels = windows.shape
    cut = windows.reshape(batch, height // rows, -1, rows, columns, channels)
    return cut.transpose(2, 3).reshape(batch, height, -1, channels)
