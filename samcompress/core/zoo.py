"""Published models: what is known of them, and how an official file becomes one of our models.

A published model is a base, a chain of ordinary techniques, and weights poured in under our names;
so it is saved, loaded and changed like any other. Entries register themselves on import.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from ._draws import drawn
from ._infer import NEEDED, STATISTICS, fill, some, statistics
from ._official import Figure, File
from ._sam2 import Sam2Config
from ._weights import TensorDict
from .build import SamConfig
from .errors import (
    CheckpointError,
    ConfigError,
    MissingDependencyError,
    UnknownTransformError,
    closest,
)
from .history import Base, History, describe, remember

if TYPE_CHECKING:
    from .transform import Transform

__all__ = [
    "SAM",
    "Figure",
    "File",
    "Nearest",
    "Published",
    "assemble",
    "find",
    "nearest",
    "published",
    "recognise",
    "register",
]

SAM = "segment_anything"
_known: dict[str, Published] = {}


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Published:
    """A published model.

    Attributes:
        name: what `sc.load` calls it; small letters, digits, dots and underscores.
        title: what its authors call it.
        base: what the steps start from; None for a model that `make` makes.
        steps: makes the techniques that change the base into it. Called when the model is built, so
            that optional packages are not needed to list it.
        make: for models that are no SAM, instead of `base` and `steps`: the module filled from an
            official state dict, or with random weights from None.
        files: its official files; the tensors of several are taken together.
        also: names of further official files of the same weights.
        signature: names and shapes of a few tensors that tell its files from those of others, as
            they are in the file, wrappers and common prefixes off. A model that has all of
            another's tensors and more lists the other's signature too.
        convert: official names to ours; it also drops what official files carry for nothing, and
            leaves names that it does not know as they are.
        parameters: of the whole model.
        macs: of the image encoder at `input_size`, in 1e9.
        input_size: side of the square that it takes, in pixels.
        licence: of the weights.
        paper: e.g. ``"arXiv 2306.14289"``.
        upstream: the authors' repository.
        figures: published numbers.
        note: what a user must know.
    """

    name: str
    title: str
    base: SamConfig | Sam2Config | None = None
    steps: Callable[[], tuple[Transform, ...]] = tuple
    make: Callable[[TensorDict | None], nn.Module] | None = None
    files: tuple[File, ...]
    also: tuple[str, ...] = ()
    signature: Mapping[str, tuple[int, ...]]
    convert: Callable[[TensorDict], TensorDict] = dict
    parameters: int
    macs: float
    input_size: int
    licence: str
    paper: str
    upstream: str
    figures: tuple[Figure, ...] = ()
    note: str = ""

    def build(self, *, seed: int = 0) -> Any:
        """The model with random weights.

        Args:
            seed: of the weights; the global random state is left as it was.

        Raises:
            MissingDependencyError: if a step needs a package that is not installed.
        """
        if self.make is not None:
            with drawn(torch.device("cpu"), seed, self.name):
                return self.make(None)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            sam = self._base().build()
        sam = self._changed(sam, self._base(), seed)
        describe(sam, source="random")
        return sam

    def empty(self, base: SamConfig | Sam2Config | None = None) -> Any:
        """The model with weights of no meaning, to be loaded."""
        if self.make is not None:
            return self.build()
        base = base or self._base()
        return self._changed(base.build(empty=True), base, 0)

    @property
    def plain(self) -> bool:
        """Whether it is a SAM as segment_anything makes it, whose sizes its tensors show."""
        return isinstance(self.base, SamConfig) and not self.steps()

    def offers(self, name: str | None) -> bool:
        """Whether one of its official files has this name."""
        return name in self.also or name in {file.name for file in self.files}

    def fits(self, state: TensorDict) -> bool:
        """Whether the tensors of its signature are all there, with their shapes."""
        return all(
            name in state and tuple(state[name].shape) == tuple(shape)
            for name, shape in self.signature.items()
        )

    def __repr__(self) -> str:
        from .models import card

        return card(self)

    def _repr_html_(self) -> str:
        from .models import html_card

        return html_card(self)

    def _base(self) -> SamConfig | Sam2Config:
        assert self.base is not None, "a published model has a base or a make"
        return self.base

    def _changed(self, sam: Any, base: SamConfig | Sam2Config, seed: int) -> Any:
        from .pipeline import Pipeline

        remember(sam, History(Base(base)))
        steps = [_seeded(step, seed) for step in self.steps()]
        return Pipeline(steps)(sam, consume=True, progress=False) if steps else sam


def register(published: Published) -> Published:
    """Make a published model known.

    Raises:
        ConfigError: if its name is not plain, taken, or it has no way to be made.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9_.]*", published.name):
        raise ConfigError(
            "this cannot be the name of a published model.",
            got=published.name,
            expected="small letters, digits, dots and underscores",
        )
    if published.name in _known:
        raise ConfigError(
            f"the published model {published.name} is registered twice.",
            expected="another name",
        )
    if (published.base is None) == (published.make is None):
        raise ConfigError(
            f"the published model {published.name} cannot be made.",
            expected="either base and steps, or make",
        )
    _known[published.name] = published
    return published


def published() -> dict[str, Published]:
    """All published models by name, in the order they were registered."""
    return dict(_known)


def find(name: str) -> Published:
    """The published model of this name.

    Raises:
        UnknownTransformError: if there is none; suggests the nearest ones.
    """
    if name not in _known:
        raise UnknownTransformError(
            f"there is no published model {name!r}.",
            got=name,
            expected="a name from sc.list_models()",
            fix=closest(name, _known),
        )
    return _known[name]


