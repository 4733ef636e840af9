"""One door for every kind of SAM: a name, a file, a folder, a Hub id, a transformers model."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from segment_anything.modeling import Sam
from torch import nn

from . import zoo
from ._download import fetch
from ._infer import NEEDED, assemble, config_from_state, some
from ._progress import ProgressLike
from ._require import require
from ._weights import TensorDict, first_line, namings, read_state
from .adapters import from_transformers, kind_of, state_from_transformers
from .build import ARCHITECTURES
from .checkpoint import RECORD, is_ours, load_folder
from .errors import CheckpointError, ConfigError, ModelError, closest
from .history import describe

# Models that ship with the package: the file beside this one, named like the architecture.
SHIPPED = {name: Path(name) / "model.safetensors" for name in ("mini", "tiny")}
# Licences of official weights, by file name or Hub id.
LICENCES = {
    "mini": "research and education only, as BSDS500, on which it was trained",
    "tiny": "Apache-2.0",
    "sam_vit_b_01ec64.pth": "Apache-2.0",
    "sam_vit_l_0b3195.pth": "Apache-2.0",
    "sam_vit_h_4b8939.pth": "Apache-2.0",
    "facebook/sam-vit-base": "Apache-2.0",
    "facebook/sam-vit-large": "Apache-2.0",
    "facebook/sam-vit-huge": "Apache-2.0",
    **{
        f"facebook/sam2.1-hiera-{size}": "Apache-2.0"
        for size in ("tiny", "small", "base-plus", "large")
    },
    "yonigozlan/EdgeTAM-hf": "Apache-2.0",
    "Zigeng/SlimSAM-uniform-50": "Apache-2.0",
    "Zigeng/SlimSAM-uniform-77": "Apache-2.0",
    "nielsr/slimsam-50-uniform": "Apache-2.0",
    "nielsr/slimsam-77-uniform": "Apache-2.0",
}
SUFFIXES = (".pth", ".pt", ".safetensors", ".bin")
# What is fetched from the Hub. Never a pickle.
HUB_FILES = ("*.safetensors", "*.json")


class Layout(NamedTuple):
    """A naming scheme of SAM's tensors.

    Attributes:
        name: whose it is.
        roots: first components of the names; a file with all of them is in this layout.
        convert: the same tensors under segment_anything's names.
    """

    name: str
    roots: frozenset[str]
    convert: Callable[[TensorDict], TensorDict]


LAYOUTS = (
    Layout(
        "segment_anything", frozenset({"image_encoder", "prompt_encoder", "mask_decoder"}), dict
    ),
    Layout(
        "transformers",
        frozenset({"vision_encoder", "prompt_encoder", "mask_decoder"}),
        state_from_transformers,
    ),
)


def load(
    source: str | Path | nn.Module,
    device: str | torch.device = "cpu",
    *,
    model: str | None = None,
    decoder_num_heads: int | None = None,
    progress: ProgressLike = True,
) -> Sam:
    """Load a SAM from wherever it is.

    Files of published models are recognised by their tensors. Sizes of a plain SAM are read off the
    weights, so fine-tuned, narrower and resized SAMs need no further word. A pickle is read for its
    tensors only; code in it is refused, never run.

    Args:
        source: one of

            - ``"mini"`` or ``"tiny"``, the models that ship with the package;
            - the name of a published model, one of `sc.list_models`: its official files are read
              from ``$SAMCOMPRESS_CACHE`` (by default ``~/.cache/samcompress/models``), and
              downloaded to there the first time;
            - a folder written by `sc.save`, or by ``save_pretrained`` of a transformers SamModel,
              or with the official files of a model that has several;
            - an official ``.pth`` or ``.pt`` file of a published model, or any ``.pth``, ``.pt`` or
              ``.safetensors`` file with segment_anything's or transformers' tensor names;
            - a Hugging Face Hub id, e.g. ``"facebook/sam-vit-base"``: downloaded once, then read
              from the local cache, also when offline;
            - a transformers SamModel, Sam2Model or EdgeTamModel.
        device: where to put the model.
        model: for a file or folder of a published model that shares its tensors' names and shapes
            with another, which one it is.
        decoder_num_heads: for a bare file whose decoder has widths of its own: the one size that
            its tensors do not show.
        progress: how a download shows itself: a bar, nothing (False), or events for a callable.

    Returns:
        A segment_anything `Sam` in eval mode; float32, except that a folder of `sc.save` and a
        SamModel keep their dtypes. A published model that is no SAM is a module of its own kind.

    Raises:
        CheckpointError: if nothing is found there, or it is damaged, holds code, or is not a SAM.
        ConfigError: if `model` is given for something else than a file or folder.
        ModelError: if an object is not a SamModel.
        UnknownTransformError: if `model` is not the name of a published model.

    Example:
        >>> import samcompress as sc
        >>> sc.load("tiny").image_encoder.img_size
        128
    """
    if not isinstance(source, (str, Path)):
        _only_for_files(model)
        return _from_object(source).to(device)
    if source in SHIPPED or source in zoo.published():
        _only_for_files(model)
        return _from_name(str(source), progress).to(device)
    path = Path(source).expanduser()
    if path.is_file():
        return _from_file(path, model, decoder_num_heads).to(device)
    if path.is_dir():
        return _from_folder(path, path.name, model).to(device)
    if _is_hub_id(source):
        return _from_folder(_download(str(source)), str(source), model).to(device)
    raise _not_found(str(source), path)


def _from_object(source: object) -> Sam:
    if not isinstance(source, nn.Module) or kind_of(source) is None:
        raise ModelError(
            "this object cannot be loaded.",
            got=f"{type(source).__module__}.{type(source).__qualname__}",
            expected="a name, path or Hub id, or transformers' SamModel, Sam2Model or EdgeTamModel",
            fix="a segment_anything Sam needs no loading: give it to a pipeline as it is",
        )
    sam = from_transformers(source)
    describe(sam, source=f"a transformers {type(source).__name__}")
    return sam


def _from_name(name: str, progress: ProgressLike) -> Any:
    if name in SHIPPED:
        path = Path(__file__).parent / SHIPPED[name]
        sam = assemble(ARCHITECTURES[name], read_state(path), where=str(path))
        describe(sam, source=name, licence=LICENCES[name])
        return sam
    entry = zoo.find(name)
    return _of_files(entry, [fetch(file, progress=progress) for file in entry.files], name)


def _of_files(entry: zoo.Published, paths: list[Path], source: str) -> Any:
    where = ", ".join(map(str, paths))
    states = map(read_state, paths)
    if len(paths) == 1:
        return zoo.assemble(entry, _naming(entry, next(states)), where, source=source)
    taken = (file.taken(state) for file, state in zip(entry.files, states, strict=True))
    whole = {name: tensor for state in taken for name, tensor in state.items()}
    return zoo.assemble(entry, whole, where, source=source)


def _naming(entry: zoo.Published, state: TensorDict) -> TensorDict:
    return next((names for names in namings(state) if entry.fits(names)), state)


def _from_file(path: Path, model: str | None, decoder_num_heads: int | None) -> Any:
    if model is not None:
        return _from_file_of(zoo.find(model), path)
    state = read_state(path)
    for names in namings(state):
        entry = zoo.recognise(names, path.name)
        if entry is not None and not entry.plain:
            return zoo.assemble(entry, names, str(path), source=path.name)
        layout = _layout(names)
        named = layout.convert(names) if layout else {}
        if all(name in named for name in NEEDED):
            config = config_from_state(named, where=str(path), decoder_num_heads=decoder_num_heads)
            sam = assemble(config, named, where=str(path))
            licence = entry.licence if entry and path.name in entry.also else None
            describe(sam, source=path.name, licence=licence or LICENCES.get(path.name))
            return sam
    near = zoo.nearest(state)
    if near is not None and not near.differences and not isinstance(near.entry, str):
        # By our names, as of a state dict that was saved without `sc.save`.
        return zoo.assemble(near.entry, state, str(path), source=path.name)
    raise _unknown(state, path, near)


def _from_file_of(entry: zoo.Published, path: Path) -> Any:
    if len(entry.files) > 1 and path.name in (file.name for file in entry.files):
        return _from_folder(path.parent, path.name, entry.name)
    state = read_state(path)
    names = _naming(entry, state)
    other = zoo.recognise(names, path.name)
    if other is not None and not entry.fits(names):
        differing = [
            name for name, shape in entry.signature.items()
            if name not in names or tuple(names[name].shape) != tuple(shape)
        ]  # fmt: skip
        raise CheckpointError(
            "the file is of another model.",
            where=str(path),
            got=f"the tensors of {other.title} ({other.name}), without {some(differing)}",
            expected=f"the tensors of {entry.title} ({entry.name})",
            fix=f'sc.load("{path}")',
        )
    return zoo.assemble(entry, names, str(path), source=path.name)


def _layout(state: TensorDict) -> Layout | None:
    roots = _roots(state)
    return next((layout for layout in LAYOUTS if layout.roots <= roots), None)


def _roots(state: TensorDict) -> set[str]:
    return {name.split(".")[0] for name in state}


def _unknown(state: TensorDict, path: Path, near: zoo.Nearest | None) -> CheckpointError:
    entry = _part_of(path.name)
    if entry is not None:
        others = ", ".join(file.name for file in entry.files if file.name != path.name)
        return CheckpointError(
            f"this is one of the files of {entry.title}.",
            where=str(path),
            got=f"{len(state)} tensors: {some(list(state))}",
            expected=f"{others} in the same folder",
            fix=f'sc.load("{path.parent}", model="{entry.name}"), or sc.load("{entry.name}")',
        )
    nearest = max(LAYOUTS, key=lambda layout: len(layout.roots & _roots(state)))
    absent = [f"{root}.*" for root in sorted(nearest.roots - _roots(state))]
    if near is None or (absent and near.entry == zoo.SAM):
        return CheckpointError(
            "this is not a SAM.",
            where=str(path),
            got=f"{len(state)} tensors: {', '.join(list(state)[:3])} ...",
            expected=f"tensors {', '.join(absent) or 'of an image encoder'} too, "
            f"as in {nearest.name}'s layout",
            fix="give a whole SAM: image encoder, prompt encoder and mask decoder in one file",
        )
    name = closest(near.unknown[0], near.missing, n=1) if len(near.unknown) in (1, 2) else None
    return CheckpointError(
        "no known format has these tensors.",
        where=str(path),
        got=f"{len(state)} tensors, most like {near.name}; {near.differences}",
        expected="those of segment_anything, transformers, or a model of sc.list_models()",
        fix=f"rename {near.unknown[0]} to {name}" if name else None,
    )


def _part_of(name: str) -> zoo.Published | None:
    """The model of several files that has one of this name, unless it is a whole model too."""
    known = zoo.published().values()
    if any(len(entry.files) == 1 and entry.files[0].name == name for entry in known):
        return None
    return next((e for e in known if name in (file.name for file in e.files)), None)


def _from_folder(folder: Path, source: str, model: str | None = None) -> Any:
    if is_ours(folder):
        _only_for_files(model)
        return load_folder(folder)
    if (folder / "config.json").is_file():
        _only_for_files(model)
        sam = from_transformers(folder)
        describe(sam, source=source, licence=LICENCES.get(source))
        return sam
    entry = _of_folder(folder) if model is None else zoo.find(model)
    inside = sorted(p.name for p in folder.iterdir())
    if entry is not None:
        absent = [file.name for file in entry.files if file.name not in inside]
        if absent:
            raise CheckpointError(
                f"the folder lacks files of {entry.title}.",
                where=str(folder),
                got=_outline(inside),
                expected=f"{some(absent)} too",
                fix=f'sc.load("{entry.name}") gets them',
            )
        return _of_files(entry, [folder / file.name for file in entry.files], entry.name)
    files = [name for name in inside if name.endswith(SUFFIXES)]
    raise CheckpointError(
        "the folder holds no model.",
        where=str(folder),
        got=_outline(inside),
        expected=f"{RECORD} (written by sc.save) or config.json (a transformers SamModel)",
        fix=f'sc.load("{folder / files[0]}")' if files else None,
    )


def _of_folder(folder: Path) -> zoo.Published | None:
    """The published model whose files, of which there are several, are all here."""
    found = [
        entry
        for entry in zoo.published().values()
        if len(entry.files) > 1 and all((folder / file.name).is_file() for file in entry.files)
    ]
    if len(found) > 1:
        raise CheckpointError(
            "the folder holds the files of several models.",
            where=str(folder),
            got=", ".join(entry.name for entry in found),
            expected="to be told which one",
            fix=f'sc.load("{folder}", model="{found[0].name}")',
        )
    return next(iter(found), None)


def _outline(names: list[str]) -> str:
    return ", ".join(names[:4]) + (" ..." if len(names) > 4 else "") or "an empty folder"


def _only_for_files(model: str | None) -> None:
    if model is not None:
        raise ConfigError(
            "this source says itself which model it is.",
            got=f"model={model!r}",
            expected="model= with an official file, or a folder of such files, alone",
        )


def _is_hub_id(source: str | Path) -> bool:
    return (
        isinstance(source, str)
        and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source) is not None
        and not source.endswith(SUFFIXES)
    )


def _download(repository: str) -> Path:
    hub = require("huggingface_hub", purpose="models of the Hugging Face Hub")
    try:
        return Path(hub.snapshot_download(repository, allow_patterns=list(HUB_FILES)))
    except Exception as err:
        # The client, its cache and its HTTP library each raise kinds of their own.
        raise CheckpointError(
            f"{repository!r} is neither a local folder nor a model that the Hub gave us.",
            where=repository,
            got=f"{type(err).__name__}: {first_line(err)}",
            expected='an existing path, or a Hub id such as "facebook/sam-vit-base"',
            fix="check the name and the connection; offline, give the folder of a downloaded model",
        ) from err


def _not_found(source: str, path: Path) -> CheckpointError:
    fix = closest(source, (*SHIPPED, *zoo.published()))
    if source in ARCHITECTURES:
        fix = f'sc.build("{source}") for random weights, or the path of a checkpoint of it'
    elif path.parent.is_dir() and path.parent != Path():
        near = closest(path.name, (p.name for p in path.parent.iterdir()))
        fix = near and f"in {path.parent}: {near}"
    return CheckpointError(
        "there is no such model.",
        where=source,
        got="neither a name, nor a file, nor a folder",
        expected=f"{', '.join(map(repr, SHIPPED))}, a name of sc.list_models(), a file, a folder, "
        "or a Hub id",
        fix=fix,
    )
