"""Multiply-accumulates of encoder and decoder, counted by shape; uncounted work is an error.

Convention: matrix products, convolutions and attention products count; elementwise work, softmax,
norms and resampling do not. The literature is split over attention products, so the encoder is also
given without them. A multiply-accumulate is one, not two.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ._meta import without_storage
from .build import SamConfig
from .contract import device_of, dtype_of, parts
from .errors import ModelError
from .history import history

# Batched products have no weight among their operands: in an image encoder they are attention's.
ATTENTION = re.compile(r"bmm|attention")
# Words in the names of operators that multiply matrices.
PRODUCT = re.compile(
    r"mm$|matmul|(?<!bi)(?<!upsample_)linear|conv(_|\d|olution)|attention|mv$|dot$|encoder_layer"
)
NAMESPACES = ("aten", "prim", "prims", "torchvision")
Run = Callable[[Any, torch.device, torch.dtype], Any]


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates at the model's own input size.

    Attributes:
        encoder: one image through the image encoder.
        encoder_no_attention: the same without the products of attention.
        decoder_per_prompt: one box through prompt encoder and mask decoder.
    """

    encoder: int
    encoder_no_attention: int
    decoder_per_prompt: int

    def to_dict(self) -> dict[str, int]:
        """Plain JSON values."""
        return asdict(self)

    def __repr__(self) -> str:
        g = {k: f"{v / 1e9:.4g} G" for k, v in asdict(self).items()}
        return f"Macs({', '.join(f'{k}={v}' for k, v in g.items())})"


def macs(model: nn.Module) -> Macs:
    """Count the multiply-accumulates of a SAM, without running it where its operators allow.

    A module whose work torch cannot count may say it itself, by a method
    ``macs(*inputs) -> int``, or by the attributes ``in_features`` and ``out_features`` of a linear
    layer.

    Args:
        model: a SAM; a copy without storage is counted, the model itself is not touched.

    Raises:
        ModelError: if a part does work that no formula covers, so that its count would be too low.

    Example:
        >>> from samcompress.core.build import build
        >>> macs(build("tiny")).decoder_per_prompt
        8194688
    """
    model = before_export(model)
    encoder, attention, embedding = _count(model, _encode)
    decoder, _, _ = _count(model, partial(_decode, embedding=embedding.shape))
    return Macs(encoder, encoder - attention, decoder)


def decoder_macs(model: nn.Module, prompts: int) -> int:
    """Multiply-accumulates of prompt encoder and mask decoder for P boxes on one image."""
    model = before_export(model)
    shape = _run(model, _embedding)
    return _count(model, partial(_decode, embedding=shape, prompts=prompts))[0]


def before_export(model: nn.Module) -> nn.Module:
    """The torch model that an exported one was made from, with its shapes but not its weights.

    Another runtime does its work out of torch's sight; the steps before it can be replayed. A model
    that was not exported is returned as it is.
    """
    record = history(model)
    steps = list(itertools.takewhile(lambda step: not step.transform.terminal, record.steps))
    if record.base is None or len(steps) == len(record.steps):
        return model
    twin: nn.Module = record.base.config.build(empty=True)
    for step in steps:
        step.transform.rebuild(twin, step.state)
    return twin.eval()


