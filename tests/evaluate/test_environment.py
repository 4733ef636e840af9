"""The record of machine and software, and what doctor says about them."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import samcompress as sc
from samcompress.core import registry
from samcompress.core.errors import BackendError, MissingDependencyError, SamCompressError
from samcompress.evaluate import doctor, environment

module = importlib.import_module("samcompress.evaluate.environment")


def test_record_is_whole_and_plain() -> None:
    found = environment()
    assert json.loads(json.dumps(found)) == found
    assert found["samcompress"] == sc.__version__
    assert found["versions"]["torch"] == importlib.metadata.version("torch")
    assert found["threads"] == torch.get_num_threads()
    assert found["cpu"]
    assert found["logical_cores"] >= (found["cores"] or 1)
    wanted = {"commit", "dirty", "kernel", "container", "affinity", "governor", "gpus", "python"}
    assert wanted <= found.keys()


def test_commit_only_in_a_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "ROOT", tmp_path)
    assert module._commit() == {"commit": None, "dirty": None}
    if module._run("git", "--version") is None:
        pytest.skip("git is not installed")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@example.org"]
    (tmp_path / "a").write_text("1")
    for command in (["init", "-q"], ["add", "a"], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *command], check=True, capture_output=True)
    clean = module._commit()
    assert len(clean["commit"]) == 40
    assert clean["dirty"] is False
    (tmp_path / "a").write_text("2")
    assert module._commit() == {"commit": clean["commit"], "dirty": True}


def test_tools_that_fail_leave_a_gap() -> None:
    assert module._run("no-such-program-anywhere") is None
    assert module._run(sys.executable, "-c", "raise SystemExit(3)") is None
    assert module._read("/no/such/file") is None


def test_gpus_as_the_driver_lists_them(monkeypatch: pytest.MonkeyPatch) -> None:
    line = "Some GPU, 550.1, 24564, 210, 2520, 450.00, 35, [N/A]"
    monkeypatch.setattr(module, "_run", lambda *command: line)
    (gpu,) = module._gpus()
    assert (gpu["name"], gpu["driver"], gpu["clock_mhz"]) == ("Some GPU", "550.1", "210")
    assert gpu["mig"] == "[N/A]"


def test_doctor_of_this_machine() -> None:
    checks = {check.name: check for check in doctor()}
    assert checks["python"].ok
    assert checks["torch"].status == "ready"
    assert checks["device cpu"].status == "ready"
    for kind in ("cuda", "mps"):
        check = checks[f"device {kind}"]
        assert check.ok
        assert check.detail
    assert all(check.ok for name, check in checks.items() if not name.startswith("plug-in"))


def test_doctor_names_the_line_that_mends(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else real(name)
    )
    versions = {"torch": "2.1.0", "numpy": "2.0.0rc1"}
    monkeypatch.setattr(module, "_version", lambda name: versions.get(name, "99"))
    monkeypatch.setattr(module, "plugin_failures", lambda: {"mine": "ImportError: no b"})
    checks = {check.name: check for check in doctor()}
    onnx = checks["extra onnx"]
    assert (onnx.status, onnx.fix) == ("absent", "pip install 'samcompress[onnx]'")
    assert onnx.detail.startswith("onnxruntime not installed")
    torch_check = checks["torch"]
    assert (torch_check.status, torch_check.detail) == ("broken", "2.1.0 is too old")
    assert torch_check.fix == "pip install -U 'torch>=2.8'"
    assert checks["numpy"].ok
    plugin = checks["plug-in mine"]
    assert (plugin.status, plugin.detail) == ("broken", "ImportError: no b")
    assert "mine" in plugin.fix


def test_doctor_without_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_version", lambda name: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    checks = {check.name: check for check in doctor()}
    assert checks["safetensors"].status == "broken"
    assert checks["safetensors"].fix == "pip install 'safetensors>=0.4'"


def test_doctor_says_which_techniques_need_an_extra() -> None:
    users = [n for n in sc.list_transforms() if "onnx" in registry.find(n).extras]
    (check,) = [c for c in doctor() if c.name == "extra onnx"]
    assert all(name in check.detail for name in users)


def test_doctor_says_which_runtimes_are_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing package is said once, beside its extra."""
    step = registry.find("compile.export")
    reasons: dict[str, SamCompressError | None] = {
        "runtime here": None,
        "runtime half": BackendError("half needs a compiler.", got="none", fix="apt-get install"),
        "runtime absent": MissingDependencyError("absent is needed."),
    }
    monkeypatch.setattr(step, "readiness", classmethod(lambda cls: reasons))
    found = {c.name: (c.status, c.detail, c.fix) for c in doctor() if c.name.startswith("runtime ")}
    assert found == {
        "runtime here": ("ready", "for compile.export", None),
        "runtime half": ("absent", "half needs a compiler. none", "apt-get install"),
    }


def test_runtimes_of_this_machine() -> None:
    named = {c.name for c in doctor() if c.name.startswith("runtime ")}
    rows = registry.find("compile.export").readiness()
    assert {name for name, err in rows.items() if err is None} <= named <= set(rows)
