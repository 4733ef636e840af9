"""Segment everything: any sampler of prompts on any SAM."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .._shared_decoder import prompts_at_once
from ..contract import device_of, dtype_of, parts
from ..devices import device as device_named
from ..errors import ConfigError, ModelError
from ..framing import framing_of
from ..predict import Embedding, _placing, encode
from ._calibrate import matched
from ._collect import Collector
from ._decode import Decoder, Plain, decoder_for
from ._meter import Meter
from ._rounds import Prompts, Sampler, Scene
from .samplers import Grid
from .segments import EverythingStats, Segments


@dataclass(frozen=True, kw_only=True)
class Everything:
    """All masks of an image.

    With the `Grid` and the same settings the result is `SamAutomaticMaskGenerator`'s, mask for mask
    and in its order, without its crops. The image's side of the decoder is computed once, masks
    whose predicted IoU is too low are never enlarged, and few are in full size at a time.

    The thresholds are those that SAM has for SAM-H; another model's predicted IoU is distributed in
    another way, so they can remove most of its masks: see `calibrate_thresholds`.

    Args:
        sampler: where to ask, one of `sc.samplers` or your own.
        points_per_batch: prompts in one call of the decoder; None for what suits the device. The
            result does not depend on it.
        min_iou: masks whose predicted IoU is not above are left out; 0 or less for none.
        min_stability: masks less stable are left out: the IoU of the mask cut above and below its
            threshold; 0 or less for none.
        stability_offset: how far above and below, in logits.
        nms: of two masks whose boxes overlap by more than this IoU, the one with the lower score
            is left out; 1 for none.
        nms_of: compare ``boxes``, as SAM does, by which two masks with the same box suppress each
            other, or the ``masks`` themselves.
        min_region: holes and islands of fewer pixels are filled and removed; needs scipy.
        max_masks: at most so many, the best; None for all.
        decoder: ``shared`` computes what prompts have in common once, where the decoder is
            segment_anything's, and is equal to rounding; ``model`` calls the model's own.

    Raises:
        ConfigError: if a setting is out of range.

    Source:
        SAM, Kirillov et al. 2023, arXiv 2304.02643, and segment_anything's generator (Apache-2.0);
        own code.

    Example:
        >>> import samcompress as sc
        >>> scene = sc.shapes(1, size=96)[0]
        >>> everything = sc.Everything(sampler=sc.samplers.Grid(side=4), min_iou=0.5)
        >>> found = everything(sc.load("tiny"), scene.image)
        >>> found.masks.shape == (len(found), 96, 96), found.stats.prompts
        (True, 16)
    """

    sampler: Sampler = field(default_factory=Grid)
    points_per_batch: int | None = None
    min_iou: float = 0.88
    min_stability: float = 0.95
    stability_offset: float = 1.0
    nms: float = 0.7
    nms_of: Literal["boxes", "masks"] = "boxes"
    min_region: int = 0
    max_masks: int | None = None
    decoder: Literal["shared", "model"] = "shared"

    def __post_init__(self) -> None:
        least = {"points_per_batch": 1, "stability_offset": 0, "nms": 0, "min_region": 0}
        for name, low in {**least, "max_masks": 1}.items():
            value = getattr(self, name)
            if value is not None and not value >= low:
                raise ConfigError(
                    f"Everything: {name} is out of range.", got=value, expected=f"at least {low}"
                )
        for name, choices in (("nms_of", ("boxes", "masks")), ("decoder", ("shared", "model"))):
            if getattr(self, name) not in choices:
                raise ConfigError(
                    f"Everything: there is no such {name}.",
                    got=getattr(self, name),
                    expected=" | ".join(choices),
                )

    @property
    def label(self) -> str:
        """What tells the masks of two settings apart, on one line."""
        filters = f"iou>{self.min_iou:g} stability>={self.min_stability:g}"
        return f"{self.sampler!r} {filters} nms-{self.nms_of}-{self.nms:g}"

    @torch.inference_mode()
    def __call__(self, model: nn.Module, image: NDArray[np.uint8]) -> Segments:
        """Segment one image.

        Args:
            model: any SAM; left in the mode it is in.
            image: (H, W, 3) uint8 RGB.

        Returns:
            Masks, best first; perhaps none.

        Raises:
            ShapeError, DataError: if the image is not (H, W, 3) uint8, or too narrow.
            ModelError: if the prompt encoder is not in float32, or lacks what the sampler needs.
        """
        check_prompts(model)
        meter = Meter(device_named(device_of(model)))
        with meter.time("encoder"):
            (embedding,) = encode(model, [image])
        with meter.time("decoding"):
            session = Session(model, embedding, shared=self.decoder == "shared")
        collector = Collector(
            settings=self,
            framing=framing_of(model),
            size=embedding.size,
            threshold=float(getattr(model, "mask_threshold", 0.0)),
            tau=self.sampler.tau,
        )
        rounds, prompts, calls = 0, 0, 0
        asked = self.sampler.rounds(Scene(np.asarray(image), embedding, model))
        step = self.points_per_batch or session.batch
        while True:
            with meter.time("sampling"):
                lot = _next(asked, collector, first=rounds == 0)
            if lot is None:
                break
            rounds, prompts = rounds + 1, prompts + len(lot)
            for low in range(0, len(lot), step):
                calls += 1
                self._decode(session, lot.part(low, low + step), collector, meter)
        with meter.time("post"):
            found = collector.finish()
        seconds = {f"{name}_s": meter.seconds[name] for name in STAGES}
        stats = EverythingStats(
            prompts, calls, rounds, collector.masks, **seconds, total_s=meter.total,
            peak_bytes=meter.peak_bytes,
        )  # fmt: skip
        return replace(found, stats=stats)

    def _decode(
        self, session: Session, prompts: Prompts, collector: Collector, meter: Meter
    ) -> None:
        with meter.time("decoding"):
            answers = session.decode(prompts)
            rows, masks = collector.keep(answers.scores, prompts)
            low = answers.low(rows, masks) if len(rows) else None
        if low is not None:
            with meter.time("post"):
                collector.add(low, rows, masks, answers, prompts)

    def calibrate_thresholds(
        self, model: nn.Module, teacher: nn.Module, images: Iterable[NDArray[np.uint8]]
    ) -> Everything:
        """The same with thresholds that let as much pass of a model as these let of a teacher.

        On a few images both answer the same grid of points; predicted IoU, stability and, where
        the sampler has one, `tau` become the numbers that as large a share of the model's masks,
        and of its pixels inside masks, exceeds.

        Args:
            model: a SAM, whose thresholds are to be found.
            teacher: the SAM that the present ones are for.
            images: (H, W, 3) uint8 RGB; five are enough.

        Raises:
            ConfigError: if there is no image.
        """
        return matched(self, model, teacher, images)


STAGES = ("encoder", "sampling", "decoding", "post")


class Session:
    """One encoded image that prompts are asked about.

    Args:
        model: a SAM.
        embedding: from `encode`.
        shared: whether prompts may share what they have in common.
    """

    def __init__(self, model: Any, embedding: Embedding, *, shared: bool = True) -> None:
        self.model, self.embedding = model, embedding
        self.place = _placing(model, embedding)
        self.device = embedding.features.device
        # Places are rounded as in segment_anything; MPS has no numbers of that size.
        self.kind = torch.float32 if self.device.type == "mps" else torch.float64
        if shared:
            self.decoder: Decoder = decoder_for(model, embedding.features)
        else:
            kind = dtype_of(model.mask_decoder)
            place = model.prompt_encoder.get_dense_pe().to(kind)
            self.decoder = Plain(model.mask_decoder, embedding.features.to(kind), place)

    @property
    def batch(self) -> int:
        """Prompts in one call that suit the device."""
        return prompts_at_once(self.embedding.features)

    def decode(self, prompts: Prompts) -> Any:
        """Answers to prompts of the image's pixels."""
        points = boxes = None
        if prompts.points is not None:
            coords = self._tensor(prompts.points)[:, None]
            points = coords, torch.ones(coords.shape[:2], dtype=torch.int, device=self.device)
        if prompts.boxes is not None:
            boxes = self._tensor(prompts.boxes.reshape(-1, 2)).reshape(-1, 4)
        sparse, dense = self.model.prompt_encoder(points=points, boxes=boxes, masks=None)
        return self.decoder(sparse, dense, multimask=prompts.multimask)

    def _tensor(self, points: NDArray[np.float64]) -> Tensor:
        return torch.as_tensor(self.place(points)).to(self.device, self.kind)


def check_prompts(model: nn.Module) -> None:
    """Check that the prompt encoder computes in float32.

    Raises:
        ModelError: if it does not.
    """
    kind = dtype_of(parts(model).prompt_encoder)
    if kind != torch.float32:
        raise ModelError(
            "segment_anything's prompt encoder computes in float32 only.",
            where="prompt_encoder",
            got=kind,
            fix="cast sam.image_encoder and sam.mask_decoder, and leave sam.prompt_encoder",
        )


def _next(asked: Any, collector: Collector, *, first: bool) -> Prompts | None:
    try:
        lot: Prompts = next(asked) if first else asked.send(collector.accepted)
    except StopIteration:
        return None
    return lot
