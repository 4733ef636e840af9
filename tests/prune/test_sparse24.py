"""prune.sparse24: the pattern, who keeps it, and when a kernel runs."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import random_sam
from pruning import SCENES, encode, toy
from torch import Tensor, nn
from torch.nn import functional as F

import samcompress as sc
from samcompress.core import errors
from samcompress.evaluate.macs import macs
from samcompress.prune import _sparse_layers
from samcompress.prune._sparse_choice import two_of_four
from samcompress.prune._sparse_layers import Sparse24Linear, has_zeros, why_dense
from samcompress.prune.sparse24 import Sparse24

CRITERIA = ("magnitude", "wanda", "sparsegpt")
EVERYWHERE = ("image_encoder.**", "mask_decoder.**")
LIN1 = "image_encoder.blocks.0.mlp.lin1"


def run(sam: Any = None, data: Any = SCENES, **fields: Any) -> Any:
    return Sparse24(**fields)(random_sam() if sam is None else sam, data=data, progress=False)


def thin(model: nn.Module) -> dict[str, Any]:
    return {n: m for n, m in model.named_modules() if isinstance(m, Sparse24Linear)}


def zeros_in_fours(weight: Tensor) -> set[int]:
    return set((weight == 0).reshape(-1, 4).sum(1).tolist())


# --- what becomes zero ----------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("where", [EVERYWHERE, Sparse24().where], ids=["everywhere", "default"])
def test_two_zeros_in_each_four(criterion: Any, where: Any) -> None:
    sam = toy()
    sparse = run(sam, criterion=criterion, where=where)
    before, after = sam.state_dict(), sparse.state_dict()
    assert before.keys() == after.keys()
    names = {f"{name}.weight" for name in thin(sparse)}
    assert len(names) == (8 if where == Sparse24().where else 63)
    for name in before:
        if name in names:
            assert zeros_in_fours(after[name]) == {2}
        else:
            assert torch.equal(after[name], before[name])
    kept = after[f"{LIN1}.weight"] != 0
    same = torch.equal(after[f"{LIN1}.weight"][kept], before[f"{LIN1}.weight"][kept])
    assert same == (criterion != "sparsegpt")
    assert torch.isfinite(encode(sparse)).all()


def test_magnitude_by_hand() -> None:
    sam = random_sam()
    layer = sam.image_encoder.blocks[0].mlp.lin1
    layer.weight.data[0, :8] = torch.tensor([0.1, -3, 2, 0.5, -1, -1, 1, 1])
    found = run(sam, criterion="magnitude").get_submodule(LIN1).weight[0, :8]
    assert found.tolist() == [0, -3, 2, 0, 0, 0, 1, 1]


def test_idle_inputs_go_first() -> None:
    sam = random_sam()
    for norm in ("weight", "bias"):
        getattr(sam.image_encoder.blocks[0].norm2, norm).data[[0, 5]] = 0
    sam.get_submodule(LIN1).weight.data[:, [0, 5]] = 100
    for criterion, gone in (("magnitude", False), ("wanda", True)):
        found = run(sam, criterion=criterion).get_submodule(LIN1).weight[:, [0, 5]] == 0
        assert (found == gone).all()


def test_zeros_that_were_there_are_among_the_two() -> None:
    sam = random_sam()
    sam.get_submodule(LIN1).weight.data[:, 1::4] = 0
    for criterion in CRITERIA:
        weight = run(sam, criterion=criterion).get_submodule(LIN1).weight
        assert zeros_in_fours(weight) == {2}
        assert not weight[:, 1::4].any()


def test_half_precision() -> None:
    sam = random_sam().bfloat16()
    for criterion in CRITERIA:
        weight = run(sam, criterion=criterion).get_submodule(LIN1).weight
        assert weight.dtype == torch.bfloat16
        assert zeros_in_fours(weight) == {2}


def test_other_encoders() -> None:
    sam = sc.substitute.TinyViT()(random_sam(), progress=False)
    for criterion in CRITERIA:
        sparse = run(
            sam, criterion=criterion, where="image_encoder.encoder.layers.1.**", data=SCENES[:1]
        )
        assert {n.rpartition(".")[2] for n in thin(sparse)} == {"qkv", "proj", "fc1", "fc2"}
        assert all(zeros_in_fours(layer.weight) == {2} for layer in thin(sparse).values())


def test_a_layer_that_no_image_reaches_is_judged_by_magnitude() -> None:
    sam = random_sam()
    idle = nn.Linear(8, 8)
    sam.image_encoder.idle = idle
    found = run(sam, criterion="wanda", where="image_encoder.idle").image_encoder.idle.weight
    assert torch.equal(found, idle.weight.masked_fill(two_of_four(idle.weight.abs()), 0))


# --- what stays -----------------------------------------------------------------------------------


def test_nothing_is_smaller() -> None:
    sam = random_sam()
    sparse = run(sam, criterion="magnitude")
    facts = sc.lineage(sparse)[-1].facts
    assert facts["before"] == facts["after"]
    assert macs(sparse) == macs(sam)
    found = sc.summary(sparse)
    assert [(p.parameters, p.bytes) for p in found.parts] == [
        (p.parameters, p.bytes) for p in sc.summary(sam).parts
    ]
    assert found.steps == ("prune.sparse24",)


def test_zeros_survive_a_file(tmp_path: Path) -> None:
    sparse = run(criterion="sparsegpt")
    sc.save(sparse, tmp_path / "sparse")
    again = sc.load(tmp_path / "sparse")
    assert thin(again).keys() == thin(sparse).keys()
    assert torch.equal(encode(again), encode(sparse))
    # The tensors are those of a plain SAM.
    plain = random_sam()
    plain.load_state_dict(sparse.state_dict(), strict=True)
    assert torch.equal(encode(plain), encode(sparse))


@pytest.mark.parametrize("ema", [None, 0.5])
def test_zeros_survive_training(ema: float | None) -> None:
    sam = random_sam()
    learn = sc.distill.Encoder(steps=3, batch_size=2, lr=1e-2, weight_decay=0.1, ema=ema)
    sparse = run(sam, criterion="magnitude")
    trained = learn(sparse, data=SCENES, teacher=sam, progress=False)
    for name, layer in thin(sparse).items():
        found = trained.get_submodule(name)
        assert torch.equal(found.weight == 0, layer.weight == 0)
        assert not torch.equal(found.weight, layer.weight)
    assert trained.get_submodule(LIN1).weight.requires_grad


def test_zeros_survive_a_loop_of_ones_own() -> None:
    layer = Sparse24Linear(nn.Linear(8, 4))
    layer.weight.data.masked_fill_(two_of_four(layer.weight.detach().abs()), 0)
    before, plain = copy.deepcopy(layer), nn.Linear(8, 4)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    [through], [expected] = (torch.autograd.grad(m(x).sum(), [x]) for m in (layer, plain))
    assert torch.equal(through, expected)
    step = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    for _ in range(3):
        step.zero_grad()
        layer(x).square().sum().backward()
        step.step()
    assert torch.equal(layer.weight == 0, before.weight == 0)
    assert ((layer.weight != before.weight) == (before.weight != 0)).all()


def test_quantisation_keeps_the_zeros() -> None:
    sparse = run(criterion="magnitude")
    small = sc.quantize.Int8Weights(min_size=0)(sparse, progress=False)
    for name, layer in thin(sparse).items():
        found = small.get_submodule(name)
        assert found.weight.dtype == torch.int8
        assert (found.weight == 0)[layer.weight == 0].all()


def test_in_a_chain() -> None:
    learn = sc.distill.Encoder(steps=1, batch_size=2)
    pipe = sc.attention.Fused() | learn | Sparse24(criterion="wanda") | learn
    done = pipe(random_sam(), data=SCENES, teacher=random_sam(seed=5), progress=False)
    assert zeros_in_fours(done.get_submodule(LIN1).weight) == {2}
    with pytest.raises(errors.OrderError, match=r"prune\.mlp comes after prune\.sparse24"):
        sc.prune.Mlp(criterion="magnitude")(run(criterion="magnitude"))


def test_traces_to_ordinary_operators() -> None:
    layer = run(criterion="magnitude").get_submodule(LIN1)
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        graph = torch.export.export(layer, (x,))
        assert torch.equal(graph.module()(x), layer(x))
    calls = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert calls == [torch.ops.aten.linear.default]


# --- kernels --------------------------------------------------------------------------------------


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """As if this device had kernels: the weights that were compressed, and made to be doubled."""
    made: list[Tensor] = []

    def compress(weight: Tensor) -> Tensor:
        made.append(weight.clone())
        return 2 * weight

    monkeypatch.setattr(_sparse_layers, "why_dense", lambda weight: None)
    monkeypatch.setattr(_sparse_layers, "_compress", compress)
    return made


def half() -> Sparse24Linear:
    layer = Sparse24Linear(nn.Linear(16, 16, dtype=torch.bfloat16))
    layer.weight.data.masked_fill_(two_of_four(layer.weight.detach().abs()), 0)
    return layer


X = torch.randn(2, 16, generator=torch.Generator().manual_seed(0)).bfloat16()


def test_kernel_is_used_where_there_is_one(kernel: list[Tensor]) -> None:
    layer = half()
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(layer(X), F.linear(X, 2 * layer.weight, layer.bias))
        assert len(kernel) == 1
        layer.weight.mul_(3)
        assert torch.equal(layer(X), F.linear(X, 2 * layer.weight, layer.bias))
        assert len(kernel) == 2
        assert torch.equal(kernel[1], layer.weight)
        twin = copy.deepcopy(layer)
        assert twin._compressed is None
        assert torch.equal(twin(X), layer(X))
        assert layer.state_dict().keys() == {"weight", "bias"}
        assert layer.cpu()._compressed is None
    with torch.inference_mode():
        assert torch.equal(layer(X), F.linear(X, 2 * layer.weight, layer.bias))


def test_kernel_is_not_used(kernel: list[Tensor]) -> None:
    layer = half()
    expected = F.linear(X, layer.weight, layer.bias)
    assert torch.equal(layer(X), expected)  # a gradient may be asked for
    with torch.no_grad():
        single = copy.deepcopy(layer).float()
        assert torch.equal(single(X.float()), F.linear(X.float(), single.weight, single.bias))
        assert not kernel
        layer.weight[0, :3] = 1  # no longer two zeros in four
        assert torch.equal(layer(X), F.linear(X, layer.weight, layer.bias))
    assert not kernel
    assert not has_zeros(layer.weight)


def test_why_no_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def on_gpu(dtype: torch.dtype = torch.float16, shape: tuple[int, int] = (32, 64)) -> str | None:
        place = torch.device("cuda:0")
        return why_dense(SimpleNamespace(device=place, dtype=dtype, shape=shape))  # type: ignore[arg-type]

    layer = run(criterion="magnitude").get_submodule(LIN1)
    assert why_dense(layer.weight) == "no kernel on cpu"
    assert repr(layer) == (
        "Sparse24Linear(in_features=32, out_features=96, bias=True, "
        "2:4, mask only (no kernel on cpu))"
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    assert on_gpu() == "this torch has no cuSPARSELt"
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    assert on_gpu() == "no kernel on GPUs before Ampere"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert on_gpu() is None
    assert on_gpu(torch.float32) == "no kernel for float32, only for float16 and bfloat16"
    assert on_gpu(shape=(168, 64)) == "width 168 is no multiple of 16"


@pytest.mark.skipif(
    not torch.cuda.is_available() or why_dense(torch.zeros(16, 16).half().cuda()) is not None,
    reason="no CUDA device with semi-structured kernels",
)
def test_kernel_on_cuda() -> None:
    sparse = run(criterion="magnitude").cuda().half().eval()
    layer = sparse.get_submodule(LIN1)
    x = torch.randn(2, 5, 5, 32, device="cuda", dtype=torch.float16)
    with torch.no_grad():
        expected = F.linear(x, layer.weight, layer.bias)
        torch.testing.assert_close(layer(x), expected, rtol=1e-2, atol=1e-2)
        assert type(layer._compressed[2]).__name__.startswith("SparseSemiStructured")
        image = torch.randn(1, 3, 64, 64, device="cuda", dtype=torch.float16)
        found = copy.deepcopy(sparse).image_encoder(image).float()
        assert torch.isfinite(found).all()


# --- what it refuses ------------------------------------------------------------------------------


def message(error: type[Exception], sam: Any = None, **fields: Any) -> list[str]:
    with pytest.raises(error) as caught:
        run(sam, **fields)
    return str(caught.value).splitlines()


def test_inputs_that_do_not_come_in_fours() -> None:
    sam = sc.prune.Mlp(ratio=0.5, criterion="magnitude", round_to=1)(
        random_sam(mlp_ratio=2.2), progress=False
    )
    assert message(errors.ShapeError, sam) == [
        "prune.sparse24 takes the inputs of a layer in fours.",
        "  where     image_encoder.blocks.0.mlp.lin2",
        "  got       in_features=35",
        "  expected  a multiple of 4; of 16 for the kernels of GPUs",
        "  try       leave the layer out: where=sc.Where(..., exclude=...)",
    ]
    run(sam, where="image_encoder.blocks.*.mlp.lin1", criterion="magnitude")


def test_twice() -> None:
    lines = message(errors.NoEffectError, run(criterion="magnitude"), criterion="wanda")
    assert lines[0] == "prune.sparse24 would set nothing to zero."
    assert "as many zeros already" in lines[2]


def test_lost_zeros_come_back() -> None:
    sparse = run(criterion="magnitude")
    layer = sparse.image_encoder.blocks[0].mlp.lin1
    layer.weight.data.fill_(1.0)
    again = run(sparse, criterion="magnitude").image_encoder.blocks[0].mlp.lin1
    assert int((again.weight == 0).sum()) == again.weight.numel() // 2


def test_layers_of_a_simulation() -> None:
    rounded = sc.quantize.FakeQuant(activation_bits=None)(random_sam(), progress=False)
    step = sc.Pipeline([sc.prune.Sparse24(criterion="magnitude")], any_order=True)
    with pytest.raises(errors.ModelError, match=r"layers that were replaced(.|\n)*FakeLinear"):
        step(rounded, progress=False)


def test_nothing_to_act_on() -> None:
    lines = message(errors.NoEffectError, where="image_encoder.neck.*")
    assert lines[0] == "prune.sparse24 matched no module it can act on."
    assert "expected  Linear" in lines[2]
    sam = sc.quantize.Int8Weights(min_size=0)(random_sam(), progress=False)
    assert message(errors.OrderError, sam)[0] == "prune.sparse24 comes after quantize.int8_weights."


def test_settings_out_of_range() -> None:
    assert message(errors.ConfigError, images=0) == [
        "prune.sparse24: images is out of range.",
        "  got       0",
        "  expected  at least 1",
    ]
    assert "'sparsegpt' | 'wanda' | 'magnitude'" in message(errors.ConfigError, criterion="l1")[2]


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
def test_without_images(criterion: Any) -> None:
    assert message(errors.DataError, criterion=criterion, data=None) == [
        "prune.sparse24 needs images.",
        "  got       no data",
        "  try       pass data=, e.g. pipe(sam, data=sc.shapes(32))",
    ]


def test_weights_that_are_not_finite() -> None:
    sam = random_sam()
    sam.get_submodule(LIN1).weight.data[5, 0] = float("nan")
    for criterion in CRITERIA:
        lines = message(errors.ModelError, sam, criterion=criterion)
        assert "not a finite number" in lines[0]
        assert LIN1 in lines[1]
        assert "1 of 3072 scores" in lines[2]
