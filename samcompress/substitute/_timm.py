"""Any of timm's models that gives features as a SAM's image encoder.

A plan is made first, from a run without storage: the level whose cells are as large as those of the
decoder, and all coarser ones. These are brought to one width, enlarged to that level's grid and
added, as in a feature pyramid; then comes SAM's own neck. A model of one level has the neck alone.

Source: timm, R. Wightman, https://github.com/huggingface/pytorch-image-models (Apache-2.0); feature
pyramids: T.-Y. Lin et al., 2016, arXiv 1612.03144. Own code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NoReturn

import torch
from segment_anything.modeling.common import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F

from ..core._require import require
from ..core.errors import CheckpointError, ConfigError, ModelError, closest
from ._fold import batch_norm_pairs, fold_batch_norms


@dataclass(frozen=True)
class Plan:
    """Which of timm's features make the embedding, the finest first.

    Attributes:
        levels: their numbers in timm's list.
        widths: their channels.
        strides: pixels of the image for each of their cells.
    """

    levels: tuple[int, ...]
    widths: tuple[int, ...]
    strides: tuple[int, ...]

    def multiple(self, stride: int) -> int:
        """What S must be a multiple of, so that the maps and an embedding have whole cells.

        Strides that do not nest with the embedding's are those of models that cut or pad their
        maps; they have no whole cells at any size.
        """
        nesting = (s for s in self.strides if s % stride == 0 or stride % s == 0)
        return math.lcm(stride, *nesting)


def known(name: str) -> None:
    """Check that timm has a model of this name.

    Raises:
        ModelError: if it has not.
    """
    timm = _timm()
    if not timm.is_model(name):
        raise ModelError(
            "timm has no model of this name.",
            where="model",
            got=name,
            expected="one of timm.list_models()",
            fix=closest(name, timm.list_models()),
        )


@lru_cache(maxsize=64)
def planned(name: str, size: int, stride: int) -> Plan:
    """The levels for images of a size and an embedding of a stride, both in pixels.

    Raises:
        ModelError: if timm has no such model, or none that gives features.
        ConfigError: if the model does not take images of this size.
    """
    known(name)
    try:
        found = _levels(name, size)
    except Exception as err:
        _refuse(name, size, err)
    # The one that is as fine; else the nearest finer one, or the finest there is.
    first = max((s for s in found if s <= stride), default=min(found))
    strides = tuple(s for s in found if s >= first)
    levels, widths = zip(*(found[s] for s in strides), strict=True)
    return Plan(levels, widths, strides)


def features(
    name: str, size: int, levels: Sequence[int] | None = None, *, pretrained: bool = False
) -> Any:
    """A model of timm for images of a size, as a module that returns a list of feature maps.

    Args:
        name: timm's name.
        size: side S of the image; models without anything of a fixed size are not told.
        levels: numbers of the maps; None for all.
        pretrained: with weights from the Hub.

    Raises:
        CheckpointError: if `pretrained` and timm cannot get the weights.
    """
    options: dict[str, Any] = {"features_only": True, "pretrained": pretrained}
    if levels is not None:
        options["out_indices"] = tuple(levels)
    try:
        try:
            # The form of features that leaves timm's model whole, and so able to change its size.
            whole = {"feature_cls": "getter", "img_size": size}
            return _timm().create_model(name, **whole, **options)
        except TypeError:  # this model takes images of any size, or has one form of features
            return _timm().create_model(name, **options)
    except Exception as err:
        if not pretrained:
            raise
        raise CheckpointError(
            "timm could not get the weights of this model.",
            where=name,
            got=f"{type(err).__name__}: {_line(err)}",
            expected="weights on the Hub, or in its cache on this machine",
            fix="Timm(model=..., pretrained=False), or run it once where there is a network",
        ) from err


def renormalising(name: str, mean: Tensor, std: Tensor) -> dict[str, list[float]] | None:
    """What turns pixels that a SAM has normalised into those that timm's weights expect.

    Args:
        name: timm's name.
        mean: what the SAM subtracts from pixels in 0...255.
        std: what it divides by.

    Returns:
        A factor and an offset for each channel; None where the two agree.
    """
    rule = _timm().get_pretrained_cfg(name)
    if rule is None:
        return None
    theirs = [torch.tensor(values, dtype=torch.float64) * 255 for values in (rule.mean, rule.std)]
    ours = [values.detach().double().cpu().flatten() for values in (mean, std)]
    scale, shift = ours[1] / theirs[1], (ours[0] - theirs[0]) / theirs[1]
    if torch.allclose(scale, torch.ones_like(scale)) and shift.abs().max() < 1e-6:
        return None
    return {"scale": scale.tolist(), "shift": shift.tolist()}


class TimmEncoder(nn.Module):
    """``(B, 3, S, S)`` to ``(B, C, h, w)``.

    Args:
        name: timm's name.
        image_size: side S of the input in pixels.
        grid: cells h = w a side of the embedding.
        out_chans: channels C of the embedding.
        plan: the levels; see `planned`.
        pixels: see `renormalising`.
        pretrained: the trunk with weights from the Hub.

    Raises:
        CheckpointError: if `pretrained` and timm cannot get the weights.
        MissingDependencyError: if timm is not installed.
    """

    def __init__(
        self,
        name: str,
        image_size: int,
        grid: int,
        out_chans: int,
        plan: Plan,
        *,
        pixels: dict[str, list[float]] | None = None,
        pretrained: bool = False,
    ) -> None:
        super().__init__()
        self.name, self.img_size, self.grid, self.plan = name, image_size, grid, plan
        self.pixels = nn.Identity() if pixels is None else Affine(**pixels)
        self.trunk = features(name, image_size, plan.levels, pretrained=pretrained)
        self.last = "NHWC" in str(getattr(self.trunk, "output_fmt", ""))
        width, several = plan.widths[0], len(plan.levels) > 1
        self.laterals = nn.ModuleList(
            nn.Conv2d(channels, out_chans, 1) for channels in plan.widths if several
        )
        self.neck = nn.Sequential(
            nn.Conv2d(out_chans if several else width, out_chans, 1, bias=False),
            LayerNorm2d(out_chans),
            nn.Conv2d(out_chans, out_chans, 3, padding=1, bias=False),
            LayerNorm2d(out_chans),
        )

    @property
    def stride(self) -> int:
        """Pixels of the image for each cell of the embedding."""
        return self.img_size // self.grid

    @property
    def multiple(self) -> int:
        """What S must be a multiple of."""
        return self.plan.multiple(self.stride)

    def forward(self, x: Tensor) -> Tensor:
        """Encode images."""
        maps: list[Tensor] = self.trunk(self.pixels(x))
        self._forget()
        if self.last:
            maps = [level.permute(0, 3, 1, 2) for level in maps]
        if self.laterals:
            maps = [lateral(level) for lateral, level in zip(self.laterals, maps, strict=True)]
        first, *coarser = (self._placed(level) for level in maps)
        embedding: Tensor = self.neck(sum(coarser, start=first))
        return embedding

    def resize(self, size: int) -> None:
        """Take images of another size, by timm's own rule where the model has tables of a size.

        Args:
            size: new side S, a multiple of `multiple`.

        Raises:
            ConfigError: if the model is made for one size and timm cannot change it.
        """
        inner = getattr(self.trunk, "model", self.trunk)
        fit = planned(self.name, size, self.stride)  # refuses sizes the model cannot take
        if hasattr(inner, "set_input_size"):
            inner.set_input_size(img_size=(size, size))
        elif fit != self.plan or not _any_size(self.name, self.img_size, size):
            raise ConfigError(
                "timm cannot change the image size of this model.",
                where=self.name,
                got=size,
                expected=self.img_size,
                fix=f"sc.substitute.ImageSize(size={size}) before sc.substitute.Timm",
            )
        self.grid = self.grid * size // self.img_size
        self.img_size = size

    def fuse(self) -> None:
        """Make branches one convolution, where timm can, and fold batch norms, in place.

        The result computes what the encoder computes in eval mode, to rounding.
        """
        require("timm.utils.model", extra="zoo").reparameterize_model(self.trunk, inplace=True)
        side, kind = self.img_size, next(self.neck.parameters()).dtype
        example = torch.empty(1, 3, side, side, dtype=kind, device="meta")
        fold_batch_norms(self, batch_norm_pairs(self, example))

    def _placed(self, level: Tensor) -> Tensor:
        """A map on the embedding's grid."""
        if level.shape[-2:] == (self.grid, self.grid):
            return level
        return F.interpolate(level, (self.grid, self.grid), mode="bilinear")

    def _forget(self) -> None:
        """Drop what some attentions keep of a call: new weights would not reach it."""
        for part in self.trunk.modules():
            if getattr(part, "attention_bias_cache", None):
                part.attention_bias_cache = {}


