"""Later blocks on clusters of tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from ..core.contract import parts
from ..core.errors import ConfigError, ModelError, NoEffectError
from ..core.registry import register
from ..core.transform import Context, State, Transform
from ._clusters import Clusters
from ._token_blocks import check_kind
from ._token_vit import TokenViT, check_vit


@register
@dataclass(frozen=True, kw_only=True)
class ClusterTokens(Transform, family="prune", phase=25):
    """Let the later blocks of the image encoder work on clusters of tokens.

    Use it where an encoder must get much faster at once and nothing can be trained: linear layers,
    windows and global attention all get cheaper, on every device. Fine structure suffers first, and
    more the earlier it starts.

    Args:
        ratio: share of tokens that goes, between 0 and 1. The side of a window becomes
            ``side x sqrt(1 - ratio)``, rounded: of windows of 14 tokens, 0.5 makes 10, 0.6 makes 9.
        start: the first block that sees clusters, counted from 0; by default half of them do.
        iterations: of soft k-means, >= 0.
        neighbours: clusters that count for a token on the way back, >= 1.
        sharpness: how fast the share of a cluster falls with its squared distance d from a token:
            ``exp(-sharpness x d)``. The larger, the harder the clusters.
        restore: "add": tokens get what has changed in their clusters; "replace": they are made of
            their clusters alone, as in Expedit-SAM.

    Raises:
        ConfigError: if a field is out of range, or windows would get no smaller, or empty.
        NoEffectError: if tokens are clustered already.
        ModelError: if the image encoder is not segment_anything's ViT, or its windows are not all
            of one size.

    Effect:
        Same parameters, fewer tokens. By default the encoder of ``vit_b`` at 1024 px falls from 486
        to 359 GMAC, with ``ratio=0.6, start=3`` to 256. The embedding of `tiny` changes by 13 %,
        the mIoU of its boxes falls by 0.011.

    Composes with:
        After what cuts weights; before `attention.Fused`, distillation of the embedding,
        quantisation and export. Goes together with the other techniques for tokens. What compares
        tokens inside blocks with another model's, as `distill.LayerWise`, finds another grid.

    Source:
        Expedit: W. Liang et al., 2022, arXiv 2210.01035. We keep the tokens' own part in "add",
        cluster no padding of windows, look for neighbours inside the window, let shares sum to 1,
        and take 0.1 for a sharpness of 0.01. Own code.

    Example:
        >>> import samcompress as sc
        >>> small = sc.prune.ClusterTokens()(sc.build("tiny"))
        >>> [block.window_size for block in small.image_encoder.blocks]
        [7, 0, 5, 0]
    """

    ratio: float = 0.5
    start: int | None = None
    iterations: int = 5
    neighbours: int = 20
    sharpness: float = 0.1
    restore: Literal["add", "replace"] = "add"

    def validate(self) -> None:
        """Check ranges."""
        self.between("ratio", 0, 1)
        for name, least in {"start": 0, "iterations": 0, "neighbours": 1, "sharpness": 0}.items():
            value, default = getattr(self, name), getattr(type(self), name)
            if value is not None and not least <= value < math.inf:
                raise ConfigError(
                    f"{self.label}: {name} is out of range.",
                    where=name,
                    got=value,
                    expected=f"{least} <= {name} < inf",
                    fix=f"{name}={default}",
                )

    def check(self, model: nn.Module) -> None:
        """Check that there are windows to cluster, and that they get smaller."""
        check_kind(self.label, model)
        encoder: Any = parts(model).image_encoder
        check_vit(self.label, encoder)
        if getattr(encoder, "clusters", None) is not None:
            raise NoEffectError(
                f"{self.label}: the tokens are clustered already.",
                where="image_encoder",
                got=f"clusters from block {encoder.start} on",
                fix="leave this step out",
            )
        windows = sorted({block.window_size for block in encoder.blocks} - {0})
        if len(windows) != 1:
            raise ModelError(
                f"{self.label} clusters inside windows of one size.",
                where="image_encoder.blocks",
                got=" and ".join(map(str, windows)) or "no windows",
                expected="windows of as many tokens in all blocks that have any",
            )
        self._check_sizes(windows[0], len(encoder.blocks))

    def _check_sizes(self, window: int, blocks: int) -> None:
        side = self._side(window)
        if not 0 < side < window:
            raise ConfigError(
                f"{self.label}: ratio leaves windows no smaller, or empty.",
                where=f"windows of {window} x {window} tokens",
                got=f"ratio={self.ratio}, so {side} x {side} clusters",
                expected=f"1 to {window - 1} clusters along a side",
                fix=f"a {'larger' if side else 'smaller'} ratio",
            )
        if self._start(blocks) >= blocks:
            raise ConfigError(
                f"{self.label}: start is behind the last block.",
                where="image_encoder.blocks",
                got=self.start,
                expected=f"0 to {blocks - 1}",
                fix=f"start={blocks // 2}",
            )

    def apply(self, model: nn.Module, ctx: Context) -> State:
        """Cluster in front of a block."""
        blocks: Any = model.get_submodule("image_encoder.blocks")
        window = max(block.window_size for block in blocks)
        state = {"start": self._start(len(blocks)), "window": window, "side": self._side(window)}
        return self.rebuild(model, state)

    def rebuild(self, model: nn.Module, state: State) -> State:
        """The same from the sizes that were found."""
        sam: Any = model
        encoder: Any = TokenViT.of(sam.image_encoder)
        encoder.start = state["start"]
        encoder.clusters = Clusters(
            state["window"],
            state["side"],
            self.iterations,
            self.neighbours,
            self.sharpness,
            self.restore == "add",
        )
        for block in encoder.blocks[state["start"] :]:
            if block.window_size:
                block.window_size = state["side"]
        sam.image_encoder = encoder
        return state

    def _side(self, window: int) -> int:
        return round(window * math.sqrt(1 - self.ratio))

    def _start(self, blocks: int) -> int:
        return blocks // 2 if self.start is None else self.start
