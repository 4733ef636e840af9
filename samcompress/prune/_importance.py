"""How much each element of a weight matters; units are ranked by sums of these."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from segment_anything.modeling.image_encoder import Block
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..core.errors import DataError
from ..core.framing import framing_of
from ..core.predict import preprocess

Criterion = Literal["disturbed_taylor", "taylor", "activation", "magnitude", "random"]
WITHOUT_DATA = ("magnitude", "random")
POINTS = 8  # drawn in an image for the sensitivity of a decoder
OBJECTS = 8  # of an image that labels are taken from
Scores = dict[str, Tensor]


def element_scores(
    model: nn.Module,
    names: Sequence[str],
    criterion: Criterion,
    samples: Iterable[Any] = (),
    *,
    seed: int = 0,
    accumulate: Literal["rms", "sum"] = "rms",
) -> Scores:
    """One number for each element of some weights, not negative; higher is to be kept.

    - ``disturbed_taylor``: ``|w| sqrt(sum of squared gradients over the images)``. A model compared
      with itself has loss 0 and gradient 0; disturbing the target by noise e makes the gradient
      that of ``-<e, f(x)>``, up to a factor, and that is differentiated, once an image. f is the
      image embedding for weights of the image encoder, and for those of the mask decoder the
      low-resolution logits of all masks and their scores, at points drawn inside the image.
    - ``taylor``: the same with the gradient of a loss: the cross-entropy of all masks, asked for
      with the box of an annotated object, and the squared error of the IoU they are said to have.
    - ``activation``: ``|w|`` times the norm of the inputs that it is multiplied by (Wanda).
    - ``magnitude``: squared weights.
    - ``random``: uniform numbers.

    Args:
        model: a SAM; a float32 copy is worked on, so nothing of it changes.
        names: of parameters of its image encoder and mask decoder.
        criterion: see above.
        samples: with ``id`` and ``image``, for ``taylor`` with ``instances``; none are read for
            ``magnitude`` and ``random``.
        seed: of noise, points and random scores. What is drawn for an image depends on this and
            the image's id alone, so the order of images does not matter.
        accumulate: ``sum`` adds up the gradients themselves, as SlimSAM does; their signs are
            random, so more images do not make that less noisy.

    Returns:
        For each name a float32 tensor of the parameter's shape.

    Raises:
        DataError: if ``taylor`` finds no annotated object.

    Source:
        Taylor: Molchanov et al. 2019, arXiv 1906.10771; disturbed: SlimSAM, arXiv 2312.05284;
        activation: Wanda, arXiv 2306.11695.
    """
    weights: dict[str, Tensor] = {name: model.get_parameter(name).detach() for name in names}
    if criterion == "magnitude":
        return {name: w.float().square() for name, w in weights.items()}
    if criterion == "random":
        drawn = torch.Generator().manual_seed(seed)
        return {name: torch.rand(w.shape, generator=drawn) for name, w in weights.items()}
    twin = copy.deepcopy(model).float().eval().requires_grad_(False)
    if criterion == "activation":
        return _activation(twin, names, samples, seed)
    total = _gradients(twin, names, samples, criterion, seed, squared=accumulate == "rms")
    if accumulate == "rms":
        total = {name: value.sqrt() for name, value in total.items()}
    return {name: w.float().abs() * total[name].abs() for name, w in weights.items()}


@torch.enable_grad()
def _gradients(
    twin: Any,
    names: Sequence[str],
    samples: Iterable[Any],
    criterion: Criterion,
    seed: int,
    *,
    squared: bool,
) -> Scores:
    """Sums over the images of gradients, or of their squares."""
    inside = {name: twin.get_parameter(name).requires_grad_() for name in names}
    total = {name: torch.zeros_like(w) for name, w in inside.items()}
    encoder = [name for name in names if name.startswith("image_encoder.")]
    decoder = [name for name in names if not name.startswith("image_encoder.")]
    for block in getattr(twin.image_encoder, "blocks", ()):
        # The attention maps of all blocks at once would fill the memory; those of one do not.
        block.forward = partial(
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
        )

    def add(outcome: Tensor, chosen: list[str]) -> None:
        found = torch.autograd.grad(outcome, [inside[n] for n in chosen], allow_unused=True)
        for name, gradient in zip(chosen, found, strict=True):
            if gradient is not None:
                total[name] += gradient.square() if squared else gradient

    labelled = 0
    for sample in samples:
        objects = [o for o in sample.instances if not o.crowd and o.mask.any()][:OBJECTS]
        if criterion == "taylor" and not objects:
            continue
        noise = torch.Generator().manual_seed(_seed(seed, sample.id))
        features = twin.image_encoder(preprocess(twin, sample.image)[0][None])
        if criterion == "taylor":
            labelled += 1
            add(_loss(twin, features, sample.size, objects), [*encoder, *decoder])
            continue
        if encoder:
            add(_disturbed(features, noise), encoder)
        if decoder:
            answers = _at_points(twin, features.detach(), sample.size, noise)
            add(_disturbed(answers[0], noise) + _disturbed(answers[1], noise), decoder)
    if criterion == "taylor" and not labelled:
        raise DataError(
            'criterion="taylor" needs annotated objects.',
            got="images without any",
            expected="data with masks",
            fix='criterion="disturbed_taylor" needs images only',
        )
    return total


def _disturbed(output: Tensor, noise: torch.Generator) -> Tensor:
    disturbance = torch.randn(output.shape, generator=noise).to(output.device)
    return (disturbance * output).sum()


def _loss(twin: Any, features: Tensor, size: tuple[int, int], objects: Sequence[Any]) -> Tensor:
    """How wrong masks and scores of annotated objects are, asked for by their boxes."""
    corners = torch.tensor([o.box for o in objects], dtype=torch.float32).view(-1, 2, 2)
    boxes = corners * _scale(twin, size)
    prompts = twin.prompt_encoder(
        points=None, boxes=boxes.flatten(1).to(features.device), masks=None
    )
    logits, scores = _answers(twin, features, *prompts)
    masks = torch.stack([torch.from_numpy(o.mask) for o in objects])[:, None].float()
    framing = framing_of(twin)
    height, width = framing.inside(size)
    masks = F.interpolate(masks, (height, width), mode="bilinear", antialias=True)
    masks = F.pad(masks, (0, framing.frame - width, 0, framing.frame - height))
    target = F.interpolate(masks, logits.shape[-2:], mode="area").to(logits.device)
    target = target.expand_as(logits)
    found, wanted = logits > 0, target > 0.5
    iou = (found & wanted).sum((2, 3)) / (found | wanted).sum((2, 3)).clamp(min=1)
    return F.binary_cross_entropy_with_logits(logits, target) + F.mse_loss(scores, iou)


def _activation(twin: Any, names: Sequence[str], samples: Iterable[Any], seed: int) -> Scores:
    owners = {name: twin.get_submodule(name.rpartition(".")[0]) for name in names}
    with torch.no_grad(), watching(twin, owners.values()) as squares:
        for sample in samples:
            noise = torch.Generator().manual_seed(_seed(seed, sample.id))
            features = twin.image_encoder(preprocess(twin, sample.image)[0][None])
            if any(not name.startswith("image_encoder.") for name in names):
                _at_points(twin, features, sample.size, noise)
    found = {}
    for name, owner in owners.items():
        norms = squares.get(owner, torch.zeros(owner.weight.shape[1])).sqrt()
        shape = [1, -1] + [1] * (owner.weight.ndim - 2)
        found[name] = owner.weight.detach().abs() * norms.view(shape)
    return found


@contextmanager
def watching(model: Any, layers: Iterable[nn.Module]) -> Iterator[dict[nn.Module, Tensor]]:
    """Sums over tokens and images of the squared inputs of layers, (inputs,) each.

    What pads the windows of an image encoder is left out: it is not zero where heads are joined.
    """
    squares: dict[nn.Module, Tensor] = {}
    inner = {b.attn.proj: b for b in model.modules() if isinstance(b, Block) and b.window_size}
    grid: dict[nn.Module, tuple[int, int]] = {}

    def before_block(block: nn.Module, args: tuple[Tensor, ...]) -> None:
        grid[block] = (args[0].shape[1], args[0].shape[2])

    def before_layer(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].detach().float()
        if layer in inner:
            x = _unpadded(x, inner[layer].window_size, grid[inner[layer]])
        channel = 1 if isinstance(layer, nn.Conv2d) else x.ndim - 1
        found = x.square().sum([axis for axis in range(x.ndim) if axis != channel])
        squares[layer] = squares[layer] + found if layer in squares else found

    handles = [b.register_forward_pre_hook(before_block) for b in inner.values()]
    handles += [layer.register_forward_pre_hook(before_layer) for layer in layers]
    try:
        yield squares
    finally:
        for handle in handles:
            handle.remove()


def _unpadded(x: Tensor, window: int, grid: tuple[int, int]) -> Tensor:
    """(B n, w, w, C) windows to (tokens, C) without those beyond the grid."""
    rows, columns = (-(-side // window) for side in grid)
    y = torch.arange(rows * window) < grid[0]
    x_ = torch.arange(columns * window) < grid[1]
    inside = (y[:, None] & x_[None]).view(rows, window, columns, window).transpose(1, 2)
    inside = inside.reshape(1, rows * columns, window, window).to(x.device)
    split = x.view(-1, rows * columns, window, window, x.shape[-1])
    return split[inside.expand(split.shape[:-1])]


def _seed(seed: int, key: object) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{key}".encode()).digest()[:7], "big")


def _scale(model: Any, size: tuple[int, int]) -> Tensor:
    """(2,) factors of x and y from an image of H, W to the square of the prompts."""
    framing = framing_of(model)
    factor: float = model.prompt_encoder.input_image_size[0] / framing.frame
    return torch.tensor(framing.scale(size), dtype=torch.float32) * factor


def _at_points(
    model: Any, features: Tensor, size: tuple[int, int], noise: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The answers at points drawn in an image of H, W."""
    height, width = size
    points = torch.rand(POINTS, 1, 2, generator=noise) * torch.tensor([width, height])
    points = (points * _scale(model, size)).to(features.device)
    labels = torch.ones(points.shape[:2], device=features.device)
    return _answers(
        model, features, *model.prompt_encoder(points=(points, labels), boxes=None, masks=None)
    )


def _answers(model: Any, features: Tensor, sparse: Tensor, dense: Tensor) -> tuple[Tensor, Tensor]:
    """(P, 4, 4h, 4w) logits and (P, 4) scores: of the single mask, then of the other three."""
    found = [
        model.mask_decoder(
            image_embeddings=features,
            image_pe=model.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=several,
        )
        for several in (False, True)
    ]
    logits, scores = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
    return logits, scores