class Affine(nn.Module):
    """``x * scale + shift`` for each channel."""

    scale: Tensor
    shift: Tensor

    def __init__(self, scale: Sequence[float], shift: Sequence[float]) -> None:
        super().__init__()
        for name, values in (("scale", scale), ("shift", shift)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map images."""
        return x * self.scale + self.shift


def _timm() -> Any:
    return require("timm", extra="zoo")


def _levels(name: str, size: int) -> dict[int, tuple[int, int]]:
    """Number and channels of the deepest map of each stride, the finest first."""
    made = _without_storage(name, size)
    _run(made, size)
    info = made.feature_info
    found = zip(info.reduction(), info.out_indices, info.channels(), strict=True)
    return {stride: (level, width) for stride, level, width in sorted(found)}


def _any_size(name: str, size: int, other: int) -> bool:
    """Whether a model made for one size takes the other too, and would be made the same for it."""
    made = [_without_storage(name, side) for side in (size, other)]
    tensors = [
        {key: tensor.shape for key, tensor in (*m.named_parameters(), *m.named_buffers())}
        for m in made
    ]
    try:
        _run(made[0], other)
    except Exception:
        return False
    return tensors[0] == tensors[1]


def _without_storage(name: str, size: int) -> Any:
    with torch.device("meta"):
        return features(name, size).eval()


def _run(trunk: Any, size: int) -> None:
    with torch.no_grad():
        trunk(torch.zeros(1, 3, size, size, device="meta"))


def _refuse(name: str, size: int, err: Exception) -> NoReturn:
    """Say whether it is the size or the model."""
    reason = f"{type(err).__name__}: {_line(err)}"
    rule = _timm().get_pretrained_cfg(name)
    own = rule.input_size[-1] if rule is not None else 224
    try:
        coarsest = max(_levels(name, own))
    except Exception:
        raise ModelError(
            "timm cannot give features of this model.",
            where=name,
            got=reason,
            expected="a model that timm.create_model(..., features_only=True) makes and runs",
            fix="another model, e.g. mobilenetv4_conv_small",
        ) from err
    raise ConfigError(
        "this model of timm does not take images of this side.",
        where=name,
        got=f"{size}: {reason}",
        expected=f"a multiple of {coarsest}, for example {own}",
        fix="sc.substitute.ImageSize(size=...) before it",
    ) from err


def _line(err: Exception) -> str:
    return str(err).split("\n", 1)[0]
