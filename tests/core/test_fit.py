from __future__ import annotations

import logging
import math
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import fitting
import pytest
import torch
from fitting import Net, Numbers, Regression, same, weights
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from samcompress.core import _fit, _saved
from samcompress.core._draws import batch, drawn
from samcompress.core._fit import Plan, Run, fit
from samcompress.core._objective import Share
from samcompress.core._progress import Progress
from samcompress.core.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    ModelError,
    NoEffectError,
)

ALL = ("student", "extra")
many_workers = pytest.mark.filterwarnings(
    "ignore:This DataLoader will create:UserWarning", "ignore:.*fork:DeprecationWarning"
)


def trained(plan: Plan, objective: Regression | None = None, **options: object) -> Regression:
    objective = objective or Regression()
    fit(objective, plan, **{"parts": ALL, **options})
    return objective


@pytest.fixture
def _ctrl_c() -> Iterator[None]:
    """Ctrl-C as in a terminal; ignored where tests run in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


# ---------------------------------------------------------------------------------- rate and draws


def test_rate_rises_and_falls() -> None:
    plan = Plan(steps=100, lr=2.0, warmup=0.1, floor=0.01)
    rates = [plan.rate(s) for s in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == rates[9] == rates[10] == 2.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert plan.rate(55) == pytest.approx(2.0 * (0.01 + 0.99 / 2))
    assert plan.rate(100) == pytest.approx(0.02)


def test_constant_rate() -> None:
    plan = Plan(steps=100, lr=2.0, warmup=0.1, schedule="constant")
    assert plan.rate(4) == pytest.approx(1.0)
    assert {plan.rate(s) for s in range(10, 100)} == {2.0}


def test_plateaus() -> None:
    plan = Plan(steps=100, lr=2.0, warmup=0, floor=0.2, schedule="plateau", epoch=2, patience=3)
    falling = [9.0, 9.0, 8.0, 8.0, 7.0, 7.0]
    flat = [7.0, 7.0, 6.9, 7.2, 6.9999, 7.0]
    assert plan.halved(falling) == 0
    assert plan.halved(falling + flat[:-1]) == 0
    assert plan.halved(falling + flat) == 1
    # A gain begins the count anew; NaN counts as none.
    assert plan.halved([*falling, *flat[:4], 5.0, 5.0, *flat[:4]]) == 0
    assert plan.halved([*falling, math.nan, math.nan, math.nan, 7.0, 7.0, math.nan]) == 1
    assert plan.halved(falling + 2 * flat) == 2
    assert [plan.rate(9, n) for n in range(5)] == [2.0, 1.0, 0.5, 0.4, 0.4]


def test_a_plateau_halves_the_rate_after_resuming_too(tmp_path: Path) -> None:
    # The rate is far too high to gain anything.
    plan = Plan(steps=12, lr=2.0, schedule="plateau", epoch=2, patience=1, save_seconds=0)
    whole = trained(plan)
    for stop in (3, 4, 7):
        place = tmp_path / f"{stop}"
        with pytest.raises(KeyboardInterrupt):
            trained(plan, Regression(stop=stop), checkpoint=place)
        assert same(weights(trained(plan, checkpoint=place)), weights(whole))
    assert plan.halved(fit(Regression(), plan, parts=ALL).total) > 0
    assert not same(weights(trained(replace(plan, schedule="constant"))), weights(whole))


def test_plans_that_cannot_be() -> None:
    with pytest.raises(ConfigError) as caught:
        Plan(steps=1, accumulate=0)
    assert str(caught.value) == ("accumulate is out of range.\n  got       0\n  expected  >= 1")
    with pytest.raises(ConfigError) as caught:
        Plan(steps=1, schedule="plateau")
    assert str(caught.value) == (
        "a plateau is judged by epochs.\n  got       epoch=None\n  expected  steps, >= 1"
    )


def test_batches_are_a_function_of_the_step() -> None:
    seen = [i for step in range(7) for i in batch(7, 3, seed=5, step=step)]
    assert [sorted(seen[i : i + 7]) for i in (0, 7, 14)] == [list(range(7))] * 3
    assert seen[:7] != seen[7:14]
    assert batch(7, 3, seed=5, step=4) == seen[12:15]
    assert batch(7, 3, seed=6, step=4) != seen[12:15]
    assert sorted(batch(2, 4, seed=0, step=3)) == [0, 0, 1, 1]


def test_shares_are_all_of_a_batch() -> None:
    for count in range(1, 7):
        parts = [Share(i, count, filled=True).of("abcdef") for i in range(count)]
        assert [pair for part in parts for pair in part] == list(enumerate("abcdef"))
        assert {len(part) for part in parts} <= {6 // count, -(-6 // count)}
    assert Share(0, 2).of("a") == []
    with pytest.raises(ConfigError) as caught:
        Share(0, 2, filled=True).of("a")
    assert str(caught.value) == (
        "a batch has fewer items than parts.\n"
        "  got       1 items for 2 parts\n"
        "  expected  at least one item for each micro-batch of each process\n"
        "  try       a larger batch_size, a smaller accumulate, or fewer processes"
    )


# ---------------------------------------------------------------------------------------- one step


def test_equals_a_plain_loop() -> None:
    objective, plain = Regression(), Regression()
    fit(objective, Plan(steps=5, lr=0.1, clip=0.5), parts=("student.body",))
    plain.eval()
    body = plain.student.body.train()
    two = [body[0].weight], [body[0].bias, body[1].weight, body[1].bias]
    groups = [{"params": two[0]}, {"params": two[1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.1, weight_decay=0.01)
    for step in range(5):
        for group in optimizer.param_groups:
            group["lr"] = Plan(steps=5, lr=0.1).rate(step)
        # Dropout draws from the global generator: give it what the engine gives it.
        with drawn(torch.device("cpu"), 0, "step", step, 0):
            sum(plain(plain.source.draw(step, Share()), step).values()).backward()
        nn.utils.clip_grad_norm_([*two[0], *two[1]], 0.5)
        optimizer.step()
        optimizer.zero_grad()
    assert same(weights(objective), weights(plain))


def test_only_the_declared_part_changes() -> None:
    objective = Regression()
    net = objective.student
    net.head.train()
    net.body.eval()
    net.body[0].bias.requires_grad_(False)
    before, seen = weights(objective), []
    inside = (net, net.body, net.body[1], net.head, net.head[1], objective.extra)
    hook = net.body.register_forward_hook(lambda *_: seen.append([m.training for m in inside]))
    fit(objective, Plan(steps=2, lr=0.1), parts=("student.body",))
    hook.remove()
    after = weights(objective)
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed == {k for k in before if k.startswith("student.body.")}
    assert seen[0] == [False, True, True, False, False, False]
    assert net.training
    assert net.head.training
    assert not net.body.training
    frozen = [n for n, p in objective.named_parameters() if not p.requires_grad]
    assert frozen == ["student.body.0.bias"]
    assert all(p.grad is None for p in objective.parameters())


@many_workers
@pytest.mark.parametrize("workers", [0, 2])
def test_global_random_state_is_left_alone(workers: int) -> None:
    objective, state = Regression(), torch.get_rng_state()
    trained(Plan(steps=2), objective, workers=workers)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("size", "accumulate"), [(4, 4), (5, 2), (6, 4)])
def test_micro_batches_equal_one_batch(size: int, accumulate: int) -> None:
    runs, found = [], []
    for plan in (Plan(steps=4, lr=0.05), Plan(steps=4, lr=0.05, accumulate=accumulate)):
        objective = Regression(Numbers(size), norm=False, dropout=0.0)
        runs.append(fit(objective, plan, parts=ALL))
        found.append(weights(objective))
    assert all(torch.allclose(found[0][k], found[1][k], atol=1e-6) for k in found[0])
    assert runs[0].total == pytest.approx(runs[1].total, rel=1e-6)
    assert runs[0].curves["fit"] == pytest.approx(runs[1].curves["fit"], rel=1e-6)
    assert runs[0].items == runs[1].items > 4 * size


def test_parts_without_items() -> None:
    with pytest.raises(ConfigError, match="2 items for 3 parts"):
        trained(Plan(steps=1, accumulate=3), Regression(Numbers(size=2)))
    with pytest.raises(ConfigError) as caught:
        trained(Plan(steps=1, accumulate=2), Regression(Numbers(empty=True)))
    assert str(caught.value) == (
        "a part of a batch is empty.\n"
        "  where     step 0\n"
        "  got       2 parts without items\n"
        "  expected  at least one item for each micro-batch of each process\n"
        "  try       a larger batch_size, a smaller accumulate, or fewer processes"
    )


def test_bf16_keeps_weights_in_fp32() -> None:
    objective, seen = Regression(), []
    hook = objective.student.body[0].register_forward_hook(lambda *a: seen.append(a[2].dtype))
    run = fit(objective, Plan(steps=5, lr=0.05, precision="bf16", ema=0.9), parts=ALL)
    hook.remove()
    full = fit(Regression(), Plan(steps=5, lr=0.05, ema=0.9), parts=ALL)
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in objective.parameters()} == {torch.float32}
    assert run.total != full.total
    assert run.total == pytest.approx(full.total, rel=0.05)


@many_workers
def test_workers_change_nothing() -> None:
    plan = Plan(steps=4, lr=0.05, accumulate=2)
    expected = trained(plan)
    for workers in (1, 2, 4):
        assert same(weights(trained(plan, workers=workers)), weights(expected))


@many_workers
@pytest.mark.parametrize("workers", [0, 2])
def test_errors_of_the_source_keep_their_text(workers: int) -> None:
    with pytest.raises(DataError) as caught:
        trained(Plan(steps=4), Regression(Numbers(broken=2)), workers=workers)
    assert str(caught.value) == (
        "an image is damaged.\n  where     step 2\n  try       leave it out"
    )


# ---------------------------------------------------------------------------------------- not finite


def test_a_step_that_is_not_finite_is_left_out() -> None:
    objective, other = Regression(bad=(0, 1)), Regression()
    # The norm counts the batch of a skipped step too, so it stays out of this comparison.
    run = fit(objective, Plan(steps=2), parts=("student.body.0",))
    assert run.skipped == 2
    assert same(weights(objective), weights(other))
    assert math.isnan(run.curves["fit"][0])
    assert run.curves["size"][0] > 0


def test_a_gradient_that_is_not_finite_is_left_out() -> None:
    class Root(Regression):
        def forward(self, drawn: fitting.Rows, step: int) -> dict[str, Tensor]:
            return {"root": (self.student.body[0].weight * 0).sum().sqrt()}

    objective = Root()
    assert fit(objective, Plan(steps=3), parts=("student.body.0",)).skipped == 3
    assert same(weights(objective), weights(Root()))
    with pytest.raises(ConfigError, match="got       root 0, gradient nan"):
        fit(objective, Plan(steps=3, clip=None, tolerance=1), parts=("student.body.0",))


def test_divergence_is_an_error() -> None:
    objective = Regression(bad=(1, 2, 3))
    with pytest.raises(ConfigError) as caught:
        fit(objective, Plan(steps=9, lr=0.1, tolerance=3), parts=ALL)
    size = 1e-3 * float(objective.student.body[0].weight.detach().square().sum())
    assert str(caught.value) == (
        "training diverged: 3 steps in a row were not finite.\n"
        "  where     step 3\n"
        f"  got       fit nan, size {size:g}, gradient nan\n"
        "  expected  finite losses and gradients\n"
        "  try       a lower rate than 0.1, and images and weights without NaN"
    )
    assert objective.training
    assert all(p.grad is None for p in objective.parameters())


# ---------------------------------------------------------------------------------- what is recorded


def test_curve_is_short() -> None:
    run = Run(total=[1.0, math.nan, 4.0, 6.0])
    assert run.curve() == [1.0, 4.0, 6.0]
    assert run.curve(2) == [2.5, 6.0]


def test_a_term_may_begin_late() -> None:
    class Late(Regression):
        def forward(self, drawn: fitting.Rows, step: int) -> dict[str, Tensor]:
            terms = super().forward(drawn, step)
            return terms if step else {"fit": terms["fit"]}

    run = fit(Late(), Plan(steps=3), parts=ALL)
    assert math.isnan(run.curves["size"][0])
    assert [len(c) for c in run.curves.values()] == [3, 3]
    assert run.total[2] == pytest.approx(run.curves["fit"][2] + run.curves["size"][2])


@many_workers
def test_time_spent_waiting() -> None:
    slow = fit(Regression(Numbers(sleep=0.02)), Plan(steps=4), parts=ALL)
    assert 0.5 < slow.data_wait < 1
    assert slow.seconds_per_step > 0.02
    assert slow.items_per_second == pytest.approx(slow.items / slow.seconds)
    assert Run().data_wait == Run().seconds_per_step == Run().items_per_second == 0


def test_the_cost_is_told_first(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "samcompress.fit")
    draws: list[int] = []

    class Counted(Numbers):
        def draw(self, step: int, share: Share) -> fitting.Rows:
            draws.append(step)
            return super().draw(step, share)

    plan = Plan(steps=120, lr=0.05, ema=0.9)
    objective = trained(plan, Regression(Counted()))
    assert draws == [0, 0, 0, *range(120)]
    first, *_, last = caplog.messages
    size = sum(t.nbytes for t in objective.state_dict().values())
    size += 3 * sum(p.nbytes for p in objective.parameters())
    assert re.match(
        rf"120 steps at \S+ s: 0:00:0\d in all; checkpoint of {size / 1e6:.3g} MB; "
        r"at most \S+ GB of memory so far$",
        first,
    )
    assert re.match(r"120 steps in \S+ s, 0 skipped; \S+ items/s, \d+ % of the time waiting", last)


def test_a_rehearsal_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan(steps=40, lr=0.05)
    rehearsed = trained(plan)
    monkeypatch.setattr(_fit, "REHEARSALS", 0)
    assert same(weights(trained(plan)), weights(rehearsed))


def test_short_and_resumed_runs_are_not_rehearsed(tmp_path: Path) -> None:
    calls: list[int] = []

    class Counted(Regression):
        def forward(self, drawn: fitting.Rows, step: int) -> dict[str, Tensor]:
            calls.append(step)
            return super().forward(drawn, step)

    trained(Plan(steps=39), Counted())
    assert calls == list(range(39))
    calls.clear()
    plan, place = Plan(steps=40, save_seconds=0), tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        trained(plan, Counted(stop=10), checkpoint=place)
    trained(plan, Counted(), checkpoint=place)
    assert calls == [0, *range(11), *range(10, 40)]


def test_windows_are_told(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_fit, "LOG_SECONDS", 0.0)
    caplog.set_level(logging.INFO, "samcompress.fit")
    run = fit(Regression(), Plan(steps=2, lr=0.5), parts=ALL)
    assert re.match(
        rf"step 2 of 2: loss {run.total[1]:.4g}, fit {run.curves['fit'][1]:.4g}, size \S+; "
        r"rate 0.5; \S+ items/s, \d+ % of the time waiting for data$",
        caplog.messages[1],
    )


def test_progress_counts_the_steps_that_are_left(tmp_path: Path) -> None:
    events: list[tuple[str, int, int | None]] = []
    progress = Progress(lambda e: events.append((e.label, e.done, e.total)), "x")
    plan, place = Plan(steps=4, save_seconds=0), tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        trained(plan, Regression(stop=2), checkpoint=place)
    trained(plan, checkpoint=place, progress=progress)
    assert events == [("steps", 1, 2), ("steps", 2, 2)]


# ---------------------------------------------------------------------------------------- resuming


@many_workers
@pytest.mark.parametrize(
    ("workers", "options"),
    [
        (0, {"ema": 0.9}),
        (2, {"ema": 0.9}),
        (0, {"optimizer": "adam", "schedule": "constant"}),
        (0, {"accumulate": 1, "precision": "bf16"}),
    ],
    ids=str,
)
def test_interrupted_equals_uninterrupted(
    tmp_path: Path, workers: int, options: dict[str, object]
) -> None:
    plan = Plan(**{"steps": 6, "lr": 0.05, "accumulate": 2, "save_seconds": 0, **options})
    whole = Regression(bad=(1,))
    expected = fit(whole, plan, parts=ALL, checkpoint=tmp_path / "whole", workers=workers)
    place = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        trained(plan, Regression(stop=3, bad=(1,)), checkpoint=place, workers=workers)
    second = Regression(bad=(1,))
    run = fit(second, plan, parts=ALL, checkpoint=place, workers=workers)
    assert (run.resumed, run.step, run.skipped) == (3, 6, 1)
    assert same(weights(whole), weights(second))
    # As text, for there NaN equals NaN.
    assert str(run.total) == str(expected.total)
    assert str(sorted(run.curves.items())) == str(sorted(expected.curves.items()))
    assert (run.items, run.resumed, expected.resumed) == (expected.items, 3, 0)
    assert equal_files(place, tmp_path / "whole")
    # A finished run is not run again.
    third = Regression(stop=0)
    again = fit(third, plan, parts=ALL, checkpoint=place)
    assert (again.resumed, again.step) == (6, 6)
    assert same(weights(third), weights(whole))
    # Also the head that is thrown away is stored.
    stored = _fit.trained(place)
    assert stored.keys() == whole.state_dict().keys()
    assert all(torch.equal(stored[k], v) for k, v in whole.named_parameters())


def equal_files(a: Path, b: Path) -> bool:
    """Weights, averages, optimiser and curves."""
    left, right = load_file(a), load_file(b)
    return left.keys() == right.keys() and all(
        torch.equal(left[k].nan_to_num(7.0), right[k].nan_to_num(7.0)) for k in left
    )


def test_killed_at_any_moment(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    trained(fitting.KILLED, parts=("",), checkpoint=whole)
    place = tmp_path / "killed"
    command = [sys.executable, fitting.__file__, "killed", str(tmp_path)]
    seen = -1.0
    for _ in range(2):
        process = subprocess.Popen(command, env=fitting.environment())
        while process.poll() is None and (not place.exists() or place.stat().st_mtime <= seen):
            time.sleep(0.01)
        time.sleep(0.1 * random.random())
        process.kill()
        assert process.wait() == -signal.SIGKILL
        seen = place.stat().st_mtime
    assert _saved.read(place)[1]["step"] < fitting.KILLED.steps
    run = fit(Regression(), fitting.KILLED, parts=("",), checkpoint=place)
    assert run.resumed > 0
    assert equal_files(place, whole)


@pytest.mark.usefixtures("_ctrl_c")
def test_ctrl_c_loses_nothing(tmp_path: Path) -> None:
    plan, place = Plan(steps=6, lr=0.05, ema=0.9), tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        trained(plan, Regression(Numbers(interrupt=(3,))), checkpoint=place)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    resumed = Regression()
    assert fit(resumed, plan, parts=ALL, checkpoint=place).resumed == 3
    assert same(weights(resumed), weights(trained(plan)))


@pytest.mark.usefixtures("_ctrl_c")
def test_ctrl_c_in_the_last_step(tmp_path: Path) -> None:
    class Late(Regression):
        def forward(self, drawn: fitting.Rows, step: int) -> dict[str, Tensor]:
            if step == 2:
                signal.raise_signal(signal.SIGINT)
            return super().forward(drawn, step)

    place = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        trained(Plan(steps=3), Late(), checkpoint=place)
    assert _saved.read(place)[1]["step"] == 3


@pytest.mark.usefixtures("_ctrl_c")
def test_ctrl_c_twice_or_without_checkpoint_is_at_once(tmp_path: Path) -> None:
    place = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        trained(Plan(steps=6), Regression(Numbers(interrupt=(3, 3))), checkpoint=place)
    assert not place.exists()
    objective = Regression(Numbers(interrupt=(0,)))
    with pytest.raises(KeyboardInterrupt):
        trained(Plan(steps=6), objective)
    assert same(weights(objective), weights(Regression()))


def test_checkpoints_are_as_rare_as_asked(tmp_path: Path) -> None:
    place = tmp_path / "run.safetensors"
    with pytest.raises(KeyboardInterrupt):
        trained(Plan(steps=6), Regression(stop=5), checkpoint=place)
    assert not place.exists()
    trained(Plan(steps=6), checkpoint=place)
    assert [p.name for p in tmp_path.iterdir()] == ["run.safetensors"]


def test_checkpoint_of_another_run(tmp_path: Path) -> None:
    place, plan = tmp_path / "run.safetensors", Plan(steps=2)
    trained(plan, checkpoint=place, identity={"data": "a"})
    with pytest.raises(CheckpointError) as caught:
        trained(replace(plan, lr=0.5), checkpoint=place, identity={"data": "a"})
    assert str(caught.value) == (
        "the training checkpoint is of another run: lr differs.\n"
        f"  where     {place}\n"
        "  got       0.001\n"
        "  expected  0.5\n"
        "  try       delete the file to begin anew, or use another folder"
    )
    with pytest.raises(CheckpointError, match="data differs"):
        trained(plan, checkpoint=place, identity={"data": "b"})
    # How a batch is divided does not make another run.
    trained(replace(plan, accumulate=2), checkpoint=place, identity={"data": "a"})


def test_damaged_checkpoint(tmp_path: Path) -> None:
    place = tmp_path / "run.safetensors"
    trained(Plan(steps=2), checkpoint=place)
    place.write_bytes(place.read_bytes()[:-10])
    with pytest.raises(CheckpointError) as caught:
        trained(Plan(steps=2), checkpoint=place)
    text = str(caught.value)
    assert text.startswith(
        f"the training checkpoint cannot be read.\n  where     {place}\n  got       SafetensorError"
    )
    assert text.endswith("  try       delete the file to begin anew")
    save_file({"a": torch.zeros(1)}, place)
    with pytest.raises(CheckpointError, match="cannot be read"):
        _fit.trained(place)


def test_a_full_disk_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, place = Plan(steps=3, save_seconds=0), tmp_path / "run.safetensors"
    with pytest.raises(KeyboardInterrupt):
        trained(plan, Regression(stop=1), checkpoint=place)
    kept = place.read_bytes()

    def full(tensors: object, path: Path, **_: object) -> None:
        path.write_bytes(b"half")
        raise SafetensorError("No space left on device")

    with monkeypatch.context() as patch, pytest.raises(CheckpointError) as caught:
        patch.setattr(_saved, "save_file", full)
        trained(plan, checkpoint=place)
    assert "No space left on device" in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == [place.name]
    assert place.read_bytes() == kept
    assert same(weights(trained(plan, checkpoint=place)), weights(trained(plan)))


# ------------------------------------------------------------------------------------- what trains


def test_nothing_to_train() -> None:
    with pytest.raises(NoEffectError) as caught:
        _fit.trainable(Regression(), ("student.body.2",))
    assert str(caught.value) == (
        "there is nothing to train.\n  where     student.body.2\n  got       no floating-point weights"
    )


def test_half_precision_is_refused() -> None:
    with pytest.raises(ModelError) as caught:
        _fit.trainable(Net(norm=True, dropout=0.0).half(), ("head",))
    assert str(caught.value) == (
        "weights can only be trained in float32.\n"
        "  where     head.0.weight\n"
        "  got       torch.float16\n"
        "  try       model.float() first; reduce the precision afterwards"
    )
