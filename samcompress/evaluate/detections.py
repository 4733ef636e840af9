"""Masks of a SAM for the boxes of a detector, as most papers' AP is made.

The detector decides more than any compression does: the same SAM-H has an AP of 43.8 or 49.1 on
COCO by its boxes. So the hash of the boxes is part of every protocol id made from them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn

from ..core._progress import Progress, ProgressLike
from ..core.contract import check_sam
from ..core.data import Dataset, Sample, Skipped, as_dataset
from ..core.data._files import Blob
from ..core.errors import ConfigError, DataError
from ..core.predict import Embedding, decode
from ..core.prompt import Prompt, check_inside
from ._reading import ahead, encoded, evaluating, group_size, reason
from ._scorer import Seen, score
from .masks import encode as encode_mask
from .protocol import check_finite, chosen

BoxChoice = Literal["single", "predicted", "box-iou"]


@dataclass(frozen=True)
class Boxes:
    """Boxes of a detector, in the order of its file.

    Attributes:
        items: ``image_id``, ``category_id``, ``bbox`` (x, y, width, height) and ``score`` of each.
        sha256: of the file, or of the boxes where there was none.
    """

    items: tuple[dict[str, Any], ...] = field(repr=False)
    sha256: str

    @classmethod
    def load(cls, path: str | Path) -> Boxes:
        """Read a JSON list of detections in COCO's result form; what else they hold is left out.

        Raises:
            DataError: if the file cannot be read, is no such list, or a box is not usable.
        """
        blob = Blob(Path(path))
        content = blob.json()
        if not isinstance(content, list):
            raise DataError(
                "this is no list of detections.",
                where=str(path),
                got=type(content).__name__,
                expected='[{"image_id", "category_id", "bbox": [x, y, w, h], "score"}, ...]',
            )
        return cls(tuple(_items(content, str(path))), hashlib.sha256(blob.read()).hexdigest())

    @classmethod
    def of(cls, items: Iterable[Mapping[str, Any]]) -> Boxes:
        """Boxes that are in memory.

        Raises:
            DataError: if a box is not usable.
        """
        found = tuple(_items(items, None))
        text = json.dumps(found, sort_keys=True).encode()
        return cls(found, hashlib.sha256(text).hexdigest())

    def __len__(self) -> int:
        return len(self.items)

    def facts(self) -> dict[str, Any]:
        """What a result must say of its detector."""
        return {"sha256": self.sha256, "n_boxes": len(self)}

    def ap(self, data: Dataset | Sequence[Sample]) -> float:
        """AP of the boxes themselves, by COCO's rules: what the detector is worth.

        Raises:
            DataError: if there is no object to find.
        """
        truths: list[dict[str, Any]] = []
        images = {}
        for sample in as_dataset(data):
            images[sample.id] = Seen(sample.size)
            for i in sample.instances:
                x0, y0, x1, y1 = i.box
                ids = {"image_id": sample.id, "category_id": i.category, "iscrowd": int(i.crowd)}
                truths.append({**ids, "bbox": [x0, y0, x1 - x0, y1 - y0], "area": i.area})
        if all(truth["iscrowd"] for truth in truths):
            raise DataError("there is no object to find.", expected="one or more")
        found = [
            {**item, "area": item["bbox"][2] * item["bbox"][3], "iscrowd": 0}
            for item in self.items
            if item["image_id"] in images
        ]
        values = score(truths, found, images, (100,), kind="bbox").eval["precision"][..., 0, -1]
        return float(values[values > -1].mean())


@dataclass(frozen=True)
class Detections:
    """Masks for boxes, with the detector's scores and categories; for `average_precision`.

    Attributes:
        data: name of the data and number of images, as a protocol id begins.
        boxes: what was asked with.
        source: how, as in the protocol id.
        results: in COCO's result form: ids, score, and the mask as run lengths; no box, as it
            would change the areas that pycocotools sees.
        skipped: boxes that could not be asked with, and why.
    """

    data: str
    boxes: Boxes = field(repr=False)
    source: str
    results: tuple[dict[str, Any], ...] = field(repr=False)
    skipped: tuple[Skipped, ...] = ()


def detections(
    model: nn.Module,
    data: Dataset | Sequence[Sample],
    boxes: Boxes | str | Path | Iterable[Mapping[str, Any]],
    *,
    choice: BoxChoice = "single",
    refine: bool = False,
    prompt_batch: int = 64,
    workers: int = 0,
    progress: ProgressLike = False,
) -> Detections:
    """One mask for every box of a detector, to be scored by `average_precision`.

    The detector's score and category are kept; masks do not suppress one another.

    Args:
        model: any SAM, on any device.
        data: the images; boxes of other images are left out.
        boxes: a JSON file in COCO's result form, as EfficientViT-SAM, EdgeSAM and TinySAM exchange
            it, or such a list.
        choice: which mask counts: the ``single`` one, of three the ``predicted`` best, or of three
            the one that overlaps the box most (``box-iou``, as EfficientSAM and FastSAM).
        refine: ask again with the box and the first answer, as SAM's paper does.
        prompt_batch: boxes decoded at once, at most.
        workers: threads that read images ahead.
        progress: True for a bar, or a callable that receives events.

    Raises:
        ModelError: if the model is no SAM.
        ConfigError: if the choice is unknown.
        DataError: if the boxes cannot be read, or none is of these images.
        NonFiniteError: if the model gives a score or mask that is not finite.

    Source:
        Segment Anything, arXiv 2304.02643, appendix D.4.

    Example:
        >>> import samcompress as sc
        >>> scenes = sc.shapes(2)
        >>> found = [
        ...     {"image_id": s.id, "category_id": 1, "bbox": [8, 8, 40, 40], "score": 0.9}
        ...     for s in scenes
        ... ]
        >>> detections(sc.build("tiny"), scenes, found).results[0]["segmentation"]["size"]
        [128, 128]
    """
    check_sam(model)
    if choice not in get_args(BoxChoice):
        raise ConfigError("unknown choice.", got=choice, expected=" | ".join(get_args(BoxChoice)))
    data = as_dataset(data)
    boxes = boxes_of(boxes, data)
    by_image: dict[Any, list[dict[str, Any]]] = {sample.id: [] for sample in data}
    for item in boxes.items:
        if item["image_id"] in by_image:
            by_image[item["image_id"]].append(item)
    asker = _Asker(model, choice, refine, prompt_batch)
    track = Progress(progress, "detections").track(
        ahead(data, workers), label="images", total=len(data)
    )
    with evaluating(model):
        for sample in track:
            mine = by_image[sample.id]
            for held, embedding in encoded(model, [sample] if mine else [], asker.skipped):
                asker.add(held, embedding, mine)
    return Detections(
        data=f"{data.name}#{len(data)}",
        boxes=boxes,
        source=f"boxes={boxes.sha256[:12]}/{choice}{'+refined' if refine else ''}",
        results=tuple(asker.results),
        skipped=(*data.skipped, *asker.skipped),
    )


def boxes_of(given: Boxes | str | Path | Iterable[Mapping[str, Any]], data: Dataset) -> Boxes:
    """Boxes as `detections` takes them.

    Raises:
        DataError: if they cannot be read, or none is of these images.
    """
    if isinstance(given, (str, Path)):
        boxes = Boxes.load(given)
    else:
        boxes = given if isinstance(given, Boxes) else Boxes.of(given)
    known = {sample.id for sample in data}
    if not any(item["image_id"] in known for item in boxes.items):
        raise DataError(
            "no box is of these images.", where=data.name, got=f"{len(boxes)} boxes of others"
        )
    return boxes


class _Asker:
    """Collects the masks, image by image."""

    def __init__(self, model: nn.Module, choice: BoxChoice, refine: bool, batch: int) -> None:
        self.model = model
        self.choice: BoxChoice = choice
        self.refine = refine
        self.batch = batch
        self.results: list[dict[str, Any]] = []
        self.skipped: list[Skipped] = []

    def add(self, sample: Sample, embedding: Embedding, items: list[dict[str, Any]]) -> None:
        asked = []
        for item in items:
            x, y, width, height = item["bbox"]
            prompt = Prompt(box=(x, y, x + width, y + height))
            try:
                check_inside(prompt, sample.size, 0)
            except DataError as err:
                self.skipped.append(Skipped(sample.id, f"box {item['bbox']}", reason(err)))
            else:
                asked.append((item, prompt))
        size = group_size(sample.size, 1 if self.choice == "single" else 3, self.batch)
        for start in range(0, len(asked), size):
            self._group(sample, embedding, asked[start : start + size])

    def _group(
        self,
        sample: Sample,
        embedding: Embedding,
        asked: list[tuple[dict[str, Any], Prompt]],
    ) -> None:
        prompts = [prompt for _, prompt in asked]
        names = [f"image {sample.id}, box {item['bbox']}" for item, _ in asked]
        for last in (False, True) if self.refine else (True,):
            found = decode(
                self.model,
                embedding,
                prompts,
                multimask=self.choice != "single",
                prompt_batch=self.batch,
            )
            check_finite(found, names)
            assert found.masks is not None  # full size was asked for
            masks, scores = found.masks.numpy(), found.scores.numpy()
            best = [
                chosen(self.choice, masks[row], scores[row], prompt)
                for row, prompt in enumerate(prompts)
            ]
            if not last:
                prompts = [
                    Prompt(box=prompt.box, mask=found.logits[row, one : one + 1])
                    for row, (prompt, one) in enumerate(zip(prompts, best, strict=True))
                ]
        for row, (item, _) in enumerate(asked):
            kept = {key: item[key] for key in ("image_id", "category_id", "score")}
            self.results.append({**kept, "segmentation": encode_mask(masks[row, best[row]])})


def _items(content: Iterable[Mapping[str, Any]], where: str | None) -> Iterable[dict[str, Any]]:
    for number, item in enumerate(content):
        place = f"{where}: detection {number}" if where else f"detection {number}"
        try:
            box = [float(value) for value in item["bbox"]]
            rating = float(item["score"])
            image, category = item["image_id"], item["category_id"]
        except (KeyError, TypeError, ValueError) as err:
            raise DataError(
                "this is no detection.",
                where=place,
                got=f"{type(err).__name__}: {err}",
                expected="image_id, category_id, bbox [x, y, w, h], score",
            ) from err
        usable = len(box) == 4 and all(map(math.isfinite, (*box, rating)))
        if not usable or box[2] < 0 or box[3] < 0:
            raise DataError(
                "box or score is not usable.",
                where=place,
                got=f"{box}, {rating}",
                expected="x, y, width, height, and a finite score",
            )
        yield {"image_id": image, "category_id": category, "bbox": box, "score": rating}
