"""Both halves of a SAM as files of another runtime, checked against torch."""

from __future__ import annotations

import hashlib
import itertools
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Literal, overload

import torch
from torch import nn

from ..core.checkpoint import fingerprint
from ..core.contract import device_of, parts
from ..core.errors import ConfigError, DataError, ModelError, SamCompressError, closest
from ..core.files import sha256, whole
from ..core.framing import framing_of
from ..core.predict import preprocess
from ..core.registry import register
from ..core.transform import Context, State, Transform
from ._compare import TOLERANCE, compare
from ._facades import ExportedDecoder, ExportedEncoder, Folder, PackedPrompts
from ._graphs import DECODER, ENCODER, Buckets, Graph, allowed, graphs, rounding
from ._manifest import MANIFEST, REFERENCE, Drawn, write_manifest, write_reference
from .backends import BACKENDS, Backend, Sample

# What the graph of the prompt decoder is made of.
WANTED = {
    "prompt_encoder": ("pe_layer", "point_embeddings", "not_a_point_embed", "no_mask_embed"),
    "mask_decoder": ("predict_masks",),
}


NAMED = (extra for row in BACKENDS.values() for extra in (row.extra, row.calibrators_extra))
EXTRAS = tuple(dict.fromkeys(extra for extra in NAMED if extra))


