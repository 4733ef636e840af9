"""From images and prompts to masks, for batches of images and ragged prompts.

Gives what `segment_anything.SamPredictor` gives for one image and one prompt at a time. Prompts of
one image are decoded together where they have the same number of points and the same kinds: padding
points would be tokens that the others attend to, and so would change the masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .contract import cast, device_of, dtype_of, parts
from .errors import DataError, ModelError, ShapeError
from .framing import Framing, framing_of
from .prompt import Prompt, check_inside


@dataclass(frozen=True)
class Embedding:
    """One encoded image.

    Attributes:
        features: (1, C, h, w).
        input_size: height and width of the image inside the model's frame; the rest is padding.
        size: height H and width W of the original image.
    """

    features: Tensor
    input_size: tuple[int, int]
    size: tuple[int, int]


@dataclass(frozen=True)
class Prediction:
    """Masks of one image.

    Attributes:
        masks: (P, M, H, W) bool on the CPU; None if full-size masks were not asked for.
        scores: (P, M) float32, the model's own estimate of each mask's IoU.
        logits: (P, M, 4h, 4w) float32, low resolution, in the padded frame.
    """

    masks: Tensor | None
    scores: Tensor
    logits: Tensor

    def __len__(self) -> int:
        return len(self.scores)


def preprocess(
    model: nn.Module, image: np.ndarray, framing: Framing | None = None
) -> tuple[Tensor, tuple[int, int]]:
    """Resize an image by the model's rule, normalise it, pad it to a square.

    Args:
        model: the SAM; its rule (`framing_of`), mean and deviation are used.
        image: (H, W, 3) uint8 RGB.
        framing: another rule than the model's own, of the same S.

    Returns:
        (3, S, S) on the model's device and in its type, and the size inside the frame.

    Raises:
        ShapeError: if the image is not (H, W, 3).
        DataError: if it is not uint8.
    """
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ShapeError(
            "an image has the wrong shape.",
            got=image.shape,
            expected="(H, W, 3)",
            fix='np.asarray(PIL.Image.open(path).convert("RGB"))',
        )
    if image.dtype != np.uint8:
        raise DataError(
            "an image has the wrong type.",
            got=image.dtype,
            expected="uint8, 0 to 255",
            fix="scale it to 0...255 and use .astype(np.uint8)",
        )
    sam: Any = model
    framing = framing or framing_of(model)
    inside = framing.inside((image.shape[0], image.shape[1]))
    if min(inside) == 0:
        raise ShapeError(
            "an image is too narrow for this model.",
            got=image.shape,
            expected=f"at most {2 * framing.frame} times as long as wide",
        )
    resized = framing.resized(image).to(device_of(model))
    ready = (resized - sam.pixel_mean) / sam.pixel_std
    height, width = ready.shape[-2:]
    padded = F.pad(ready, (0, framing.size - width, 0, framing.size - height))
    return padded.to(dtype_of(sam.image_encoder)), inside


def encode(
    model: nn.Module, images: Iterable[np.ndarray], *, batch_size: int = 1
) -> list[Embedding]:
    """Encode images of any sizes.

    Args:
        model: a SAM; left in the mode it is in, used without gradients.
        images: (H, W, 3) uint8 RGB arrays.
        batch_size: images in one call of the encoder.

    Returns:
        One `Embedding` an image, in order.
    """
    image_encoder = parts(model).image_encoder
    found: list[Embedding] = []
    images = list(images)
    with torch.inference_mode():
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            ready = [preprocess(model, image) for image in batch]
            features = image_encoder(torch.stack([tensor for tensor, _ in ready]))
            found += [
                Embedding(features[i : i + 1], ready[i][1], tuple(np.shape(image)[:2]))
                for i, image in enumerate(batch)
            ]
    return found


def decode(
    model: nn.Module,
    embedding: Embedding,
    prompts: Sequence[Prompt],
    *,
    multimask: bool = False,
    prompt_batch: int = 64,
    full_size: bool = True,
) -> Prediction:
    """Masks for prompts on one encoded image.

    Args:
        model: the SAM that made the embedding.
        embedding: from `encode`.
        prompts: P prompts; they may differ in points and kinds.
        multimask: give the three masks of an ambiguous prompt instead of the single one.
        prompt_batch: prompts decoded in one call.
        full_size: also make the masks at the original size.

    Returns:
        M is 3 with `multimask`, 1 without; an empty list of prompts gives P = 0.

    Raises:
        ShapeError: if a mask prompt is not (1, 4h, 4w).
        DataError: if a box or point lies entirely outside the image.
        ModelError: if the prompt encoder is not in float32.
    """
    prompt_encoder: Any = parts(model).prompt_encoder
    if dtype_of(prompt_encoder) != torch.float32:
        raise ModelError(
            "segment_anything's prompt encoder computes in float32 only.",
            where="prompt_encoder",
            got=dtype_of(prompt_encoder),
            fix="cast sam.image_encoder and sam.mask_decoder, and leave sam.prompt_encoder",
        )
    for index, prompt in enumerate(prompts):
        check_inside(prompt, embedding.size, index)
    groups: dict[tuple[int, bool, bool], list[int]] = {}
    for index, prompt in enumerate(prompts):
        groups.setdefault(prompt.kind, []).append(index)
    logits: list[Tensor] = [torch.empty(0)] * len(prompts)
    scores, masks = list(logits), list(logits)
    with torch.inference_mode():
        for members in groups.values():
            for start in range(0, len(members), prompt_batch):
                chunk = members[start : start + prompt_batch]
                low, score = _run(model, embedding, [prompts[i] for i in chunk], multimask)
                full = _full_size(model, low, embedding) if full_size else low
                for row, index in enumerate(chunk):
                    logits[index], scores[index] = low[row].float().cpu(), score[row].float().cpu()
                    masks[index] = full[row]
    if not prompts:
        h, w = prompt_encoder.mask_input_size
        count = 3 if multimask else 1
        none = torch.zeros(0, count)
        full = torch.zeros(0, count, *embedding.size, dtype=torch.bool)
        return Prediction(full if full_size else None, none, torch.zeros(0, count, h, w))
    return Prediction(
        torch.stack(masks) if full_size else None, torch.stack(scores), torch.stack(logits)
    )


def predict(
    model: nn.Module,
    images: Iterable[np.ndarray],
    prompts: Sequence[Sequence[Prompt]],
    *,
    multimask: bool = False,
    batch_size: int = 1,
    prompt_batch: int = 64,
) -> list[Prediction]:
    """Masks for several images with several prompts each.

    Args:
        model: any SAM.
        images: B arrays (H, W, 3), uint8 RGB, of any sizes.
        prompts: for each image a list of prompts; lengths and kinds may differ.
        multimask: three masks a prompt instead of one.
        batch_size: images encoded in one call.
        prompt_batch: prompts decoded in one call.

    Returns:
        One `Prediction` an image.

    Raises:
        DataError: if the numbers of images and of prompt lists differ.

    Example:
        >>> import samcompress as sc
        >>> scene = sc.shapes(1)[0]
        >>> found = sc.predict(sc.build("tiny"), [scene.image], [[sc.Prompt(points=[[9, 9]])]])
        >>> found[0].masks.shape[:2]
        torch.Size([1, 1])
    """
    images = list(images)
    if len(images) != len(prompts):
        raise DataError(
            "images and lists of prompts differ in number.",
            got=f"{len(images)} images, {len(prompts)} lists",
            expected="one list of prompts for each image",
        )
    found: list[Prediction] = []
    for start in range(0, len(images), batch_size):
        part = slice(start, start + batch_size)
        embeddings = encode(model, images[part], batch_size=batch_size)
        found += [
            decode(model, embedding, asked, multimask=multimask, prompt_batch=prompt_batch)
            for embedding, asked in zip(embeddings, prompts[part], strict=True)
        ]
    return found


def _run(
    model: Any, embedding: Embedding, prompts: list[Prompt], multimask: bool
) -> tuple[Tensor, Tensor]:
    device = embedding.features.device
    place = _placing(model, embedding)
    n, has_box, has_mask = prompts[0].kind

    def tensor(arrays: list[np.ndarray]) -> Tensor:
        return torch.as_tensor(np.stack(arrays), dtype=torch.float32, device=device)

    points = boxes = masks = None
    if n:
        points = (
            tensor([place(p.points) for p in prompts]),
            tensor([p.labels for p in prompts]),
        )
    if has_box:
        boxes = tensor([place(p.box.reshape(2, 2)).ravel() for p in prompts])
    if has_mask:
        masks = tensor([p.mask for p in prompts])
        size = model.prompt_encoder.mask_input_size
        if tuple(masks.shape[-2:]) != tuple(size):
            raise ShapeError(
                "a mask prompt has the wrong shape.",
                got=tuple(masks.shape[1:]),
                expected=(1, *size),
                fix="pass low-resolution logits, as Prediction.logits[p, m:m+1]",
            )
    sparse, dense = model.prompt_encoder(points=points, boxes=boxes, masks=masks)
    decoder_type = dtype_of(model.mask_decoder)
    logits, scores = model.mask_decoder(
        image_embeddings=embedding.features.to(decoder_type),
        image_pe=model.prompt_encoder.get_dense_pe().to(decoder_type),
        sparse_prompt_embeddings=sparse.to(decoder_type),
        dense_prompt_embeddings=cast(dense, decoder_type),
        multimask_output=multimask,
    )
    return logits, scores


def _placing(model: Any, embedding: Embedding) -> Callable[[np.ndarray], np.ndarray]:
    """From x, y of the image to what the prompt encoder takes."""
    framing = framing_of(model)
    scale = np.array(framing.scale(embedding.size))
    ratio = model.prompt_encoder.input_image_size[0] / framing.frame

    def place(points: np.ndarray) -> np.ndarray:
        framed = points.astype(np.float64) * scale
        # Pixel centres are whole numbers in either square.
        shifted: np.ndarray = (framed + 0.5) * ratio - 0.5
        return framed if ratio == 1 else shifted

    return place


def _full_size(model: Any, low: Tensor, embedding: Embedding) -> Tensor:
    full = framing_of(model).full_size(low.float(), embedding.size)
    return (full > float(model.mask_threshold)).cpu()
