"""Both halves of a SAM as files of another runtime, checked against torch."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..core._require import EXTRAS
from ..core.checkpoint import fingerprint
from ..core.contract import device_of, parts
from ..core.errors import BackendError, ModelError
from ..core.files import whole
from ..core.registry import register
from ..core.transform import Context, State, Transform
from ._facades import PADDING, ExportedDecoder, ExportedEncoder, Folder, PackedPrompts
from ._graphs import PromptDecoder, allowed
from .backends import BACKENDS, Options

ENCODER = Options(inputs=("image",), outputs=("image_embeddings",))
DECODER = Options(
    inputs=("image_embeddings", "point_coords", "point_labels", "mask_input", "has_mask_input"),
    outputs=("masks", "iou"),
    dynamic={
        "point_coords": {0: "prompts", 1: "points"},
        "point_labels": {0: "prompts", 1: "points"},
        "mask_input": {0: "prompts"},
    },
)
# Largest difference from torch, over the largest number of torch's output where that is above 1.
TOLERANCE = {"float32": 1e-4}
# What is compared: prompts, points a prompt, box, mask.
COMPARED = ((1, 1, False, False), (5, 3, False, False), (3, 0, True, False), (2, 2, True, True))
SEED = 0


@register
@dataclass(frozen=True, kw_only=True)
class Export(Transform, family="compile", phase=60, terminal=True, extras=("onnx",)):
    """Write image encoder and prompt decoder as files of another runtime, and run from those.

    Use it last, to run where PyTorch is slow or absent. The result is still a `Sam`: predictors,
    the mask generator and `sc.evaluate` work on it. Not for a model that is to be changed or
    trained further: its weights are in the files.

    Args:
        backend: the runtime.
        dtype: what it computes in.

    Raises:
        MissingDependencyError: if the runtime or its exporter is not installed; before any work.
        ModelError: if prompt encoder or mask decoder are not made of segment_anything's parts, as
            EfficientSAM's.
        BackendError: if the runtime cannot express the model, or its results differ from torch's by
            more than the tolerance (1e-4 of the largest number; 1e-2 where tokens are rounded).

    Effect:
        ``encoder.onnx`` (image to embedding; fixed size) and ``prompt_decoder.onnx`` (any number of
        prompts and points, with or without masks), reloaded and compared with torch before it is
        done. ``vit_b`` at 512 px on one thread of an AMD EPYC: encoder 1.42 times as fast as in
        torch, 1.69 times after `Fused`; decoder 1.4 times for one prompt, 2.3 times for 64.

    Composes with:
        Every family before it; nothing after it.

    Source:
        ONNX Runtime, Microsoft, MIT licence, https://onnxruntime.ai; ONNX through `torch.onnx`. The
        split in two graphs and the labels 2 and 3 for boxes are those of segment_anything's own
        ONNX example (Apache-2.0); unlike it, boxes, masks and the choice of masks work as in
        `SamPredictor`, and resizing stays outside the graph.

    Example:
        >>> import samcompress as sc
        >>> sc.attention.Fused() | sc.compile.Export()
        sc.attention.Fused() | sc.compile.Export()
    """

    backend: Literal["onnxruntime"] = "onnxruntime"
    dtype: Literal["float32"] = "float32"

    def check(self, model: nn.Module) -> None:
        """Look for the parts that the graphs are made of."""
        _, prompt_encoder, mask_decoder = parts(model)
        wanted = {
            "prompt_encoder": (
                "pe_layer",
                "point_embeddings",
                "not_a_point_embed",
                "no_mask_embed",
            ),
            "mask_decoder": ("predict_masks",),
        }
        absent = [
            f"{part}.{name}"
            for part, names in wanted.items()
            for name in names
            if not hasattr(getattr(model, part), name)
        ]
        if absent:
            raise ModelError(
                "compile.export cannot make a graph of this prompt encoder and mask decoder.",
                where=", ".join(absent),
                got=f"{type(prompt_encoder).__name__}, {type(mask_decoder).__name__}",
                expected="those of segment_anything",
                fix="run this model in torch; of published models only EfficientSAM is such a one",
            )

    def apply(self, model: Any, ctx: Context) -> State:
        """Export both halves, compare them with torch, put facades in place of the parts."""
        device = device_of(model)
        eager = parts(model)
        for part in eager:
            part.to("cpu", getattr(torch, self.dtype)).eval()
        temporary, base = None, ctx.workdir
        if base is None:
            base = Path(tempfile.mkdtemp(prefix="samcompress-"))
            temporary = Folder(base)
        # Named by content, so that no other model's files are ever replaced.
        content = hashlib.sha256(f"{fingerprint(model)}{model}{self!r}".encode()).hexdigest()
        home = base / "exported" / f"{self.backend}-{content[:12]}"
        with torch.no_grad(), whole(home) as folder:
            folder.mkdir(parents=True)
            state = self._sizes(eager)
            state["files"] = self._write(eager, folder, ctx)
            self.rebuild(model, state)
            _bind(model, folder)
            state.update(self._compare(eager, parts(model)))
        _bind(model, home, temporary)
        model.prompt_encoder.to(device)
        return state

    def rebuild(self, model: Any, state: State) -> State:
        """Put facades in place of the parts; the files are bound afterwards."""
        model.prompt_encoder = PackedPrompts(
            model.prompt_encoder.pe_layer,
            state["channels"],
            tuple(state["grid"]),
            tuple(state["frame"]),
            state.get("padding", PADDING),
        )
        files = state["files"]
        model.image_encoder = ExportedEncoder(
            state["backend"], files["encoder"], state["image_size"]
        )
        model.mask_decoder = ExportedDecoder(
            state["backend"], files["prompt_decoder"], state.get("features", 0)
        )
        return state

    def _sizes(self, eager: Any) -> State:
        encoder, prompts, decoder = eager
        return {
            "backend": self.backend,
            "dtype": self.dtype,
            "versions": {name: version(name) for name in EXTRAS[BACKENDS[self.backend].extra]},
            "image_size": encoder.img_size,
            "channels": prompts.embed_dim,
            "grid": list(prompts.image_embedding_size),
            "frame": list(prompts.input_image_size),
            "features": getattr(decoder, "features", 0),
            "padding": _padding(prompts),
        }

    def _write(self, eager: Any, folder: Path, ctx: Context) -> dict[str, list[str]]:
        encoder, prompts, decoder = eager
        side, (h, w) = encoder.img_size, prompts.image_embedding_size
        halves = {
            "encoder": (encoder, (torch.zeros(1, 3, side, side),), ENCODER),
            "prompt_decoder": (
                PromptDecoder(prompts, decoder).eval(),
                # Two prompts of three points: sizes of 1 would be taken as fixed.
                (
                    torch.zeros(1, prompts.embed_dim + getattr(decoder, "features", 0), h, w),
                    torch.zeros(2, 3, 2),
                    torch.ones(2, 3),
                    torch.zeros(2, 1, 4 * h, 4 * w),
                    torch.zeros(1),
                ),
                DECODER,
            ),
        }
        backend = BACKENDS[self.backend]
        written = {}
        for name, (module, example, options) in ctx.progress.track(
            halves.items(), label="graphs", total=len(halves)
        ):
            path = folder / f"{name}{backend.suffix}"
            files = backend.export(module, example, path, dtype=self.dtype, options=options)
            written[name] = [file.name for file in files]
        return written

    def _compare(self, eager: Any, exported: Any) -> dict[str, Any]:
        """Largest differences from torch, and a few numbers of torch's outputs to check against."""
        tolerance = allowed(eager, TOLERANCE[self.dtype])
        errors: dict[str, float] = {}
        reference: dict[str, Any] = {"seed": SEED}
        for name, expected, found in _outputs(eager, exported):
            difference = _difference(found, expected)
            # A NaN is not below any tolerance.
            if not difference <= tolerance:
                raise BackendError(
                    f"{self.backend} gives another {name} than torch.",
                    where="comparison after export",
                    got=f"a difference of {difference:.3g}",
                    expected=f"at most {tolerance:g}, relative to the largest number",
                    fix="check that torch's own outputs are finite; report this with the versions",
                )
            kind = name.split(" of ")[0]
            errors[kind] = max(errors.get(kind, 0.0), difference)
            reference[name] = [float(expected.mean()), float(expected.std(correction=0))]
        return {"tolerance": tolerance, "errors": errors, "reference": reference}