@register
@dataclass(frozen=True, kw_only=True)
class Export(Transform, family="compile", phase=60, terminal=True, extras=EXTRAS):
    """Write image encoder and prompt decoder as files of another runtime, and run from those.

    Use it last, to run where PyTorch is slow or absent. The result is still a `Sam`: predictors,
    the mask generator and `sc.evaluate` work on it. Not for a model that is to be changed or
    trained further: its weights are in the files.

    Args:
        backend: the runtime: "onnxruntime"; "openvino", the fastest on x86; "aot", torch's own
            compiler ahead of time, which needs no package but for "int8".
        precision: what the image encoder computes in. "int8" multiplies integers in its products
            and, with "openvino" and "aot", computes the rest in bfloat16 where the processor can.
        decoder: what the prompt decoder computes in; less than floats costs masks.
        images: calibration images, the first of the data, where the runtime asks for them:
            "openvino" and "aot" in int8.
        prompts: for runtimes of fixed sizes only: prompts at a time. There is a decoder for each of
            these numbers with each of `points`; more prompts are cut, fewer filled up.
        points: likewise, points of a prompt. A click takes two, with its padding; a box two. Fewer
            are filled up with points of no meaning, which changes masks a little; more are refused.

    Raises:
        ConfigError: if there is no such runtime, it does not compute in that, or a number is out of
            range.
        MissingDependencyError: if the runtime or its exporter is not installed; before any work.
        DataError: if images are needed and none are given.
        ModelError: if prompt encoder or mask decoder are not made of segment_anything's parts, as
            EfficientSAM's; if layers multiply integers already and the runtime does not take them,
            or int8 is asked for.
        BackendError: if there is no compiler or no bfloat16 here; if the runtime cannot express the
            model; if its results differ from torch's by more than the tolerance: 1e-4 of the
            largest number in float32 (1e-2 where layers round tokens), 0.02 of the whole in
            float16, 0.05 in bfloat16, 0.2 in int8.

    Effect:
        A file of the encoder (image to embedding; fixed size) and of the prompt decoder (any number
        of prompts and points, with or without masks), a manifest and reference outputs; reloaded
        and compared with torch before it is done. ``vit_b`` at 512 px on one thread of an AMD EPYC,
        "onnxruntime": encoder 1.42 times as fast as in torch, 1.69 times after `Fused`; decoder 1.4
        times for one prompt, 2.3 times for 64. Other runtimes and types: the card.

    Composes with:
        Every family before it; nothing after it. "openvino" and "aot" not after layers that
        multiply integers, such as `Int8Dynamic`.

    Source:
        ONNX Runtime, Microsoft, MIT licence, https://onnxruntime.ai; ONNX through `torch.onnx`.
        OpenVINO, NNCF and neural-compressor, Intel, Apache-2.0. AOTInductor, PyTorch. The split in
        two graphs and the labels 2 and 3 for boxes are those of segment_anything's own ONNX example
        (Apache-2.0); unlike it, boxes, masks and the choice of masks work as in `SamPredictor`, and
        resizing stays outside the graph.

    Example:
        >>> import samcompress as sc
        >>> sc.attention.Fused() | sc.compile.Export(backend="openvino", precision="bfloat16")
        sc.attention.Fused() | sc.compile.Export(backend='openvino', precision='bfloat16')
    """

    version: ClassVar[int] = 2

    backend: str = "onnxruntime"
    precision: Literal["float32", "float16", "bfloat16", "int8"] = "float32"
    decoder: Literal["float32", "float16", "bfloat16"] = "float32"
    images: int = 32
    prompts: tuple[int, ...] = (1, 16)
    points: tuple[int, ...] = (2, 5)

    @classmethod
    def upgrade(cls, params: dict[str, Any], version: int) -> dict[str, Any]:
        """In version 1 `precision` was called `dtype`."""
        return {"precision" if name == "dtype" else name: value for name, value in params.items()}

    @classmethod
    def readiness(cls) -> dict[str, SamCompressError | None]:
        """Runtimes it writes for."""
        return {f"runtime {name}": row.hindrance() for name, row in BACKENDS.items()}

    @property
    def needs_data(self) -> bool:
        """Whether ranges are found on images."""
        return self.precision in self.runtime.calibrated

    @property
    def runtime(self) -> Backend:
        """The row of the support table."""
        return BACKENDS[self.backend]

    def validate(self) -> None:
        """Check that there is the runtime, and that it has the types."""
        if self.backend not in BACKENDS:
            raise ConfigError(
                f"{self.label}: there is no such backend.",
                got=repr(self.backend),
                expected=" | ".join(BACKENDS),
                fix=closest(self.backend, BACKENDS),
            )
        runtime = self.runtime
        for name in ("precision", "decoder"):
            if getattr(self, name) not in runtime.dtypes:
                raise ConfigError(
                    f"{self.label}: {self.backend} does not compute in this {name}.",
                    got=getattr(self, name),
                    expected=" | ".join(runtime.dtypes),
                    fix="; ".join(f"{b.name}: {', '.join(b.dtypes)}" for b in BACKENDS.values()),
                )
        if self.images < 1:
            raise ConfigError(
                f"{self.label}: images is out of range.", got=self.images, expected="at least 1"
            )
        for name in ("prompts", "points"):
            sizes = getattr(self, name)
            if not sizes or sizes[0] < 1 or sorted(set(sizes)) != list(sizes):
                raise ConfigError(
                    f"{self.label}: {name} is out of range.",
                    got=sizes,
                    expected="rising numbers, the first at least 1",
                )
        # Others are imported by themselves, in `check`: how matters to one of them.
        object.__setattr__(self, "extras", ("onnx",) if self.backend == "onnxruntime" else ())

    def check(self, model: nn.Module) -> None:
        """Look for the runtime, and for the parts that the graphs are made of."""
        for precision in {self.precision, self.decoder}:
            self.runtime.ready(precision)
        _check_parts(model)
        whole_numbers = rounding(parts(model))
        if whole_numbers and not (self.runtime.integers and self.precision != "int8"):
            raise ModelError(
                f"{self.label} finds layers that multiply integers already.",
                where=whole_numbers,
                got=f"backend={self.backend!r}, precision={self.precision!r}",
                expected="a model of floating point, or backend='onnxruntime' and its floats",
                fix="export the model from before that step, with precision='int8'",
            )

    def apply(self, model: Any, ctx: Context) -> State:
        """Export both halves, compare them with torch, put facades in place of the parts."""
        device = device_of(model)
        model.cpu()
        eager = parts(model)
        for part in eager:
            part.float().eval()
        temporary, base = None, ctx.workdir
        if base is None:
            base = Path(tempfile.mkdtemp(prefix="samcompress-"))
            temporary = Folder(base)
        # Named by content, so that no other model's files are ever replaced.
        content = hashlib.sha256(f"{fingerprint(model)}{model}{self!r}".encode()).hexdigest()
        home = base / "exported" / f"{self.backend}-{content[:12]}"
        drawn = Drawn(model)
        seen = Images(model, ctx, self.images) if self.needs_data else None
        with torch.no_grad(), whole(home) as folder:
            folder.mkdir(parents=True)
            cut = graphs(eager, self._buckets())
            state = self._sizes(eager) | self._write(cut, folder, ctx, seen or ())
            framing = framing_of(model)
            state["framing"] = {"rule": type(framing).__name__, "frame": framing.frame}
            self.rebuild(model, state)
            _bind(model, folder)
            state |= self._checked(model, eager, cut[1], folder, drawn, seen)
            write_manifest(folder, model, state, cut)
        _bind(model, home, temporary)
        model.to(device)
        return state

    def rebuild(self, model: Any, state: State) -> State:
        """Put facades in place of the parts; the files are bound afterwards."""
        model.prompt_encoder = PackedPrompts(
            model.prompt_encoder.pe_layer,
            state["channels"],
            tuple(state["grid"]),
            tuple(state["frame"]),
            state["padding"],
        )
        files, hashes, sizes = state["files"], state["sha256"], state["sizes"]
        model.image_encoder = ExportedEncoder(
            state["backend"], files[ENCODER], state["image_size"], hashes=hashes
        )
        model.mask_decoder = ExportedDecoder(
            state["backend"],
            # These two are of both halves; one must bring them along when the model is saved.
            [*files[DECODER], MANIFEST, REFERENCE],
            state["features"],
            sizes=Buckets(**{name: tuple(n) for name, n in sizes.items()}) if sizes else None,
            hashes=hashes,
        )
        return state

    def _checked(
        self,
        model: Any,
        eager: Any,
        decoder: Graph,
        folder: Path,
        drawn: Drawn,
        seen: Images | None,
    ) -> State:
        """Compare the files with torch, if they can be run here, and keep torch's answers."""
        exported = parts(model)
        bounds = [(kind, self._allowed(eager, kind)) for kind in (self.precision, self.decoder)]
        state: State = {
            "unchecked": self.runtime.unrunnable(),
            "tolerance": max(bound for _, bound in bounds),
            "errors": {},
            "granted": {},
        }
        expected, found = eager.image_encoder(drawn.image), None
        if state["unchecked"] is None:
            found = model.image_encoder(drawn.image)
            pair = expected, found
            if seen:  # integers are for images like those seen before
                pair = eager.image_encoder(seen[0][0]), model.image_encoder(seen[0][0])
            state["errors"] = compare(
                eager, exported, pair, backend=self.backend, encoder=bounds[0], decoder=bounds[1]
            )
            state["granted"] = {
                ENCODER: dict(model.image_encoder.graph(ENCODER).granted),
                DECODER: dict(model.mask_decoder.graph(decoder.stem).granted),
            }
        state["reference"] = write_reference(
            folder / REFERENCE, drawn, (expected, found), exported, decoder
        )
        return state

    def _allowed(self, eager: Any, kind: str) -> float:
        return allowed(eager, self.runtime.tolerance.get(kind, TOLERANCE[kind]))

    def _buckets(self) -> Buckets | None:
        return None if self.runtime.dynamic_shapes else Buckets(self.prompts, self.points)

    def _sizes(self, eager: Any) -> State:
        encoder, prompts, decoder = eager
        sizes = self._buckets()
        used = ("torch", *self.runtime.packages, *self.runtime.calibrators * self.needs_data)
        return {
            "backend": self.backend,
            "precision": self.precision,
            "decoder": self.decoder,
            "versions": {name: version(name) for name in used},
            "image_size": encoder.img_size,
            "channels": prompts.embed_dim,
            "grid": list(prompts.image_embedding_size),
            "frame": list(prompts.input_image_size),
            "features": getattr(decoder, "features", 0),
            "padding": _padding(prompts),
            "sizes": {"prompts": list(sizes.prompts), "points": list(sizes.points)}
            if sizes
            else None,
        }

    def _write(
        self, cut: list[Graph], folder: Path, ctx: Context, samples: Sequence[Sample]
    ) -> State:
        files: dict[str, list[str]] = {ENCODER: [], DECODER: []}
        for graph in ctx.progress.track(cut, label="graphs", total=len(cut)):
            half = ENCODER if graph.stem == ENCODER else DECODER
            written = self.runtime.export(
                graph.module,
                graph.example,
                folder / f"{graph.stem}{self.runtime.suffix}",
                dtype=self.precision if half == ENCODER else self.decoder,
                options=graph.options,
                samples=samples if half == ENCODER else (),
            )
            files[half] += [file.relative_to(folder).as_posix() for file in written]
        hashes = {name: sha256(folder / name) for half in files.values() for name in half}
        return {"files": files, "sha256": hashes}


class Images(Sequence[Sample]):
    """Images as the image encoder takes them, made when they are asked for.

    Args:
        model: whose framing they get.
        ctx: the data.
        count: at most so many, the first that can be read.
    """

    def __init__(self, model: nn.Module, ctx: Context, count: int) -> None:
        self.model = model
        self.samples = list(itertools.islice(ctx.data.readable(), count))
        if not self.samples:
            raise DataError(
                f"{ctx.step} finds no image that can be read.",
                where=ctx.data.name,
                got=f"{len(ctx.data)} samples",
                expected="at least 1",
            )

    def __len__(self) -> int:
        return len(self.samples)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        """(1, 3, S, S) float32."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        image, _ = preprocess(self.model, self.samples[index].image)
        return (image[None].float().cpu(),)


def _check_parts(model: nn.Module) -> None:
    _, prompt_encoder, mask_decoder = parts(model)
    absent = [
        f"{part}.{name}"
        for part, names in WANTED.items()
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
