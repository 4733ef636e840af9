from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import fitting
import pytest
import torch
from fitting import SHARED, Numbers, Regression, same, shared, weights
from safetensors.torch import load_file
from torch import Tensor

from samcompress.core import _saved
from samcompress.core._engine import Accelerate, Engine, Fabric, engine_for
from samcompress.core._fit import Plan, fit
from samcompress.core.errors import CheckpointError, ConfigError, MissingDependencyError

CPU = torch.device("cpu")


class One(Engine):
    """One of several processes, alone; what the others say is added to its own numbers."""

    def __init__(self, count: int, others: tuple[float, ...]) -> None:
        self.count, self.others = count, others

    def sum(self, values: Tensor) -> Tensor:
        return values + torch.tensor(self.others) if len(values) == len(self.others) else values


def adapter(name: str) -> Engine:
    if name == "accelerate":
        pytest.importorskip("accelerate")
        return Accelerate(CPU)
    lightning = pytest.importorskip("lightning_fabric")
    return Fabric(lightning.Fabric(accelerator="cpu", devices=1))


@pytest.mark.parametrize("name", ["accelerate", "fabric"])
@pytest.mark.parametrize("plan", [Plan(steps=5, accumulate=2), Plan(steps=5, precision="bf16")])
def test_adapters_give_the_same_losses(name: str, plan: Plan) -> None:
    expected, found = Regression(), Regression()
    first = fit(expected, plan, parts=("",))
    engine = adapter(name)
    second = fit(found, plan, parts=("",), engine=engine)
    assert (engine.index, engine.count, engine.is_main) == (0, 1, True)
    assert first.total == second.total
    assert same(weights(expected), weights(found))


# For accelerate, "multi_gpu" is one machine with several processes, whatever their devices.
LAUNCH = "--multi_gpu --num_processes=2 --num_machines=1 --mixed_precision=no --dynamo_backend=no"
COMMANDS = {
    "accelerate": ["accelerate.commands.launch", *LAUNCH.split(), "--main_process_port=0"],
    "fabric": ["torch.distributed.run", "--standalone", "--nproc_per_node=2"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_two_processes_equal_one(name: str, tmp_path: Path) -> None:
    """5 of 7 items a step in 2 or 4 parts: other numbers of items and rows in each."""
    pytest.importorskip("accelerate" if name == "accelerate" else "lightning_fabric")
    done = subprocess.run(
        [sys.executable, "-m", *COMMANDS[name], fitting.__file__, name, str(tmp_path)],
        env=fitting.environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    objective, run = shared(None, 1)
    expected = {**weights(objective), "total": torch.tensor(run.total, dtype=torch.float64)}
    for accumulate in (1, 2):
        main, other = (load_file(tmp_path / f"{name}-{accumulate}-{r}") for r in (0, 1))
        assert same(main, other)
        assert main.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.allclose(main[key], value, rtol=0, atol=1e-6), key
        # What two processes wrote, one can read.
        place = tmp_path / f"{name}-{accumulate}"
        assert _saved.read(place)[1]["items"] == run.items
        again, seen = shared(place, 1)
        assert seen.resumed == SHARED.steps
        assert same(weights(again), {k: v for k, v in main.items() if k != "total"})


def test_all_stop_when_one_is_asked_to(tmp_path: Path) -> None:
    objective, place = Regression(), tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        fit(
            objective,
            Plan(steps=3),
            parts=("",),
            checkpoint=place,
            engine=One(2, (0.0, 0.0, 1.0)),
        )
    assert _saved.read(place)[1]["step"] == 0
    assert same(weights(objective), weights(Regression()))


def test_fewer_items_than_processes() -> None:
    with pytest.raises(ConfigError, match="1 items for 2 parts"):
        fit(Regression(Numbers(size=1)), Plan(steps=1), parts=("",), engine=One(2, ()))


def test_processes_that_found_different_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        fit(
            Regression(),
            Plan(steps=3),
            parts=("",),
            checkpoint=tmp_path / "run",
            engine=One(2, (2.0,)),
        )
    assert str(caught.value) == (
        "processes found different checkpoints.\n"
        f"  where     {tmp_path / 'run'}\n"
        "  got       step 0 in process 0, another one elsewhere\n"
        "  expected  one file that all processes see\n"
        "  try       a folder that all machines share"
    )


def test_other_processes_write_and_show_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = One(2, ())
    engine.index = 1
    caplog.set_level("INFO", "samcompress.fit")
    plan = Plan(steps=40, save_seconds=0)
    fit(Regression(), plan, parts=("",), checkpoint=tmp_path / "run", engine=engine)
    assert list(tmp_path.iterdir()) == []
    assert caplog.messages == []


def test_accelerate_where_there_are_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert type(engine_for(CPU)) is Engine
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert type(engine_for(CPU)) is Engine
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(MissingDependencyError) as caught:
        engine_for(CPU)
    assert str(caught.value).startswith(
        "accelerate is needed for training in several processes and could not be imported."
    )
    assert str(caught.value).endswith("  try       pip install 'samcompress[train]'")


@pytest.mark.parametrize("name", ["accelerate", "fabric"])
def test_model_on_another_device(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        fit(Regression().to("meta"), Plan(steps=1), parts=("",), engine=adapter(name))
    assert str(caught.value) == (
        "the model is not on the device of its process.\n"
        "  got       meta\n"
        "  expected  cpu\n"
        '  try       device="cpu", or torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))'
    )


def test_importing_needs_none_of_them() -> None:
    line = "import sys, samcompress.core._fit; print({'accelerate', 'lightning_fabric'} & {*sys.modules})"
    found = subprocess.check_output([sys.executable, "-c", line], env=fitting.environment())
    assert found.strip() == b"set()"
    assert "WORLD_SIZE" not in os.environ