def _padding(prompt_encoder: Any) -> list[int]:
    """How many points of no meaning the encoder adds: to nothing, points, a box, and both."""
    device = device_of(prompt_encoder)
    points = torch.zeros(1, 1, 2, device=device), torch.ones(1, 1, device=device)
    box = torch.zeros(1, 4, device=device)
    asked = ((None, None, 0), (points, None, 1), (None, box, 2), (points, box, 3))
    return [
        prompt_encoder(points=p, boxes=b, masks=None)[0].shape[1] - count for p, b, count in asked
    ]


def _bind(model: Any, folder: Path, keep: Folder | None = None) -> None:
    model.image_encoder.bind(folder, keep)
    model.mask_decoder.bind(folder, keep)


def _outputs(eager: Any, exported: Any) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, torch's tensor and the runtime's, for seeded inputs."""
    generator = torch.Generator().manual_seed(SEED)
    side, (h, w) = eager.image_encoder.img_size, eager.prompt_encoder.mask_input_size
    image = torch.randn(1, 3, side, side, generator=generator)
    embedding = eager.image_encoder(image)
    yield "embedding", embedding, exported.image_encoder(image)
    for prompts, n, box, mask in COMPARED:
        points = boxes = masks = None
        if n:
            labels = torch.randint(0, 2, (prompts, n), generator=generator)
            points = side * torch.rand(prompts, n, 2, generator=generator), labels
        if box:
            boxes = side * torch.rand(prompts, 4, generator=generator)
        if mask:
            masks = 8 * torch.randn(prompts, 1, h, w, generator=generator)
        results = []
        for _, prompt_encoder, decoder in (eager, exported):
            sparse, dense = prompt_encoder(points=points, boxes=boxes, masks=masks)
            both = [
                decoder(
                    image_embeddings=embedding,
                    image_pe=prompt_encoder.get_dense_pe(),
                    sparse_prompt_embeddings=sparse,
                    dense_prompt_embeddings=dense,
                    multimask_output=multimask,
                )
                for multimask in (False, True)
            ]
            results.append([torch.cat(pair, 1) for pair in zip(*both, strict=True)])
        asked = f"{prompts} x {n} points{', box' * box}{', mask' * mask}"
        for kind, expected, found in zip(("logits", "scores"), *results, strict=True):
            yield f"{kind} of {asked}", expected, found


def _difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1))
