"""A named sequence of samples, which keeps a record of what it had to leave out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, overload

from ..errors import ConfigError, DataError
from ._annotation import reason_of
from ._sample import Held, Id, Packed, Renamed, Sample, sha256

OnError = Literal["skip", "raise"]


@dataclass(frozen=True)
class Skipped:
    """Something left out: which image (or shard), what of it, and why."""

    id: Id
    what: str
    reason: str

    def __str__(self) -> str:
        return f"{self.what} of {self.id}: {self.reason}"


class Skips:
    """Collects what is left out, once each, or raises at the first, as ``on_error`` says."""

    def __init__(self, on_error: OnError, known: Sequence[Skipped] = ()) -> None:
        if on_error not in ("skip", "raise"):
            raise ConfigError(
                "on_error has no such value.", got=repr(on_error), expected="'skip' or 'raise'"
            )
        self.on_error: OnError = on_error
        self._found = dict.fromkeys(known)

    def add(self, key: Id, what: str, reason: str, where: object = None) -> None:
        if self.on_error == "raise":
            raise DataError(
                f"{what} of {key!r} cannot be used.",
                where=where,
                got=reason,
                fix='mend it, or leave it out with on_error="skip"',
            )
        self._found[Skipped(key, what, reason)] = None

    def all(self) -> tuple[Skipped, ...]:
        return tuple(self._found)


class Dataset(Sequence[Sample]):
    """A named sequence of samples, read lazily.

    Indexing gives a ``Sample``, slicing a ``Dataset``. What was found damaged is in ``skipped``:
    at opening everything that annotations and image headers tell, and during ``readable()`` what
    only decoding can tell.

    Args:
        samples: the samples, each with an id of its own.
        name: such as ``"coco@val2017"``; goes into every protocol id.
        licence: of the data, for the record.
        note: what a reader of numbers must know about the masks.
        groups: of categories, by category: LVIS's ``rare``, ``common`` and ``frequent``.
        skips: what opening left out, and what to do about later finds.

    Raises:
        DataError: if there is no sample, or two have the same id.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        name: str,
        *,
        licence: str | None = None,
        note: str | None = None,
        groups: Mapping[int, str] | None = None,
        skips: Skips | None = None,
    ) -> None:
        self._samples = samples
        self.name = name
        self.licence = licence
        self.note = note
        self.groups = dict(groups or {})
        self._skips = skips or Skips("raise")
        if not len(samples):
            raise DataError(
                f"{name} holds no usable image.",
                got="; ".join(map(str, self.skipped[:3])) or "no image at all",
                expected="at least one image with its annotation",
            )
        self._by_id = {sample.id: sample for sample in samples}
        if len(self._by_id) != len(samples):
            raise DataError(
                f"two images of {name} have the same id.",
                got=f"{len(samples)} images, {len(self._by_id)} different ids",
            )

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """Everything left out so far, each named once."""
        return self._skips.all()

    @property
    def on_error(self) -> OnError:
        """Whether damage found later is left out or stops the work."""
        return self._skips.on_error

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over ids and annotations, whatever the order and wherever the files lie."""
        lines = sorted(f"{sample.id}:{sample.digest()}" for sample in self)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def readable(self) -> Iterator[Sample]:
        """Every sample that can be decoded, each read once and held while it is worked on.

        A sample whose picture cannot be decoded is left out whole; an instance whose mask cannot
        be decoded, is of another size or empty is left out alone. All go into ``skipped``.

        Yields:
            Samples in memory: ``image``, ``instances`` and masks cost no further reading.

        Raises:
            DataError: at the first such find, if the data set was opened with
                ``on_error="raise"``.
        """
        for sample in self:
            held = self.hold(sample)
            if held is not None:
                yield held

    def hold(self, sample: Sample) -> Sample | None:
        """One sample in memory, without what cannot be decoded; see `readable`.

        Returns:
            None if its picture cannot be decoded.

        Raises:
            DataError: at such a find, if the data set was opened with ``on_error="raise"``.
        """
        try:
            image, found = sample.image, sample.instances
        except DataError as err:
            self._skips.add(sample.id, "image", reason_of(err), err.where)
            return None
        kept = []
        for instance in found:
            reason = None
            try:
                mask = instance.mask
            except DataError as err:
                reason = reason_of(err)
            else:
                if mask.shape != sample.size:
                    reason = f"mask is {mask.shape}, image {sample.size}"
                elif not mask.any():
                    reason = "mask is empty"
            if reason:
                self._skips.add(sample.id, f"annotation {instance.id}", reason, sample.name)
            else:
                kept.append(replace(instance, source=Packed.of(mask)))
        return Held(
            sample.id,
            sample.name,
            image,
            tuple(kept),
            negative=sample.negative,
            not_exhaustive=sample.not_exhaustive,
        )

    def subset(
        self, n: int | None = None, *, ids: Sequence[Id] | None = None, seed: int | None = None
    ) -> Dataset:
        """Some of the samples, in the order of this data set.

        Args:
            n: how many; the first n, or with ``seed`` a draw.
            ids: exactly these.
            seed: draw by a hash of seed and id, so that the draw does not depend on the order and
                a larger n contains a smaller one.

        Raises:
            DataError: if an id is not there or n is not in 1..len.
        """
        samples: list[Sample] = list(self)
        if ids is not None:
            unknown = [key for key in ids if key not in self._by_id]
            if unknown:
                raise DataError(
                    f"{self.name} has no such image id.", got=unknown[:5], where="subset(ids=)"
                )
            wanted = set(ids)
            samples = [sample for sample in samples if sample.id in wanted]
        if n is not None:
            if not 1 <= n <= len(samples):
                raise DataError(
                    f"cannot take {n} images of {self.name}.",
                    where="subset(n=)",
                    got=n,
                    expected=f"1 <= n <= {len(samples)}",
                )
            if seed is not None:
                rank = sorted(samples, key=lambda s: sha256(repr((seed, s.id)).encode()))[:n]
                chosen = {sample.id for sample in rank}
                samples = [sample for sample in samples if sample.id in chosen]
            samples = samples[:n]
        return self._with(samples)

    def _with(self, samples: Sequence[Sample]) -> Dataset:
        skips = Skips(self._skips.on_error, self.skipped)
        return Dataset(
            samples,
            self.name,
            licence=self.licence,
            note=self.note,
            groups=self.groups,
            skips=skips,
        )

    def __len__(self) -> int:
        return len(self._samples)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Dataset: ...
    def __getitem__(self, index: int | slice) -> Sample | Dataset:
        if isinstance(index, slice):
            return self._with(self._samples[index])
        return self._samples[index]

    def __repr__(self) -> str:
        left_out = f", {len(self.skipped)} skipped" if self.skipped else ""
        return f"<Dataset {self.name} {len(self)} images{left_out}>"


def as_dataset(data: object) -> Dataset:
    """A data set from a ``Dataset`` (returned as it is) or a sequence of ``Sample``.

    Raises:
        DataError: for anything else, and for an empty sequence.

    Example:
        >>> from samcompress.core import data
        >>> as_dataset([data.shapes(4)[0], data.shapes(4)[2]])
        <Dataset custom 2 images>
    """
    if isinstance(data, Dataset):
        return data
    if isinstance(data, Sequence) and all(isinstance(item, Sample) for item in data):
        return Dataset(list(data), "custom")
    raise DataError(
        "these are no data.",
        got=type(data).__name__,
        expected="a Dataset or a sequence of Sample",
        fix="samcompress.data.open(PATH), or samcompress.data.shapes(32)",
    )


def join(*datasets: Dataset, name: str | None = None) -> Dataset:
    """Several data sets as one, in turn; an image's id is ``"NAME:ID"``.

    Args:
        datasets: at least one; their names must differ.
        name: of the whole; by default the names joined by ``+``.

    Raises:
        DataError: if two have the same name, or there is none.

    Example:
        >>> from samcompress.core import data
        >>> join(data.shapes(4), data.shapes(2, seed=1))
        <Dataset shapes@0-128x128+shapes@1-128x128 6 images>
    """
    samples = [Renamed(sample, f"{d.name}:{sample.id}") for d in datasets for sample in d]
    on_error: OnError = "raise" if any(d.on_error == "raise" for d in datasets) else "skip"
    skips = Skips(on_error, [skipped for d in datasets for skipped in d.skipped])
    return Dataset(samples, name or "+".join(d.name for d in datasets), skips=skips)
