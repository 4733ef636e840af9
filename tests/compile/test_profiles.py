"""Choosing by measuring: candidates, the bound on masks, threads, and devices that are absent."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import random_sam
from torch import nn

import samcompress as sc
from samcompress.compile import profiles
from samcompress.compile.profiles import Choice, Profile, for_device
from samcompress.core import devices
from samcompress.core.errors import BackendError, ConfigError, ModelError
from samcompress.core.timing import Rounds

FEW = Rounds(warmup_calls=0, warmup_seconds=0, calls=2, seconds=0, max_seconds=20)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Milliseconds by chain, instead of what this machine does meanwhile; 10 where not told."""
    told: dict[str, float] = {}

    def times(self: Profile, made: Any, base: Any, at: Any, counts: Any) -> tuple[float, float]:
        steps = sc.lineage(made)
        name = " | ".join(s.transform.label for s in steps) or "as it is"
        return told.get(f"{name} x{max(counts, default=0)}", told.get(name, 10.0)), 10.0

    monkeypatch.setattr(Profile, "_times", times)
    return told


@pytest.fixture
def chains(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What is tried; the empty chain is always first."""
    found: list[tuple[Any, ...]] = [()]

    def given(self: Profile, model: nn.Module) -> Iterator[tuple[Any, ...]]:
        yield from found

    monkeypatch.setattr(Profile, "chains", given)
    return found


def choose(model: Any, *, data: Any = None, **settings: Any) -> Choice:
    profile = for_device("cpu", rounds=FEW, images=2, **{"threads": (1,), **settings})
    return profile(model, data=data, progress=False)


def test_the_fastest_with_the_same_masks_wins(clock: dict[str, float], chains: list[Any]) -> None:
    sam = random_sam()
    chains += [(sc.attention.Fused(),), (sc.prune.Mlp(ratio=0.9, criterion="magnitude"),)]
    clock.update({"attention.fused": 5.0, "prune.mlp": 1.0})
    found = choose(sam)
    assert found.pipeline == sc.Pipeline([sc.attention.Fused()])
    assert [s.transform for s in sc.lineage(found.model)] == [sc.attention.Fused()]
    base, fused, pruned = found.trials
    assert (base.agreement, base.speedup, base.reason) == (1, 1, None)
    assert fused.agreement == pytest.approx(1, abs=0.01)
    assert (fused.speedup, fused.ms) == (2, 5)
    assert pruned.reason == "masks differ: below 0.98"
    assert pruned.speedup == 10
    lines = {r["chain"]: r for r in found.table().records()}
    assert lines["attention.fused"]["result"] == "chosen"
    assert "masks differ" in lines["prune.mlp"]["result"]
    assert devices.cpu_name() in repr(found)
    assert "<table" in found._repr_html_()
    # A looser bound, and the other wins.
    assert choose(sam, agreement=0.0).best.name == "prune.mlp"
    assert not sc.lineage(sam)


def test_nothing_faster_gives_the_model_back(clock: dict[str, float], chains: list[Any]) -> None:
    sam = random_sam()
    chains.append((sc.attention.Fused(),))
    clock["attention.fused"] = 11.0
    found = choose(sam)
    assert found.pipeline is None
    assert found.model is not sam
    for a, b in zip(sam.parameters(), found.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_cannot_run_is_a_line(clock: dict[str, float], chains: list[Any]) -> None:
    chains += [(sc.prune.Mlp(),), (sc.compile.Export(backend="openvino", precision="int8"),)]
    found = choose(random_sam())
    assert found.best.name == "as it is"
    for trial in found.trials[1:]:
        assert trial.reason.startswith("not measured: ")
        assert trial.ms is None
    assert found.trials[2].name == "compile.export(openvino, int8)"


def test_numbers_that_are_none_do_not_win(clock: dict[str, float], chains: list[Any]) -> None:
    chains.append((sc.attention.Fused(),))
    clock["attention.fused"] = 1.0
    sam = random_sam()
    real = profiles._agreement
    seen: list[int] = []

    def agreement(found: Any, expected: Any) -> float:
        seen.append(1)
        return real(found, expected) if len(seen) == 1 else float("nan")

    profiles._agreement = agreement
    try:
        assert choose(sam).best.name == "as it is"
    finally:
        profiles._agreement = real


def test_threads_are_chosen(clock: dict[str, float], chains: list[Any]) -> None:
    clock.update({"as it is x1": 9.0, "as it is x2": 5.05, "as it is x4": 5.0, "as it is x8": 6.0})
    found = choose(random_sam(), threads=(1, 2, 4, 8))
    assert found.by_threads == {8: 6.0, 4: 5.0, 2: 5.05, 1: 9.0}
    assert found.threads == 2  # as good as four, within what is noise
    assert "chosen: 2" in repr(found)


def test_numbers_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    for cpus, counts in ((1, (1,)), (2, (1, 2)), (6, (1, 2, 4, 6)), (8, (1, 2, 4, 8))):
        monkeypatch.setattr(devices, "cpus", lambda cpus=cpus: list(range(cpus)))
        assert for_device("cpu")._counts() == counts
    assert for_device("cpu", threads=(4, 1, 4))._counts() == (1, 4)
    assert for_device("cuda")._counts() == ()


def test_candidates_come_from_the_support_table(monkeypatch: pytest.MonkeyPatch) -> None:
    sam = random_sam()
    tried = [profiles.Trial(steps=s).name for s in for_device("cpu").chains(sam)]
    assert tried[:2] == ["as it is", "attention.fused"]
    for backend in profiles.BACKENDS.values():
        for dtype in backend.dtypes:
            name = f"attention.fused | compile.export({backend.name}, {dtype})"
            assert (name in tried) == ("cpu" in backend.devices)
    cuda = [profiles.Trial(steps=s).name for s in for_device("cuda").chains(sam)]
    assert "attention.fused | quantize.b_float16 | compile.torch" in cuda
    assert not any("onnxruntime" in name for name in cuda)
    # A model that the exact gains do not fit goes without them.
    other = sc.substitute.RepViT() | sc.substitute.Conventions(of="edge_sam", stability=True)
    edge = other(sc.build("tiny"), progress=False)
    assert not any("fused" in profiles.Trial(steps=s).name for s in for_device("cpu").chains(edge))


@pytest.mark.slow
def test_real_times_of_one_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    monkeypatch.setattr(profiles, "IN_TORCH", {})
    fake = types.SimpleNamespace(name="onnxruntime", devices=("cpu",), dtypes=("float32",))
    monkeypatch.setattr(profiles, "BACKENDS", {"onnxruntime": fake})
    found = choose(sc.load("tiny"), data=sc.shapes(2))
    assert [t.name for t in found.trials] == [
        "as it is", "attention.fused", "attention.fused | compile.export(onnxruntime, float32)"
    ]  # fmt: skip
    assert all(t.agreement > 0.99 and t.ms > 0 for t in found.trials)
    assert found.best.speedup == max(t.speedup for t in found.trials)
    assert set(found.by_threads) == {1}


def test_device_that_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"'cuda' is not there[\s\S]*doctor"):
        for_device("cuda")(random_sam())
    with pytest.raises(ConfigError, match="'npu' is not a device"):
        for_device("npu")


def test_edge_tpu_is_refused_without_a_converter(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = types.SimpleNamespace(hindrance=lambda precision: BackendError("no converter."))
    monkeypatch.setattr(profiles, "BACKENDS", {"litert": refused})
    with pytest.raises(BackendError, match=r"nothing here runs[\s\S]*libedgetpu[\s\S]*RepViT"):
        for_device("edge-tpu")(random_sam())


def test_edge_tpu_with_a_converter_shows_the_checkers_report(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ready = types.SimpleNamespace(hindrance=lambda precision: None)
    monkeypatch.setattr(profiles, "BACKENDS", {"litert": ready})
    monkeypatch.setattr(profiles, "Export", lambda **params: sc.attention.Fused())
    sam = random_sam()
    said = [{"title": "3 of 40 operators"}]
    monkeypatch.setattr(type(sam.image_encoder), "checks", lambda self: said, raising=False)
    found = for_device("edge-tpu", images=1)(sam)
    (trial,) = found.trials
    assert trial.ms is None
    assert trial.reason.startswith("3 of 40 operators; time not measured")
    assert "Edge TPU" in repr(found)


def test_mistakes() -> None:
    for setting in ({"agreement": 2}, {"prompts": 0}, {"images": 0}, {"threads": (0,)}):
        with pytest.raises(ConfigError, match=f"{next(iter(setting))} is out of range"):
            for_device("cpu", **setting)
    with pytest.raises(ConfigError, match=r"no such setting[\s\S]*speed"):
        for_device("cpu", speed=3)
    with pytest.raises(ModelError, match="not a SAM"):
        for_device("cpu")(nn.Linear(1, 1))


def test_images_without_objects() -> None:
    empty = sc.data.Sample.from_arrays("a", sc.shapes(1)[0].image, [])
    with pytest.raises(ConfigError, match=r"cannot be compared[\s\S]*no image with an object"):
        choose(random_sam(), data=[empty])
