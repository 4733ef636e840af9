"""One door for every kind of SAM: a name, a file, a folder, a Hub id, a transformers model."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from segment_anything.modeling import Sam
from torch import nn

from ._infer import assemble, config_from_state
from ._require import require
from ._weights import TensorDict, first_line, read_state
from .adapters import from_transformers, state_from_transformers
from .build import ARCHITECTURES
from .checkpoint import RECORD, is_ours, load_folder
from .errors import CheckpointError, ModelError, closest
from .history import describe

# Models that ship with the package: the file beside this one, named like the architecture.
SHIPPED = {"tiny": Path("tiny") / "model.safetensors"}
# Licences of official weights, by file name or Hub id.
LICENCES = {
    "tiny": "Apache-2.0",
    "sam_vit_b_01ec64.pth": "Apache-2.0",
    "sam_vit_l_0b3195.pth": "Apache-2.0",
    "sam_vit_h_4b8939.pth": "Apache-2.0",
    "facebook/sam-vit-base": "Apache-2.0",
    "facebook/sam-vit-large": "Apache-2.0",
    "facebook/sam-vit-huge": "Apache-2.0",
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
    decoder_num_heads: int | None = None,
) -> Sam:
    """Load a SAM from wherever it is.

    Sizes are read off the weights, so fine-tuned, narrower and resized SAMs need no further word.
    A pickle is read for its tensors only; code in it is refused, never run.

    Args:
        source: one of

            - ``"tiny"``, the model that ships with the package;
            - a folder written by `sc.save`, or by ``save_pretrained`` of a transformers SamModel;
            - a ``.pth``, ``.pt`` or ``.safetensors`` file with segment_anything's or transformers'
              tensor names;
            - a Hugging Face Hub id, e.g. ``"facebook/sam-vit-base"``: downloaded once, then read
              from the local cache, also when offline;
            - a transformers SamModel.
        device: where to put the model.
        decoder_num_heads: for a bare file whose decoder has widths of its own: the one size that
            its tensors do not show.

    Returns:
        A segment_anything `Sam` in eval mode; float32, except that a folder of `sc.save` and a
        SamModel keep their dtypes.

    Raises:
        CheckpointError: if nothing is found there, or it is damaged, holds code, or is not a SAM.
        ModelError: if an object is not a SamModel.

    Example:
        >>> import samcompress as sc
        >>> sc.load("tiny").image_encoder.img_size
        128
    """
    if not isinstance(source, (str, Path)):
        return _from_object(source).to(device)
    if source in SHIPPED:
        return _from_shipped(str(source)).to(device)
    path = Path(source).expanduser()
    if path.is_file():
        return _from_file(path, decoder_num_heads).to(device)
    if path.is_dir():
        return _from_folder(path, path.name).to(device)
    if _is_hub_id(source):
        return _from_folder(_download(str(source)), str(source)).to(device)
    raise _not_found(str(source), path)


def _from_object(source: object) -> Sam:
    if not isinstance(source, nn.Module) or type(source).__name__ != "SamModel":
        raise ModelError(
            "this object cannot be loaded.",
            got=f"{type(source).__module__}.{type(source).__qualname__}",
            expected="a name, a path, a Hub id, or a transformers SamModel",
            fix="a segment_anything Sam needs no loading: give it to a pipeline as it is",
        )
    sam = from_transformers(source)
    describe(sam, source="a transformers SamModel")
    return sam


def _from_shipped(name: str) -> Sam:
    path = Path(__file__).parent / SHIPPED[name]
    sam = assemble(ARCHITECTURES[name], read_state(path), where=str(path))
    describe(sam, source=name, licence=LICENCES[name])
    return sam


def _from_file(path: Path, decoder_num_heads: int | None) -> Sam:
    state = read_state(path)
    roots = {name.split(".")[0] for name in state}
    layout = next((x for x in LAYOUTS if x.roots <= roots), None)
    if layout is None:
        nearest = max(LAYOUTS, key=lambda x: len(x.roots & roots))
        absent = ", ".join(f"{root}.*" for root in sorted(nearest.roots - roots))
        raise CheckpointError(
            "this is not a SAM.",
            where=str(path),
            got=f"{len(state)} tensors: {', '.join(list(state)[:3])} ...",
            expected=f"tensors {absent} too, as in {nearest.name}'s layout",
            fix="give a whole SAM: image encoder, prompt encoder and mask decoder in one file",
        )
    named = layout.convert(state)
    config = config_from_state(named, where=str(path), decoder_num_heads=decoder_num_heads)
    sam = assemble(config, named, where=str(path))
    describe(sam, source=path.name, licence=LICENCES.get(path.name))
    return sam


def _from_folder(folder: Path, source: str) -> Sam:
    if is_ours(folder):
        return load_folder(folder)
    if (folder / "config.json").is_file():
        sam = from_transformers(folder)
        describe(sam, source=source, licence=LICENCES.get(source))
        return sam
    inside = sorted(p.name for p in folder.iterdir())
    files = [name for name in inside if name.endswith(SUFFIXES)]
    raise CheckpointError(
        "the folder holds no model.",
        where=str(folder),
        got=", ".join(inside[:4]) + (" ..." if len(inside) > 4 else "") or "an empty folder",
        expected=f"{RECORD} (written by sc.save) or config.json (a transformers SamModel)",
        fix=f'sc.load("{folder / files[0]}")' if files else None,
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
    fix = closest(source, SHIPPED)
    if source in ARCHITECTURES:
        fix = f'sc.build("{source}") for random weights, or the path of a checkpoint of it'
    elif path.parent.is_dir() and path.parent != Path():
        near = closest(path.name, (p.name for p in path.parent.iterdir()))
        fix = near and f"in {path.parent}: {near}"
    return CheckpointError(
        "there is no such model.",
        where=source,
        got="neither a name, nor a file, nor a folder",
        expected=f"{', '.join(map(repr, SHIPPED))}, a file, a folder, or a Hub id",
        fix=fix,
    )
