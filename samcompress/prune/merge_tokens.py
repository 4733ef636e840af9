"""Fewer keys in global attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from segment_anything.modeling.image_encoder import Block
from torch import nn

from ..core.errors import NoEffectError
from ..core.registry import register
from ..core.transform import Context, State, Transform
from ..core.where import Where
from ._token_blocks import GlobalAttention, TokenBlock, check_kind


@register
@dataclass(frozen=True, kw_only=True)
class MergeTokens(Transform, family="prune", phase=25):
    """Merge the keys that are most alike in the image encoder's global attention.

    Use it where global attention takes the time, that is at large images, and nothing is to be
    trained. Every token still asks, so residuals, windows and embedding keep their grid; what it is
    answered comes from fewer keys and values, each the mean of what was merged and weighed by how
    many that were. It does not make linear layers cheaper, and on small maps it saves nothing.

    Args:
        ratio: share of keys that is merged into others, between 0 and 1. From 0.5 on half of the
            keys are left in rows and columns, which is fastest; up to about 0.3 nothing is gained.
        where: blocks; those with windows are left as they are.

    Raises:
        ConfigError: if `ratio` is out of range.
        NoEffectError: if `where` matches no block with global attention whose keys are unmerged.
        ModelError: if the image encoder has no ViT block of segment_anything.

    Effect:
        Same parameters. By default the encoder of ``vit_b`` at 1024 px falls from 486 to 436 GMAC,
        and a global block takes 0.79 of its time after `attention.Fused`, with ``ratio=0.75`` 0.64:
        one thread of an AMD EPYC. The embedding of `tiny` changes by 4 %, the mIoU of its boxes
        does not fall.

    Composes with:
        After what cuts weights; before `attention.Fused`, which takes the blocks with windows,
        distillation, quantisation and export. Goes together with the other techniques for tokens.

    Source:
        Token merging: D. Bolya et al., 2022, arXiv 2210.09461; code CC-BY-NC 4.0, of which nothing
        was taken. Ours merges keys and values only, at every other place of the longer side, and
        keeps relative positions. Own code.

    Example:
        >>> import samcompress as sc
        >>> small = sc.prune.MergeTokens(ratio=0.5)(sc.build("tiny"))
        >>> small.image_encoder.blocks[1].attn.ratio
        0.5
    """

    ratio: float = 0.5
    where: Where = Where(("image_encoder.**",))

    def validate(self) -> None:
        """Check the range."""
        self.between("ratio", 0, 1)

    def check(self, model: nn.Module) -> None:
        """Find blocks with global attention."""
        check_kind(self.label, model)
        self._blocks(model)

    def apply(self, model: nn.Module, ctx: Context) -> State:
        """Merge keys in every block found."""
        return self.rebuild(model, {"blocks": self._blocks(model)})

    def rebuild(self, model: nn.Module, state: State) -> State:
        """The same in the named blocks; their parts and weights move over."""
        for name in state["blocks"]:
            block: Any = model.get_submodule(name)
            if isinstance(block, TokenBlock):
                block.attn.ratio = self.ratio
            else:
                attn = GlobalAttention(block.attn, self.ratio)
                model.set_submodule(name, TokenBlock(block, attn))
        return state

    def _blocks(self, model: nn.Module) -> list[str]:
        """Names of blocks with global attention whose keys are not merged yet."""
        taken = self.where.select(model, (Block, TokenBlock), step=self.label)
        found = [(name, block) for name, block in taken if block.window_size == 0]
        free = [name for name, block in found if not getattr(block.attn, "ratio", 0)]
        if not free:
            raise NoEffectError(
                f"{self.label} finds no keys to merge.",
                where=repr(self.where),
                got="keys that are merged already" if found else "blocks with windows alone",
                expected="blocks with attention over the whole map",
                fix="leave this step out" if found else "widen where=",
            )
        return free
