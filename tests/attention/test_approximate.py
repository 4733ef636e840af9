"""What every approximate attention must do, whatever it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from approximations import tokens
from conftest import random_sam
from torch import nn

import samcompress as sc
from samcompress.attention._blocks import ApproximateBlock
from samcompress.attention.dilated import Dilated
from samcompress.attention.fused import Fused, FusedBlock
from samcompress.attention.linear import Linear
from samcompress.attention.neighborhood import Neighborhood
from samcompress.attention.pooled_kv import PooledKV
from samcompress.attention.rwkv import RWKV
from samcompress.attention.windowed import Windowed
from samcompress.compile.backends import BACKENDS, Options
from samcompress.core.adapters import to_transformers
from samcompress.core.checkpoint import fingerprint

# On a map of 8 x 8 tokens, whose third block has windows of 3.
STEPS = {
    "windowed": Windowed(keep=0),
    "shifted": Windowed(keep=0, window=5, shift=True),
    "dilated": Dilated(),
    "uneven dilated": Dilated(rate=3),
    "a map a head": Dilated(offsets="per_head"),
    "linear": Linear(),
    "rwkv": RWKV(),
    "pooled": PooledKV(),
    "uneven pooled": PooledKV(size=3, pool="conv"),
    "largest": PooledKV(size=3, pool="max"),
    "pooled decoder": PooledKV(size=3, where=("image_encoder.**", "mask_decoder.**")),
    "neighborhood": Neighborhood(size=3, blocks="all"),
}
each = pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
replacing = pytest.mark.parametrize(
    "step", [s for s in STEPS.values() if s != STEPS["windowed"]], ids=str
)


def sam() -> Any:
    return random_sam(depth=3, num_heads=4, global_attn_indexes=(0, 1))


def image(count: int = 2) -> torch.Tensor:
    return tokens(count, 3, 64, 64)


def embed(model: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.image_encoder(x)


@each
def test_is_another_function_of_finite_values(step: Any) -> None:
    base = sam()
    before, random_state = fingerprint(base), torch.get_rng_state()
    small = step(base, progress=False)
    assert fingerprint(base) == before
    assert torch.equal(torch.get_rng_state(), random_state)
    found, expected = embed(small, image()), embed(base, image())
    assert found.shape == expected.shape
    assert found.isfinite().all()
    assert 1e-3 < (found - expected).norm() / expected.norm() < 2
    kept = {k for k, v in small.state_dict().items() if torch.equal(v, base.state_dict().get(k, v))}
    for layer in ("qkv.weight", "qkv.bias", "proj.weight", "proj.bias"):
        assert {f"image_encoder.blocks.{i}.attn.{layer}" for i in range(3)} <= kept


@each
def test_saved_and_loaded(step: Any, tmp_path: Path) -> None:
    small = step(sam(), progress=False)
    sc.save(small, tmp_path / "small")
    again = sc.load(tmp_path / "small")
    assert sc.lineage(again)[-1].transform == step
    assert torch.equal(embed(again, image()), embed(small, image()))


@replacing
def test_state_names_the_tensors_that_come_and_go(step: Any) -> None:
    base = sam()
    small = step(base, progress=False)
    state = sc.lineage(small)[-1].state
    added, removed = (set(state.get(name, ())) for name in ("added", "removed"))
    assert small.state_dict().keys() == (base.state_dict().keys() - removed) | added


@each
def test_half_precision_has_no_nan(step: Any) -> None:
    small = step(sam(), progress=False)
    expected = embed(small, 3 * image())
    found = embed(small.bfloat16(), (3 * image()).bfloat16()).float()
    assert found.isfinite().all()
    assert (found - expected).norm() / expected.norm() < 5e-2


@each
def test_gradients_are_finite(step: Any) -> None:
    small = step(sam(), progress=False)
    x = image().requires_grad_()
    small.image_encoder(x).square().sum().backward()
    for name, parameter in small.image_encoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert x.grad is not None
    assert x.grad.isfinite().all()


@each
def test_before_and_after_fused(step: Any) -> None:
    base = sam()
    expected = embed(step(base, progress=False), image())
    every = getattr(step, "blocks", "global") == "all"
    chains = [Fused() | step] if every else [Fused() | step, step | Fused()]
    for chain in chains:
        small = chain(base, progress=False)
        kinds = {type(block) for block in small.image_encoder.blocks}
        assert kinds <= {FusedBlock, ApproximateBlock}
        assert every or FusedBlock in kinds
        found = embed(small, image())
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@each
def test_batch_is_images_one_by_one(step: Any) -> None:
    small = step(sam(), progress=False)
    x = image(3)
    whole = embed(small, x)
    single = torch.cat([embed(small, one[None]) for one in x])
    torch.testing.assert_close(whole, single, rtol=0, atol=1e-5)


@replacing
def test_transformers_refuses_them(step: Any) -> None:
    with pytest.raises(sc.errors.ModelError, match="cannot hold this model") as caught:
        to_transformers(step(sam(), progress=False))
    assert "convert it before the step that made the difference" in str(caught.value)


@each
def test_exports(step: Any) -> None:
    encoder = step(sam(), progress=False).image_encoder.eval()
    x = image(1)
    with torch.no_grad():
        program = torch.export.export(encoder, (x,), strict=False)
        torch.testing.assert_close(program.module()(x), encoder(x), rtol=0, atol=1e-5)


class Several(nn.Module):
    """The attention of all techniques on one map: one graph takes less time than a dozen."""

    def __init__(self, parts: list[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(part(x) for part in self.parts)


@pytest.mark.parametrize(
    "names", [("linear",), pytest.param(tuple(STEPS)[1:], marks=pytest.mark.slow)], ids=len
)
def test_runs_in_onnx_runtime(names: tuple[str, ...], tmp_path: Path) -> None:
    backend = BACKENDS["onnxruntime"]
    if backend.unavailable():
        pytest.skip(str(backend.unavailable()))
    changed = [STEPS[name](sam(), progress=False).image_encoder.blocks[1] for name in names]
    module, x = Several([block.attn for block in changed]).eval(), tokens(1, 8, 8, 32)
    path = tmp_path / "several.onnx"
    options = Options(inputs=("x",), outputs=tuple(f"out{i}" for i in range(len(names))))
    backend.export(module, (x,), path, dtype="float32", options=options)
    found = backend.load(path, device="cpu", threads=1)(x)
    with torch.no_grad():
        for ours, expected in zip(found, module(x), strict=True):
            torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


@each
def test_projections_may_be_replaced(step: Any) -> None:
    int8 = sc.quantize.Int8Weights(min_size=0)
    base = sam()
    assert embed((step | int8)(base, progress=False), image()).isfinite().all()
    if isinstance(step, Windowed):
        return  # the second order is one of phases, which is an error
    with pytest.raises(sc.errors.OrderError):
        (int8 | step)(base, progress=False)


@each
def test_twice_is_an_error(step: Any) -> None:
    small = step(sam(), progress=False)
    with pytest.raises(sc.errors.NoEffectError, match=step.name.replace(".", r"\.")):
        step(small, progress=False)


def test_kinds_of_blocks() -> None:
    for blocks, expected in (("global", [1, 1, 0]), ("windowed", [0, 0, 1]), ("all", [1, 1, 1])):
        small = PooledKV(blocks=blocks)(sam(), progress=False)
        assert [type(b) is ApproximateBlock for b in small.image_encoder.blocks] == expected
    small = PooledKV(where="image_encoder.blocks.1")(sam(), progress=False)
    assert sc.lineage(small)[-1].state["blocks"] == ["image_encoder.blocks.1"]


def test_windows_stay_where_the_technique_keeps_them() -> None:
    for step, sides in ((PooledKV(blocks="all"), [0, 0, 3]), (Linear(blocks="all"), [0, 0, 0])):
        small = step(sam(), progress=False)
        assert [block.window_size for block in small.image_encoder.blocks] == sides


def test_errors() -> None:
    base = sam()
    with pytest.raises(sc.errors.NoEffectError) as caught:
        Linear(where="image_encoder.blocks.2")(base)
    assert str(caught.value) == (
        "attention.linear finds no attention to replace.\n"
        "  where     Where(include=('image_encoder.blocks.2',), exclude=())\n"
        "  got       windowed blocks alone\n"
        "  expected  global blocks with SAM's attention\n"
        "  try       widen where=, or leave this step out"
    )
    with pytest.raises(sc.errors.NoEffectError) as caught:
        (RWKV() | Linear())(base, progress=False)
    assert "got       windowed blocks alone" in str(caught.value)
    with pytest.raises(sc.errors.NoEffectError) as caught:
        Linear(blocks="all")(Linear(blocks="all")(base, progress=False))
    assert "got       blocks whose attention is replaced already" in str(caught.value)
    assert "expected  blocks with SAM's attention" in str(caught.value)


def test_other_encoders_are_an_error() -> None:
    base = sam()

    class Convolutions(nn.Sequential):
        img_size = 64

    base.image_encoder = Convolutions(nn.Conv2d(3, 32, 8, stride=8))
    for step in STEPS.values():
        if not (isinstance(step, PooledKV) and "mask_decoder.**" in step.where.include):
            with pytest.raises(sc.errors.ModelError) as caught:
                step(base)
            assert str(caught.value) == (
                f"{step.name} finds no ViT block of segment_anything.\n"
                "  where     image_encoder\n"
                "  got       Convolutions\n"
                "  expected  an encoder made of segment_anything.modeling.image_encoder.Block\n"
                "  try       leave this step out for this encoder"
            )


@pytest.mark.parametrize(
    ("step", "lr"), [(Linear(), 1e-3), (PooledKV(pool="conv"), 1e-4)], ids=["linear", "pooled"]
)
def test_distillation_recovers(step: Any, lr: float, trained: Any) -> None:
    data = sc.shapes(8, seed=4)
    chain = step | sc.distill.Encoder(steps=20, batch_size=4, lr=lr)
    small = chain(trained, data=data, progress=False)
    state = sc.lineage(small)[-1].state
    assert state["loss_after"] < 0.7 * state["loss_before"]
