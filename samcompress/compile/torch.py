"""Image encoder and mask decoder through torch's own compiler, with sizes that never change."""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core._shapes import expect
from ..core.contract import device_of, parts
from ..core.errors import BackendError, ConfigError, ModelError
from ..core.registry import register
from ..core.sizes import tensor_bytes
from ..core.transform import Context, State, Transform
from .backends._compiler import check_compiler

# Prompts are filled up to powers of this, so that few sizes are ever compiled.
STEP = 4
# Graphs of one part: sizes times numbers of points times kinds of prompts. Torch stops at 8.
GRAPHS = 128
DEVICES = ("cpu", "cuda")
CONTAINERS = (nn.ModuleList, nn.ModuleDict)  # never called themselves


@register
@dataclass(frozen=True, kw_only=True)
class Torch(Transform, family="compile", phase=60, terminal=True):
    """Compile image encoder and mask decoder with `torch.compile` and fixed sizes.

    Use it last, where the model must stay in PyTorch. A server that answers many calls gets back
    the minutes that the first ones take; a script that segments one image does not. On x86 `Export`
    to OpenVINO is faster and starts sooner.

    Args:
        images: images that the encoder takes at a time; a shorter batch is filled up, a longer one
            cut.
        prompts: the same for the decoder, which also takes 1, 4, 16, ... of them, below this.
        decoder: also the mask decoder; without it only the image encoder.
        tune: try kernels and keep the fastest (``max-autotune``): several times the minutes.
        freeze: pack the weights for the processor. Each block is then compiled by itself, the
            weights take their memory twice, and changes to them have no effect any more.

    Raises:
        ConfigError: if `images` or `prompts` is below 1.
        ModelError: if the model is on a device that torch does not compile for.
        BackendError: if there is no compiler; at the first call, if the compiler fails.

    Effect:
        Nothing is done before the first call of each size, which compiles: tens of seconds to
        minutes each, again in every process; their sum is `compile_s` of the part. On a CPU the
        encoder's blocks are compiled, those of one kind once for all; on a GPU the whole
        encoder, into one CUDA graph, which no test here has run. Outputs change by rounding only.
        Weights stay as they are, and the saved files too. No gradient passes.

    Composes with:
        Every family before it; nothing after it. `BFloat16` before it is the other half of the
        speed.

    Source:
        PyTorch team: Accelerating Generative AI with PyTorch: Segment Anything, Fast, 2023
        (Apache-2.0), https://pytorch.org/blog/accelerating-generative-ai; its fixed sizes, batches
        of prompts, CUDA graphs and bfloat16. Own code.

    Example:
        >>> import samcompress as sc
        >>> sc.attention.Fused() | sc.quantize.BFloat16() | sc.compile.Torch(prompts=256)
        sc.attention.Fused() | sc.quantize.BFloat16() | sc.compile.Torch(prompts=256)
    """

    images: int = 1
    prompts: int = 64
    decoder: bool = True
    tune: bool = False
    freeze: bool = False

    def validate(self) -> None:
        """Check the sizes."""
        for name in ("images", "prompts"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"{self.label}: {name} is out of range.",
                    got=getattr(self, name),
                    expected="at least 1",
                )

    def check(self, model: nn.Module) -> None:
        """Look for a compiler."""
        kind = device_of(model).type
        if kind not in DEVICES:
            raise ModelError(
                f"{self.label} does not compile for this device.",
                got=kind,
                expected=" or ".join(DEVICES),
                fix="leave this step out",
            )
        check_compiler(self.label, kind)

    def apply(self, model: nn.Module, ctx: Context) -> State:
        """Put doors on the parts; they compile when they are first called."""
        state = {name: getattr(self, name) for name in ("images", "prompts", "tune", "freeze")}
        names = ["image_encoder", *(["mask_decoder"] if self.decoder else [])]
        return self.rebuild(model, {**state, "parts": names})

    def rebuild(self, model: nn.Module, state: State) -> State:
        """Put doors on the parts."""
        for name in state["parts"]:
            part: Any = getattr(parts(model), name)
            part.__class__ = _compiled(type(part), DOORS[name])  # type: ignore[arg-type]
            part.at_a_time = state["images" if name == "image_encoder" else "prompts"]
            part.tune, part.freeze = state["tune"], state["freeze"]
            part.forget()
        return state


