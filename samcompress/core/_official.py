"""What is known of a published model besides its tensors: numbers, and files."""

from __future__ import annotations

from dataclasses import dataclass

from ._weights import TensorDict


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A published number.

    Attributes:
        metric: what was measured, e.g. ``"mIoU, box"``.
        value: shares in [0, 1], otherwise with the unit in `metric`.
        setting: data, prompts and device, e.g. ``"COCO val2017, boxes of the annotations"``.
        source: where it stands, e.g. ``"arXiv 2306.14289, table 5"``.
    """

    metric: str
    value: float
    setting: str
    source: str


@dataclass(frozen=True, kw_only=True)
class File:
    """An official file.

    Attributes:
        name: its name, also in the cache folder.
        url: where it is downloaded, None where only a person can, by way of `page`. The ``.zip`` of
            a file that is called otherwise is unpacked.
        page: web page that offers it.
        size: bytes of what is downloaded, None where unknown.
        md5: of what is downloaded, in hex; the beginning is enough.
        sha256: the same.
        hub: Hugging Face Hub id; the file is then fetched from there.
        folder: below the cache, for a file that has the name of another one.
        prefix: put before names that lack it, e.g. ``"image_encoder."`` for an encoder alone.
        only: beginnings of the names that are taken where a model has several files; all if empty.
    """

    name: str
    url: str | None = None
    page: str = ""
    size: int | None = None
    md5: str | None = None
    sha256: str | None = None
    hub: str | None = None
    folder: str = ""
    prefix: str = ""
    only: tuple[str, ...] = ()

    def taken(self, state: TensorDict) -> TensorDict:
        """What the model takes of the file's tensors, by the names it takes them under."""
        whole = {n if n.startswith(self.prefix) else self.prefix + n: t for n, t in state.items()}
        return {n: t for n, t in whole.items() if not self.only or n.startswith(self.only)}
