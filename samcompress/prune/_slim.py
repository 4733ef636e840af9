"""What SlimSAM needs besides the cuts: how wide attention gets, units that go together, files."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from ..core.checkpoint import fingerprint, is_ours, save
from ..core.checkpoint import identity as model_identity
from ..core.errors import CheckpointError, ConfigError, ModelError
from ..core.files import write_whole
from ..core.history import History, remember
from ..core.transform import Context, State
from ._groups import Group, Member

MULTIPLE = 8  # of a head's width, as kernels like it


def fewest_heads(heads: int, dims: int, width: int, round_to: int) -> tuple[int, int] | None:
    """How many heads of how many dimensions make attention so wide.

    Of all ways to keep some dimensions of some heads, with at most one head more than the width
    takes, the widest; of those the one with the fewest heads. A head keeps all its dimensions or a
    multiple of 8.

    Args:
        heads: heads that are there.
        dims: dimensions of each.
        width: heads times dimensions are at most this,
        round_to: and a multiple of this.

    Returns:
        Heads, and dimensions of each; None if there is no way.

    Example:
        >>> fewest_heads(12, 64, 384, 32), fewest_heads(12, 64, 160, 32)
        ((6, 64), (4, 40))
    """
    ways = [
        (count, kept)
        for count in range(1, min(heads, math.ceil(width / dims) + 1) + 1)
        for kept in (*range(MULTIPLE, dims, MULTIPLE), dims)
        if count * kept <= width and count * kept % round_to == 0
    ]
    return max(ways, key=lambda way: (way[0] * way[1], -way[0]), default=None)


def tied(label: str, group: Group, heads: int) -> Group:
    """A group of channels in which those as far apart as a head is wide are one unit.

    Raises:
        ConfigError: if the number of heads does not divide that of the channels.
    """
    count, rest = divmod(group.units, heads)
    if rest:
        raise ConfigError(
            f'{label}: tie="heads" finds channels that heads do not divide.',
            where=group.name,
            got=f"{group.units} channels, {heads} heads",
            expected="as many channels for each head",
            fix='tie="none"',
        )
    members = (dataclasses.replace(m, unit=m.unit % count) for m in group.members)
    return dataclasses.replace(group, units=count, members=tuple(members))


def places(group: Group, kept: Sequence[int]) -> list[int]:
    """Where the kept units of a group are, along the axes of its members."""
    inside = torch.isin(group.members[-1].unit, torch.tensor(kept))
    found: list[int] = inside.nonzero().flatten().tolist()
    return found


def of_heads(group: Group, heads: Sequence[int]) -> Group:
    """Dimensions of attention's heads, judged by what some of the heads do with them."""
    inside = torch.zeros(len(group.members[-1].unit) // group.units, dtype=torch.bool)
    inside[list(heads)] = True
    # A part lies head by head, and what has queries, keys and values has three of them.
    part = inside.repeat_interleave(group.units)

    def restricted(member: Member) -> Member:
        mask = part.repeat(len(member.unit) // len(part))
        return dataclasses.replace(member, unit=torch.where(mask, member.unit, -1))

    return dataclasses.replace(group, members=tuple(map(restricted, group.members)))


def same_insides(label: str, model: nn.Module, teacher: nn.Module) -> None:
    """Check that what two SAMs say inside their blocks can be compared.

    Raises:
        ModelError: if their blocks differ in number, or in the width of attention.
    """
    mine, theirs = _widths(model), _widths(teacher)
    if mine != theirs:
        raise ModelError(
            f"{label}: the teacher's blocks are not as wide inside as the model's.",
            where="image_encoder.blocks.*.attn.qkv",
            got=f"{_outline(mine)} in the model, {_outline(theirs)} in the teacher",
            expected="the same, for the first training compares them",
            fix="as teacher= the model from before this step, or align=False",
        )


def _widths(sam: Any) -> list[int]:
    blocks = getattr(sam.image_encoder, "blocks", ())
    return [b.attn.qkv.out_features for b in blocks if hasattr(getattr(b, "attn", None), "qkv")]


def _outline(widths: Sequence[int]) -> str:
    sizes = sorted(set(widths))
    return f"{len(widths)} blocks of {', '.join(map(str, sizes[:3]))}" if sizes else "no such block"


def decided(
    choose: Callable[[], State], model: nn.Module, ctx: Context, identity: Mapping[str, Any]
) -> State:
    """What `choose` finds; read from the work folder if it was found there before.

    Scores take long, and a device may not give them twice the same. Training can only be taken up
    if the cut before it is the same to the last unit.

    Raises:
        CheckpointError: if the file is damaged or cannot be written.
    """
    if ctx.workdir is None:
        return choose()
    data = None if ctx.dataset is None else ctx.dataset.fingerprint
    key = json.dumps({**identity, "model": model_identity(model), "data": data}, sort_keys=True)
    path = (
        ctx.workdir
        / f"{ctx.step.replace('.', '-')}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.json"
    )
    if path.is_file():
        try:
            found: State = json.loads(path.read_text())
        except ValueError as err:
            raise CheckpointError(
                "a file that says what was cut cannot be read.",
                where=str(path),
                got=err,
                expected="what was written there when scores had been computed",
                fix="delete the file, and they are computed again",
            ) from err
        return found
    found = choose()
    write_whole(path, json.dumps(found).encode())
    return found


@contextmanager
def saved(model: nn.Module, record: History, workdir: Path | None) -> Iterator[str]:
    """A folder with the model as it is, `record` its history; in the work folder if there is one.

    Raises:
        CheckpointError: if it cannot be written.
    """
    with TemporaryDirectory() if workdir is None else nullcontext(workdir) as place:
        label = record.steps[-1].transform.label.replace(".", "-")
        folder = Path(place) / f"{label}-{fingerprint(model)[:12]}"
        # Also where the folder is there: the training to come is kept under these steps.
        remember(model, record)
        if not is_ours(folder):
            save(model, folder)
        yield str(folder)