class Doors(nn.Module):
    """Calls what a part computes through the compiler.

    Attributes:
        at_a_time: the largest size that is compiled.
        tune: whether to try kernels.
        freeze: whether to pack weights.
        graph: the compiled function; None before the first call, and in copies.
        seen: the sizes that were called.
        compile_s: seconds that the first calls of all sizes took.
    """

    at_a_time: int
    tune: bool
    freeze: bool
    by_blocks = False

    def forget(self) -> None:
        """As before the first call."""
        self.graph: Callable[..., Any] | None = None
        self.seen: set[Any] = set()
        self.compile_s = 0.0

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """What the part computes.

        Raises:
            BackendError: if it cannot be compiled.
        """
        from torch._dynamo import config
        from torch._dynamo.exc import TorchDynamoException
        from torch._inductor import config as inductor

        start, given = time.perf_counter(), (*args, *kwargs.values())
        size = tuple((x.shape, x.dtype) if isinstance(x, Tensor) else x for x in given)
        on_gpu = device_of(self).type == "cuda"
        if self.graph is None:
            self.graph = self._compiled(on_gpu)
        if on_gpu:
            begin: Any = torch.compiler.cudagraph_mark_step_begin
            begin()
        try:
            with (
                config.patch(recompile_limit=GRAPHS, accumulated_recompile_limit=8 * GRAPHS),
                inductor.patch(freezing=self.freeze),
            ):
                made = self.graph(*args, **kwargs)
        except TorchDynamoException as err:
            raise BackendError(
                f"torch could not compile a {type(self).__name__}.",
                where="the first call of this size",
                got=" ".join(f"{type(err).__name__}: {err}".split())[:600],
                fix="run the model without sc.compile.Torch, or with decoder=False",
            ) from err
        if size not in self.seen:
            self.seen.add(size)
            self.compile_s += time.perf_counter() - start
        # The next call of a CUDA graph writes over what this one gave.
        return [t.clone() for t in made] if isinstance(made, tuple) else made.clone()

    def _compiled(self, on_gpu: bool) -> Callable[..., Any]:
        """The part's function, or that of its blocks, through the compiler."""
        from torch._dynamo import config

        settings: dict[str, Any] = {
            # TORCH_COMPILE_DISABLE=1 switches every compiler off: no graph is whole then.
            "fullgraph": not config.disable,
            "dynamic": False,
            "options": {"triton.cudagraphs": on_gpu, "max_autotune": self.tune},
        }
        blocks = repeated(self) if self.by_blocks and not on_gpu else []
        for block in blocks:
            block.compile(**settings)
        forward: Callable[..., Any] = super().forward
        return forward if blocks else torch.compile(forward, **settings)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__ | {"graph": None, "seen": set(), "compile_s": 0.0}
        state.pop("_compiled_call_impl", None)
        return state


def repeated(part: nn.Module) -> list[nn.Module]:
    """The largest modules of classes that occur more than once.

    None if they hold less than half of the weights: then much would stay uncompiled.
    """
    called = [
        module
        for module in part.modules()
        if next(module.children(), None) and not isinstance(module, CONTAINERS)
    ]
    times = Counter(map(type, called))
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in called:
        if times[type(module)] > 1 and module not in inside:
            found.append(module)
            inside.update(module.modules())
    return found if 2 * sum(map(tensor_bytes, found)) >= tensor_bytes(part) else []


class CompiledEncoder(Doors):
    """An image encoder that sees batches of one size only."""

    img_size: int
    by_blocks = True

    def forward(self, x: Tensor) -> Tensor:
        """Encode (B, 3, S, S) images to (B, C, h, w).

        Raises:
            ShapeError: if S is another than the encoder's.
        """
        expect(x, "B 3 S S", name="image", S=self.img_size)
        with torch.inference_mode(False), torch.no_grad():
            pieces = torch.split(_plain(x), self.at_a_time)
            found = [self.call(_filled(p, self.at_a_time))[: len(p)] for p in pieces]
            return torch.cat(found)


class CompiledDecoder(Doors):
    """A mask decoder that sees few numbers of prompts only."""

    def forward(
        self,
        image_embeddings: Tensor,
        image_pe: Tensor,
        sparse_prompt_embeddings: Tensor,
        dense_prompt_embeddings: Tensor,
        multimask_output: bool,
    ) -> tuple[Tensor, Tensor]:
        """Decode P prompts on one image to (P, M, 4h, 4w) logits and (P, M) scores."""
        found = []
        with torch.inference_mode(False), torch.no_grad():
            image, position = _plain(image_embeddings), _plain(image_pe)
            prompts = _plain(sparse_prompt_embeddings), _plain(dense_prompt_embeddings)
            for sparse, dense in zip(
                *(torch.split(t, self.at_a_time) for t in prompts), strict=True
            ):
                count = _next(len(sparse), self.at_a_time)
                made = self.call(
                    image_embeddings=image,
                    image_pe=position,
                    sparse_prompt_embeddings=_filled(sparse, count),
                    dense_prompt_embeddings=_filled(dense, count),
                    multimask_output=multimask_output,
                )
                found.append([t[: len(sparse)] for t in made])
            logits, scores = (torch.cat(pieces) for pieces in zip(*found, strict=True))
        return logits, scores


DOORS: dict[str, type[Doors]] = {"image_encoder": CompiledEncoder, "mask_decoder": CompiledDecoder}


@functools.cache
def _compiled(kind: type[nn.Module], doors: type[Doors]) -> type[nn.Module]:
    """A subclass, so that names of weights and `isinstance` stay as they were."""
    return type(kind.__name__, (doors, kind), {})


def _plain(x: Tensor) -> Tensor:
    """The compiler makes another graph for tensors of inference mode."""
    return x.clone() if x.is_inference() else x


def _filled(x: Tensor, count: int) -> Tensor:
    """(n, ...) to (count, ...), the last one repeated; what a graph does to one, others don't see.

    Always in plain memory, as strides too make another graph.
    """
    more = x[-1:].expand(count - len(x), *x.shape[1:])
    return torch.cat([x, more]) if len(more) else x.contiguous()


def _next(count: int, most: int) -> int:
    """The next power of `STEP`, `most` at most."""
    size = 1
    while size < count:
        size *= STEP
    return min(size, most)
