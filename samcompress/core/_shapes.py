"""Shape checks at public doors; the letters are those of every docstring (B P N M C S H W h w)."""

from __future__ import annotations

import torch

from .errors import ShapeError


def expect(x: torch.Tensor, shape: str, *, name: str = "tensor", **sizes: int) -> dict[str, int]:
    """Check a tensor against a shape such as ``"B 3 S S"``.

    Args:
        x: the tensor.
        shape: one word a dimension: a number, or a letter; equal letters must be equal sizes.
        name: what to call the tensor in the error.
        sizes: letters whose size is fixed beforehand.

    Returns:
        The size of each letter.

    Raises:
        ShapeError: if the number of dimensions or a size differs.

    Example:
        >>> expect(torch.zeros(2, 3, 8, 8), "B 3 S S", S=8)
        {'S': 8, 'B': 2}
    """
    words = shape.split()
    found = dict(sizes)
    ok = x.ndim == len(words)
    for word, size in zip(words, x.shape, strict=False):
        wanted = int(word) if word.isdigit() else found.setdefault(word, size)
        ok = ok and wanted == size
    if not ok:
        fixed = f" with {', '.join(f'{k}={v}' for k, v in sizes.items())}" if sizes else ""
        raise ShapeError(
            f"{name} has the wrong shape.", got=tuple(x.shape), expected=f"({shape}){fixed}"
        )
    return found
