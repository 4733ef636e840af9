"""Whole blocks of the image encoder."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.errors import ConfigError
from ..core.predict import preprocess
from ..core.registry import register
from ..core.transform import Context, State, Transform
from ._cut import keep_blocks
from ._slices import check_blocks, check_finite, readable

BLOCKS = "image_encoder.blocks"


@register
@dataclass(frozen=True, kw_only=True)
class Blocks(Transform, family="prune", phase=20):
    """Remove whole blocks of the image encoder.

    What is gone takes its time along on every device, and nothing is as rough: one or two blocks of
    twelve, then distillation. The first block and the last with global attention always stay:
    windows do not overlap, so only global attention lets them know of one another.

    Args:
        count: how many blocks go, >= 1.
        criterion: "influence": the block that changes the direction of its tokens least; one pass
            over the images for each block removed. "embedding": the one without which the embedding
            changes least; as many passes as there are blocks, for each removed. "random": drawn by
            `seed`. Blocks go one at a time, and what is left is looked at again.
        keep_global: remove windowed blocks only.
        images: at most so many images are looked at.
        seed: of "random".

    Raises:
        ConfigError: if a field is out of range, or so many blocks cannot go.
        ModelError: if the image encoder is not made of segment_anything's ViT blocks, their outputs
            are not finite, or the mask decoder reads them too, as in SAM-HQ.
        DataError: if a criterion gets no image.

    Effect:
        A windowed block of ``vit_b`` is 7.1 of 93.7 million parameters and 32 of 486 GMAC, one with
        global attention 7.1 million and 55.

    Composes with:
        After `ImageSize`; before all other pruning, distillation, quantisation and export.

    Source:
        Influence: ShortGPT, X. Men et al., 2024, arXiv 2403.03853. For SAM: own design.

    Example:
        >>> import samcompress as sc
        >>> small = sc.prune.Blocks(criterion="random")(sc.build("tiny"))
        >>> len(small.image_encoder.blocks)
        3
    """

    count: int = 1
    criterion: Literal["influence", "embedding", "random"] = "influence"
    keep_global: bool = False
    images: int = 16
    seed: int = 0

    @property
    def needs_data(self) -> bool:
        """Whether the criterion looks at images."""
        return self.criterion != "random"

    def validate(self) -> None:
        """Check ranges."""
        for name in ("count", "images"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"{self.label}: {name} is out of range.",
                    got=getattr(self, name),
                    expected="at least 1",
                )

    def check(self, model: nn.Module) -> None:
        """Check that so many blocks can go."""
        check_blocks(self.label, model)
        blocks: Any = model.get_submodule(BLOCKS)
        free = len(self._free(blocks))
        if free < self.count:
            raise ConfigError(
                f"{self.label}: so many blocks cannot go.",
                where=f"{BLOCKS}, {len(blocks)} in all",
                got=f"count={self.count}",
                expected=f"at most {free}",
                fix="keep_global=False" if self.keep_global else None,
            )

    def apply(self, model: nn.Module, ctx: Context) -> State:
        """Remove the least important block, look again, and so on."""
        sam: Any = model
        kept = list(range(len(sam.image_encoder.blocks)))
        samples = list(readable(self.label, ctx, self.images)) if self.needs_data else []
        goal = embeddings(sam, samples) if self.criterion == "embedding" else []
        drawn = torch.Generator().manual_seed(self.seed)
        for _ in range(self.count):
            free = self._free(sam.image_encoder.blocks)
            if self.criterion == "random":
                scores = torch.rand(len(free), generator=drawn).tolist()
            elif self.criterion == "influence":
                seen = ctx.progress.track(samples, label="images")
                found = influence(sam, seen)
                scores = [found[i] for i in free]
            else:
                tried = ctx.progress.track(free, label="blocks")
                scores = [distance(sam, i, samples, goal) for i in tried]
            check_finite(self.label, {BLOCKS: torch.tensor(scores)})
            least = free[scores.index(min(scores))]
            del kept[least]
            keep_blocks(sam.image_encoder, _without(sam, least))
        return {"kept": {BLOCKS: kept}}

    def rebuild(self, model: nn.Module, state: State) -> State:
        """Remove the same blocks again."""
        sam: Any = model
        keep_blocks(sam.image_encoder, state["kept"][BLOCKS])
        return state

    def _free(self, blocks: Iterable[Any]) -> list[int]:
        """Blocks that may go."""
        windows = [block.window_size for block in blocks]
        everywhere = [i for i, size in enumerate(windows) if size == 0]
        stays = {0, *(everywhere if self.keep_global else everywhere[-1:])}
        return [i for i in range(len(windows)) if i not in stays]


@torch.no_grad()
def influence(sam: Any, samples: Iterable[Any]) -> list[float]:
    """One minus the mean cosine between a token before and after a block, for each block.

    Args:
        sam: the model.
        samples: with ``image``.

    Source:
        ShortGPT, arXiv 2403.03853.
    """
    total = [0.0] * len(sam.image_encoder.blocks)

    def seen(number: int) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            cosine = F.cosine_similarity(args[0].float(), output.float(), dim=-1)
            total[number] += 1 - cosine.mean().item()

        return hook

    handles = [b.register_forward_hook(seen(i)) for i, b in enumerate(sam.image_encoder.blocks)]
    try:
        count = len(embeddings(sam, samples))
    finally:
        for handle in handles:
            handle.remove()
    return [value / count for value in total]


@torch.no_grad()
def embeddings(sam: Any, samples: Iterable[Any]) -> list[Tensor]:
    """(1, C, h, w) float32 of each image."""
    return [sam.image_encoder(preprocess(sam, s.image)[0][None]).float() for s in samples]


def distance(sam: Any, index: int, samples: Iterable[Any], goal: list[Tensor]) -> float:
    """Mean squared error of the embeddings without one more block."""
    whole = sam.image_encoder.blocks
    keep_blocks(sam.image_encoder, _without(sam, index))
    try:
        found = embeddings(sam, samples)
    finally:
        sam.image_encoder.blocks = whole
    return sum(F.mse_loss(a, b).item() for a, b in zip(found, goal, strict=True)) / len(goal)


def _without(sam: Any, index: int) -> list[int]:
    return [i for i in range(len(sam.image_encoder.blocks)) if i != index]
