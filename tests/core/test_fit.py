from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from samcompress.core import _fit
from samcompress.core._draws import batch, generator
from samcompress.core.errors import CheckpointError, ConfigError, ModelError, NoEffectError

Loss = Callable[[int], dict[str, Tensor]]


class Net(nn.Module):
    """Two parts: one that trains, with a batch norm and dropout, and one that does not."""

    def __init__(self) -> None:
        super().__init__()
        g = generator("net")
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3))
        self.head = nn.Sequential(nn.Linear(8, 1), nn.BatchNorm1d(1))
        for p in self.parameters():
            p.data.copy_(torch.randn(p.shape, generator=g))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def learn(net: nn.Module, *, stop: int | None = None, bad: tuple[int, ...] = ()) -> Loss:
    """Regression on drawn numbers; Ctrl-C at `stop`, NaN at the steps in `bad`."""

    def loss(step: int) -> dict[str, Tensor]:
        if step == stop:
            raise KeyboardInterrupt
        x = torch.randn(6, 4, generator=generator("x", step))
        fit = F.mse_loss(net(x), x.sum(1, keepdim=True))
        if step in bad:
            fit = fit * math.nan
        return {"fit": fit, "size": 1e-3 * net.body[0].weight.square().sum()}

    return loss


def weights(net: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in net.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_rate_rises_and_falls() -> None:
    plan = _fit.Plan(steps=100, lr=2.0, warmup=0.1, floor=0.01)
    rates = [plan.rate(s) for s in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == rates[9] == rates[10] == 2.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert plan.rate(55) == pytest.approx(2.0 * (0.01 + 0.99 / 2))
    assert plan.rate(100) == pytest.approx(0.02)


def test_batches_are_a_function_of_the_step() -> None:
    seen = [i for step in range(7) for i in batch(7, 3, seed=5, step=step)]
    assert [sorted(seen[i : i + 7]) for i in (0, 7, 14)] == [list(range(7))] * 3
    assert seen[:7] != seen[7:14]
    assert batch(7, 3, seed=5, step=4) == seen[12:15]
    assert batch(7, 3, seed=6, step=4) != seen[12:15]
    assert sorted(batch(2, 4, seed=0, step=3)) == [0, 0, 1, 1]


def test_equals_a_plain_loop() -> None:
    net, plain = Net(), Net()
    _fit.fit(net, learn(net), _fit.Plan(steps=5, lr=0.1, clip=0.5), parts=("body",))
    plain.eval()
    plain.body.train()
    two = [plain.body[0].weight], [plain.body[0].bias, plain.body[1].weight, plain.body[1].bias]
    groups = [{"params": two[0]}, {"params": two[1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.1, weight_decay=0.01)
    for step in range(5):
        for group in optimizer.param_groups:
            group["lr"] = _fit.Plan(steps=5, lr=0.1).rate(step)
        # Dropout draws from the global generator: give it what the engine gives it.
        with _fit.drawn(torch.device("cpu"), 0, "step", step):
            sum(learn(plain)(step).values()).backward()
        nn.utils.clip_grad_norm_([*two[0], *two[1]], 0.5)
        optimizer.step()
        optimizer.zero_grad()
    assert same(weights(net), weights(plain))


@pytest.mark.parametrize("optimizer", ["adamw", "adam"])
@pytest.mark.parametrize("ema", [None, 0.9])
def test_interrupted_equals_uninterrupted(tmp_path: Path, optimizer: str, ema: float) -> None:
    plan = _fit.Plan(steps=6, lr=0.05, optimizer=optimizer, ema=ema, save_seconds=0)
    whole = Net()
    expected = _fit.fit(whole, learn(whole, bad=(1,)), plan)
    place = tmp_path / "run.safetensors"
    first = Net()
    with pytest.raises(KeyboardInterrupt):
        _fit.fit(first, learn(first, stop=3, bad=(1,)), plan, checkpoint=place)
    second = Net()
    run = _fit.fit(second, learn(second, bad=(1,)), plan, checkpoint=place)
    assert (run.resumed, run.step, run.skipped) == (3, 6, 1)
    assert same(weights(whole), weights(second))
    # As text, for there NaN equals NaN.
    assert str(run.total) == str(expected.total)
    assert str(sorted(run.curves.items())) == str(sorted(expected.curves.items()))
    # A finished run is not run again.
    third = Net()
    again = _fit.fit(third, learn(third, stop=0), plan, checkpoint=place)
    assert (again.resumed, again.step) == (6, 6)
    assert same(weights(third), weights(whole))
    stored = _fit.trained(place)
    assert all(torch.equal(stored[k], v) for k, v in whole.named_parameters())


def test_checkpoints_are_as_rare_as_asked(tmp_path: Path) -> None:
    net, place = Net(), tmp_path / "run.safetensors"
    with pytest.raises(KeyboardInterrupt):
        _fit.fit(net, learn(net, stop=5), _fit.Plan(steps=6), checkpoint=place)
    assert not place.exists()
    _fit.fit(net, learn(net), _fit.Plan(steps=6), checkpoint=place)
    assert [p.name for p in tmp_path.iterdir()] == ["run.safetensors"]


def test_only_the_declared_part_changes() -> None:
    net = Net()
    net.head.train()
    net.body.eval()
    net.body[0].bias.requires_grad_(False)
    before, seen = weights(net), []

    def loss(step: int) -> dict[str, Tensor]:
        seen.append([m.training for m in (net, net.body, net.body[1], net.head, net.head[1])])
        return learn(net)(step)

    _fit.fit(net, loss, _fit.Plan(steps=2, lr=0.1), parts=("body",))
    after = weights(net)
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed == {k for k in before if k.startswith("body.")}
    assert seen[0] == [False, True, True, False, False]
    assert net.training
    assert net.head.training
    assert not net.body.training
    assert [n for n, p in net.named_parameters() if not p.requires_grad] == ["body.0.bias"]
    assert all(p.grad is None for p in net.parameters())


def test_global_random_state_is_left_alone() -> None:
    net = Net()
    state = torch.get_rng_state()
    _fit.fit(net, learn(net), _fit.Plan(steps=2))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_step_that_is_not_finite_is_left_out() -> None:
    net, other = Net(), Net()
    # The norm counts the batch of a skipped step too, so it stays out of this comparison.
    run = _fit.fit(net, learn(net, bad=(0, 1)), _fit.Plan(steps=2), parts=("body.0",))
    assert run.skipped == 2
    assert same(weights(net), weights(other))
    assert math.isnan(run.curves["fit"][0])
    assert run.curves["size"][0] > 0


def test_a_gradient_that_is_not_finite_is_left_out() -> None:
    net, other = Net(), Net()

    def loss(step: int) -> dict[str, Tensor]:
        return {"root": (net.body[0].weight * 0).sum().sqrt()}

    assert _fit.fit(net, loss, _fit.Plan(steps=3), parts=("body.0",)).skipped == 3
    assert same(weights(net), weights(other))


def test_divergence_is_an_error() -> None:
    net = Net()
    with pytest.raises(ConfigError) as caught:
        _fit.fit(net, learn(net, bad=(1, 2, 3)), _fit.Plan(steps=9, lr=0.1, patience=3))
    size = 1e-3 * float(net.body[0].weight.detach().square().sum())
    assert str(caught.value) == (
        "training diverged: 3 steps in a row were not finite.\n"
        "  where     step 3\n"
        f"  got       fit nan, size {size:g}\n"
        "  expected  finite losses and gradients\n"
        "  try       a lower rate than 0.1, and images and weights without NaN"
    )
    assert net.training
    assert all(p.grad is None for p in net.parameters())


def test_curve_is_short() -> None:
    run = _fit.Run(total=[1.0, math.nan, 4.0, 6.0])
    assert run.curve() == [1.0, 4.0, 6.0]
    assert run.curve(2) == [2.5, 6.0]


def test_a_term_may_begin_late() -> None:
    net = Net()

    def loss(step: int) -> dict[str, Tensor]:
        terms = learn(net)(step)
        return terms if step else {"fit": terms["fit"]}

    run = _fit.fit(net, loss, _fit.Plan(steps=3))
    assert math.isnan(run.curves["size"][0])
    assert [len(c) for c in run.curves.values()] == [3, 3]
    assert run.total[2] == pytest.approx(run.curves["fit"][2] + run.curves["size"][2])


def test_checkpoint_of_another_run(tmp_path: Path) -> None:
    net, place = Net(), tmp_path / "run.safetensors"
    _fit.fit(net, learn(net), _fit.Plan(steps=2), checkpoint=place, identity={"data": "a"})
    with pytest.raises(CheckpointError) as caught:
        _fit.fit(
            net, learn(net), _fit.Plan(steps=2, lr=0.5), checkpoint=place, identity={"data": "a"}
        )
    assert str(caught.value) == (
        "the training checkpoint is of another run: lr differs.\n"
        f"  where     {place}\n"
        "  got       0.001\n"
        "  expected  0.5\n"
        "  try       delete the file to begin anew, or use another folder"
    )
    with pytest.raises(CheckpointError, match="data differs"):
        _fit.fit(net, learn(net), _fit.Plan(steps=2), checkpoint=place, identity={"data": "b"})


def test_damaged_checkpoint(tmp_path: Path) -> None:
    net, place = Net(), tmp_path / "run.safetensors"
    _fit.fit(net, learn(net), _fit.Plan(steps=2), checkpoint=place)
    place.write_bytes(place.read_bytes()[:-10])
    with pytest.raises(CheckpointError) as caught:
        _fit.fit(net, learn(net), _fit.Plan(steps=2), checkpoint=place)
    text = str(caught.value)
    assert text.startswith(
        f"the training checkpoint cannot be read.\n  where     {place}\n  got       SafetensorError"
    )
    assert text.endswith("  try       delete the file to begin anew")
    save_file({"a": torch.zeros(1)}, place)
    with pytest.raises(CheckpointError, match="cannot be read"):
        _fit.trained(place)


def test_a_full_disk_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, place = Net(), tmp_path / "run.safetensors"
    with pytest.raises(KeyboardInterrupt):
        _fit.fit(net, learn(net, stop=1), _fit.Plan(steps=3, save_seconds=0), checkpoint=place)
    kept = place.read_bytes()

    def full(tensors: object, path: Path, **_: object) -> None:
        path.write_bytes(b"half")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(_fit, "save_file", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        _fit.fit(net, learn(net), _fit.Plan(steps=3, save_seconds=0), checkpoint=place)
    assert [p.name for p in tmp_path.iterdir()] == [place.name]
    assert place.read_bytes() == kept


def test_nothing_to_train() -> None:
    with pytest.raises(NoEffectError) as caught:
        _fit.trainable(Net(), ("body.2",))
    assert str(caught.value) == (
        "there is nothing to train.\n  where     body.2\n  got       no floating-point weights"
    )


def test_half_precision_is_refused() -> None:
    with pytest.raises(ModelError) as caught:
        _fit.trainable(Net().half(), ("head",))
    assert str(caught.value) == (
        "weights can only be trained in float32.\n"
        "  where     head.0.weight\n"
        "  got       torch.float16\n"
        "  try       model.float() first; reduce the precision afterwards"
    )