def recognise(state: TensorDict, file_name: str = "") -> Published | None:
    """The published model whose file this is.

    Args:
        state: tensors by official names; only names and shapes are read.
        file_name: tells models with the same tensors apart; without it, the first registered.
    """
    fits = [entry for entry in _known.values() if entry.fits(state)]
    exact = [
        entry
        for entry in fits
        if not any(entry.signature.items() < other.signature.items() for other in fits)
    ]
    named = [e for e in exact if len(e.files) == 1 and e.files[0].name == file_name]
    return next(iter(named or exact), None)


def assemble(
    entry: Published, state: TensorDict, where: str = "state dict", *, source: str | None = None
) -> Any:
    """Build a published model and fill it, strictly.

    Args:
        entry: which model.
        state: tensors by official names; copied, and converted to float32.
        where: what to call the place of the weights in an error.
        source: what to note as their source; the licence is noted too if that is an official name.

    Returns:
        A `Sam` with the model's steps as its lineage, or whatever `make` makes.

    Raises:
        CheckpointError: naming the tensors that are missing, unknown or of another shape.
        MissingDependencyError: if the model needs a package that is not installed.
    """
    named = _converted(entry, state, where)
    official = source == entry.name or entry.offers(source)
    if entry.make is not None:
        try:
            made = entry.make(named)
        except CheckpointError as err:
            err.where = where
            raise
        describe(made, source=source or where, licence=entry.licence if official else None)
        return made
    base = dataclasses.replace(entry._base(), **statistics(named))
    sam = entry.empty(base)
    origin = {id(tensor): name for name, tensor in state.items()}
    fill(
        sam,
        {name: tensor for name, tensor in named.items() if name not in STATISTICS},
        where=where,
        expected=f"the tensors of {entry.title} ({entry.name})",
        said={name: origin.get(id(tensor), name) for name, tensor in named.items()},
    )
    describe(sam, source=source or where, licence=entry.licence if official else None)
    return sam


class Nearest(NamedTuple):
    """The known format that is most like a state dict.

    Attributes:
        entry: a published model, or ``"segment_anything"``.
        missing: tensors of the format that are absent, by our names.
        unknown: tensors that the format does not have, by the names they have in the file.
        wrong: tensors of another shape, in the same way.
    """

    entry: Published | str
    missing: list[str]
    unknown: list[str]
    wrong: list[str]

    @property
    def name(self) -> str:
        """What to call the format."""
        entry = self.entry
        return entry if isinstance(entry, str) else f"{entry.title} ({entry.name})"

    @property
    def differences(self) -> str:
        """The keys in which it differs."""
        kinds = {"missing": self.missing, "unknown": self.unknown, "of another shape": self.wrong}
        return "; ".join(f"{kind} {some(names)}" for kind, names in kinds.items() if names)


def nearest(state: TensorDict) -> Nearest | None:
    """The known format most like this, None where nothing is alike.

    Up to three models are built to compare names, which takes seconds.
    """
    likeness = {name: _likeness(e, state) for name, e in _known.items() if not e.plain}
    ranked = sorted((n for n, like in likeness.items() if like), key=lambda n: -likeness[n])
    found = [_compared(_known[name], state) for name in ranked[:3]]
    if any(name in state for name in NEEDED if name.startswith("image_encoder.")):
        found.append(_compared_with_sam(state))
    return min(found, key=lambda near: sum(map(len, near[1:])), default=None)


def _likeness(entry: Published, state: TensorDict) -> float:
    names = [name for name in entry.signature if name in state]
    shapes = [name for name in names if tuple(state[name].shape) == tuple(entry.signature[name])]
    return (len(names) + len(shapes)) / max(len(entry.signature), 1)


def _compared(entry: Published, state: TensorDict) -> Nearest:
    try:
        wanted = entry.empty().state_dict()
    except (MissingDependencyError, CheckpointError):
        # What cannot be built is compared by its signature alone.
        meant = {n: torch.empty(shape, device="meta") for n, shape in entry.signature.items()}
        return _differing(entry, meant, {n: t for n, t in state.items() if n in meant}, state)
    try:
        named = _converted(entry, state, "state dict")
    except CheckpointError:
        named = state
    return _differing(entry, wanted, named, state)


def _compared_with_sam(state: TensorDict) -> Nearest:
    blocks = {m[1] for name in state if (m := re.match(r"image_encoder\.blocks\.(\d+)\.", name))}
    with torch.device("meta"):
        sam = SamConfig(depth=len(blocks) or 12, global_attn_indexes=()).build()
    near = _differing(SAM, sam.state_dict(), state, state)
    # Sizes of a plain SAM are read off its tensors: any will do.
    return near._replace(wrong=[])


def _differing(
    entry: Published | str, wanted: TensorDict, named: TensorDict, state: TensorDict
) -> Nearest:
    origin = {id(tensor): name for name, tensor in state.items()}
    named = {name: tensor for name, tensor in named.items() if name not in STATISTICS}
    return Nearest(
        entry,
        [name for name in wanted if name not in named],
        [origin.get(id(tensor), name) for name, tensor in named.items() if name not in wanted],
        [
            origin.get(id(tensor), name)
            for name, tensor in named.items()
            if name in wanted and tensor.shape != wanted[name].shape
        ],
    )


def _converted(entry: Published, state: TensorDict, where: str) -> TensorDict:
    try:
        return dict(entry.convert(dict(state)))
    except (KeyError, IndexError, ValueError, RuntimeError) as err:
        raise CheckpointError(
            "the tensors do not fit.",
            where=where,
            got=f"{type(err).__name__}: {err}",
            expected=f"the tensors of {entry.title} ({entry.name})",
        ) from err


def _seeded(step: Transform, seed: int) -> Transform:
    names = {field.name for field in dataclasses.fields(step)}  # type: ignore[arg-type]
    return dataclasses.replace(step, seed=seed) if "seed" in names else step  # type: ignore[type-var]