def closed_form(config: SamConfig) -> int:
    """Multiply-accumulates of a plain SAM image encoder, from its sizes alone.

    Args:
        config: sizes; ``use_rel_pos`` is assumed, as in every SAM.

    Example:
        >>> round(closed_form(SamConfig()) / 1e9, 2)
        486.04
    """
    g, d, window = config.grid, config.embed_dim, config.window_size
    tokens = g * g
    hidden = int(d * config.mlp_ratio)
    total = 3 * config.patch_size**2 * d * tokens
    total += tokens * config.out_chans * (d + 9 * config.out_chans)
    for index in range(config.depth):
        if window == 0 or index in config.global_attn_indexes:
            padded, side = tokens, g
        else:
            padded, side = (-(-g // window) * window) ** 2, window
        total += 4 * padded * d * d + 2 * tokens * d * hidden
        total += 2 * padded * side * side * d + 2 * padded * d * side
    return total


def _encode(model: Any, at: torch.device, dtype: torch.dtype) -> Tensor:
    side = model.image_encoder.img_size
    embedding: Tensor = model.image_encoder(torch.zeros(1, 3, side, side, device=at, dtype=dtype))
    return embedding


def _embedding(model: Any, at: torch.device, dtype: torch.dtype) -> torch.Size:
    with _evaluated(model):
        return _encode(model, at, dtype).shape


def _decode(
    model: Any, at: torch.device, dtype: torch.dtype, *, embedding: torch.Size, prompts: int = 1
) -> None:
    side = float(model.image_encoder.img_size)
    box = torch.tensor([[0.25, 0.25, 0.75, 0.75]], dtype=torch.float32) * side
    sparse, dense = model.prompt_encoder(
        points=None, boxes=box.expand(prompts, -1).to(at), masks=None
    )
    kind = dtype_of(model.mask_decoder)
    position = model.prompt_encoder.get_dense_pe().to(kind)
    model.mask_decoder(
        # Not always that of the positions: some encoders give the decoder further channels.
        image_embeddings=torch.zeros(embedding, device=at, dtype=kind),
        image_pe=position,
        sparse_prompt_embeddings=sparse.to(kind),
        dense_prompt_embeddings=dense.to(kind),
        multimask_output=False,
    )


def _count(model: nn.Module, run: Run) -> tuple[int, int, Any]:
    """All multiply-accumulates of a run, those of attention, and what it gave."""
    found: tuple[int, int, Any] = _run(model, partial(_counted, run=run))
    return found


def _run(model: nn.Module, run: Run) -> Any:
    dtype = dtype_of(parts(model).image_encoder)
    try:
        return run(without_storage(model), torch.device("meta"), dtype)
    except ModelError:
        raise
    except Exception:
        # Something in this model reads values (an index, another runtime), which a copy without
        # storage lacks. A real run is slower and counts the same; what is wrong shows there again.
        return run(model, device_of(model), dtype)


def _counted(
    model: nn.Module, at: torch.device, dtype: torch.dtype, *, run: Run
) -> tuple[int, int, Any]:
    counter = FlopCounterMode(display=False, custom_mapping=EXTRA)
    watch = _Watch(counter)
    # The counter is entered last, so it splits composite operators before the watch sees them.
    with _evaluated(model), watch.modules(model), watch, counter:
        output = run(model, at, dtype)
    totals = counter.get_flop_counts().get("Global", {})
    attention = sum(v for op, v in totals.items() if ATTENTION.search(str(op)))
    total = sum(totals.values()) // 2 + watch.declared
    if watch.unknown or total == 0:
        raise ModelError(
            "the multiply-accumulates of this model cannot be counted.",
            where=", ".join(sorted(watch.unknown)) or "a whole part, which ran outside torch",
            got="work that no formula covers",
            expected="torch operators with a FLOP formula, or modules that say their work",
            fix="count the model before export, or give the module a method macs(*inputs)",
        )
    return total, attention // 2, output


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """In eval mode and without gradients; each module's mode is restored."""
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in training:
            module.training = mode


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees each operator that is executed and each module called; keeps what the counter cannot."""

    def __init__(self, counter: FlopCounterMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counter = counter
        self.declared = 0
        self.unknown: set[str] = set()
        self.open: list[dict[Any, int]] = []  # counts at the entry of the modules we are inside

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        space, name = packet._qualified_op_name.split("::")
        multiplies = space not in NAMESPACES or PRODUCT.search(name)
        if multiplies and not self.open and packet not in self.counter.flop_registry:
            self.unknown.add(f"{space}::{name}")
        return func(*args, **(kwargs or {}))

    @contextmanager
    def modules(self, model: nn.Module) -> Iterator[None]:
        """Listen to the modules that say their own work, or that must have some."""
        hooks = []
        for name, module in model.named_modules():
            if _declares(module) or _convolves(module):
                hooks.append(module.register_forward_pre_hook(self._enter))
                hooks.append(module.register_forward_hook(partial(self._leave, name)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _enter(self, module: Any, inputs: Any) -> None:
        self.open.append(dict(self.counter.flop_counts["Global"]))

    def _leave(self, name: str, module: Any, inputs: Any, output: Any) -> None:
        before = self.open.pop()
        counts = self.counter.flop_counts["Global"]
        if self.open:
            return  # the module around this one speaks for it
        if callable(getattr(module, "macs", None)):
            counts.clear()
            counts.update(before)
            self.declared += int(module.macs(*inputs))
        elif counts == before and hasattr(module, "in_features"):
            self.declared += inputs[0].numel() * int(module.out_features)
        elif counts == before:
            self.unknown.add(f"{name} ({type(module).__name__})")


def _declares(module: nn.Module) -> bool:
    features = hasattr(module, "in_features") and hasattr(module, "out_features")
    return callable(getattr(module, "macs", None)) or features


def _convolves(module: nn.Module) -> bool:
    return hasattr(module, "in_channels") and hasattr(module, "out_channels")


def _int_mm(a: Any, b: Any, **kwargs: Any) -> int:
    return 2 * int(a[0] * a[1] * b[1])


def _mv(a: Any, b: Any, **kwargs: Any) -> int:
    return 2 * int(a[0] * a[1])


# Products that FlopCounterMode passes over; it counts two operations a multiply-accumulate.
EXTRA = {torch.ops.aten._int_mm: _int_mm, torch.ops.aten.mv: _mv}
