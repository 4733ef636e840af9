"""Another machine: launchers, what is sent and comes back, and everything that can go wrong."""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import os
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import random_sam

import samcompress as sc
from samcompress.core.data import Dataset
from samcompress.core.data._sample import Held
from samcompress.core.errors import BackendError, CheckpointError, ConfigError
from samcompress.evaluate import Rounds, benchmark, runner
from samcompress.evaluate._parcel import HEADER, Sent, header, pack, unpack, write_data
from samcompress.evaluate.remote import Launcher
from samcompress.evaluate.row import Job
from samcompress.evaluate.schema import check

FEW = Rounds(warmup_calls=0, warmup_seconds=0, calls=2, seconds=0, max_seconds=20)
FAST: dict[str, Any] = {"rounds": FEW, "memory": False, "progress": False, "threads": 1}
HERE = "cmd:{python} {runner}"
Answer = Callable[[list[str], Path | None], tuple[bytes, bytes]]


@pytest.fixture(scope="module")
def data() -> Any:
    return sc.shapes(2, size=48)


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    other = random_sam()
    with torch.no_grad():
        other.mask_decoder.mask_tokens.weight.mul_(0.9)
    return {"base": random_sam(), "other": other}


def reply(value: Any) -> bytes:
    content = json.dumps(value).encode()
    return header(len(content), hashlib.sha256(content).hexdigest()) + content


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """The runner in this process: what it costs to start an interpreter is paid in two tests."""
    requests: list[Any] = []

    def run(self: Launcher, words: list[str], given: Path | None) -> tuple[bytes, bytes]:
        folder = tmp_path_factory.mktemp("there")
        assert given is not None
        with given.open("rb") as file:
            unpack(file, folder)
        requests.append(json.loads((folder / "request.json").read_text()))
        return b"Welcome to the machine\n" + reply(runner.answer(folder)), b""

    monkeypatch.setattr(Launcher, "_run", run)
    return requests


def program(folder: Path, name: str, code: str) -> Path:
    """An executable of a few lines of Python."""
    path = folder / name
    path.write_text(f"#!{sys.executable}\nimport os, sys, time\n{code}\n")
    path.chmod(0o755)
    return path


def test_same_rows_there_as_here(
    models: dict[str, Any], data: Any, inside: list[Any], tmp_path: Path
) -> None:
    here = benchmark(models, data, **FAST)
    out = tmp_path / "r.json"
    there = benchmark(models, data, on=HERE, devices=("cpu", "mps"), out=out, **FAST)
    check(json.loads(out.read_text()))
    assert [r["kind"] for r in inside] == ["look", "row", "row"]
    assert there.doc["settings"]["on"] == HERE
    assert there.doc["environment"]["cpu"]
    for mine, its in zip(here.rows, there.rows[:2], strict=True):
        for key in ("accuracy", "identity", "weights_sha256", "params", "macs", "lineage", "base"):
            assert mine[key] == its[key], key
        assert its["latency"]["encoder"]["n"] >= 2
    assert there.rows[1]["latency"]["vs_base"]["end_to_end"] > 0
    assert there.rows[1]["accuracy"][0]["agreement"] == here.rows[1]["accuracy"][0]["agreement"]
    absent = [(r["status"], r["reason"]) for r in there.rows[2:]]
    assert absent == [("not_measured", runner.unavailable("mps"))] * 2


def test_finished_rows_are_taken_over(
    models: dict[str, Any], data: Any, inside: list[Any], tmp_path: Path
) -> None:
    settings = {**FAST, "on": HERE, "out": tmp_path / "r.json", "latency": False}
    first = benchmark(models, data, **settings)
    assert len(inside) == 3
    assert benchmark(models, data, **settings).rows == first.rows
    assert [r["kind"] for r in inside[3:]] == ["look"]
    with pytest.raises(ConfigError, match=r"other conditions[\s\S]*settings.on"):
        benchmark(models, data, **{**settings, "on": None})


def test_boxes_and_grids_go_along(models: dict[str, Any], inside: list[Any]) -> None:
    given = next(iter(sc.shapes(1, size=48)))
    known = {"negative": (77,), "not_exhaustive": (given.instances[0].category or 0,)}
    scene = Held(given.id, given.name, given.image, given.instances, **known)
    data = Dataset([scene], "lvis", groups={i.category or 0: "rare" for i in given.instances})
    boxes = [
        {"image_id": given.id, "category_id": i.category, "bbox": [4, 4, 30, 30], "score": 0.9}
        for i in given.instances
    ]
    asked: dict[str, Any] = {**FAST, "accuracy": False, "latency": False, "detections": boxes}
    here = benchmark(models, data, everything=2, **asked).rows[1]
    there = benchmark(models, data, everything=2, on=HERE, **asked).rows[1]
    assert "rules=lvis" in here["detection"]["protocol"]
    assert set(here["detection"]["by_group"]) == {"rare"}
    assert there["detection"] == here["detection"]
    for row in (here, there):
        del row["everything"]["seconds"]
    assert json.dumps(there["everything"]) == json.dumps(here["everything"])
    with pytest.raises(ConfigError, match=r"cannot be sent[\s\S]*points along each side"):
        benchmark(models, data, everything=sc.Everything(), on=HERE, **asked)


def test_images_are_not_sent_where_only_times_are_asked_for(
    models: dict[str, Any], data: Any, tmp_path: Path
) -> None:
    assert len(write_data(data, tmp_path / "all")["samples"]) == 2
    assert len(write_data(data, tmp_path / "one", first=True)["samples"]) == 1
    assert [p.name for p in (tmp_path / "one").iterdir()] == ["0.png"]


def test_data_arrive_as_they_were(data: Any, tmp_path: Path) -> None:
    record = json.loads(json.dumps(write_data(data, tmp_path / "images")))
    sent = Sent(record, tmp_path / "images")
    assert (len(sent), sent.name) == (len(data), data.name)
    for mine, its in zip(data, sent, strict=True):
        assert np.array_equal(mine.image, its.image)
        assert np.array_equal(mine.masks(), its.masks())
        for a, b in zip(mine.instances, its.instances, strict=True):
            assert (a.id, a.category, a.area, a.box, a.crowd, a.point) == (
                b.id, b.category, b.area, b.box, b.crowd, b.point
            )  # fmt: skip
    record["length"] = 5  # three could not be read: the protocol counts them all the same
    assert len(Sent(record, tmp_path / "images")) == 5
    assert len(list(Sent(record, tmp_path / "images").readable())) == 2


def test_settings_of_a_job_come_back(data: Any) -> None:
    job = Job(
        data=data, prompts=("box",), accuracy=True, latency=False, memory=False, energy=True,
        rounds=Rounds(processes=5), batches=(1, 2), threads=1, batch_size=2,
        protocol={"choice": "oracle"}, progress=False,
    )  # fmt: skip
    assert Job.of(json.loads(json.dumps(job.settings())), data) == job
    with pytest.raises(ConfigError, match="no settings of a job"):
        Job.of({"rounds": {}}, data)


def test_parcel_arrives_whole_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "from" / "deep").mkdir(parents=True)
    (tmp_path / "from" / "deep" / "weights").write_bytes(b"x" * 3000)
    pack(tmp_path / "p", {"request": {"a": 1}}, {"this": tmp_path / "from"})
    whole = (tmp_path / "p").read_bytes()
    place = tmp_path / "to"
    place.mkdir()
    unpack(io.BytesIO(whole), place)
    assert json.loads((place / "request.json").read_text()) == {"a": 1}
    assert (place / "this" / "deep" / "weights").read_bytes() == b"x" * 3000
    assert sorted(p.name for p in place.iterdir()) == ["request.json", "this"]
    for broken, said in (
        (whole[:-1], r"did not arrive whole[\s\S]*of [\s\S]*bytes"),
        (whole[:-1] + b"!", r"did not arrive whole[\s\S]*other bytes"),
        (whole[: HEADER - 5], "no parcel of samcompress"),
        (b"", "no parcel of samcompress"),
        (b"PK" + whole[2:], "no parcel of samcompress"),
    ):
        empty = tmp_path / hashlib.sha256(broken).hexdigest()
        empty.mkdir()
        with pytest.raises(CheckpointError, match=said):
            unpack(io.BytesIO(broken), empty)
        assert not (empty / "request.json").exists()


@pytest.mark.parametrize("name", ["../out", "/abs", "a/../../out"])
def test_parcel_writes_nowhere_else(tmp_path: Path, name: str) -> None:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        tar.addfile(tarfile.TarInfo(name))
    _refused(content.getvalue(), tmp_path)


def test_parcel_holds_no_links(tmp_path: Path) -> None:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        entry = tarfile.TarInfo("link")
        entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(entry)
    _refused(content.getvalue(), tmp_path)


def _refused(tar: bytes, folder: Path) -> None:
    parcel = header(len(tar), hashlib.sha256(tar).hexdigest()) + tar
    place = folder / "to"
    place.mkdir()
    with pytest.raises(CheckpointError, match="holds more than plain files"):
        unpack(io.BytesIO(parcel), place)
    assert [p.name for p in folder.iterdir()] == ["to"]


def test_launchers_are_commands() -> None:
    ssh = Launcher("ssh:me@pi:~/venv/bin/python").words
    assert ssh[0] == "ssh"
    assert "BatchMode=yes" in ssh
    assert ssh[-2:] == ("me@pi", "~/venv/bin/python -m samcompress.evaluate.runner")
    assert Launcher("ssh:pi").words[-1].startswith("python3 -m")
    assert Launcher(HERE).words == (sys.executable, "-m", "samcompress.evaluate.runner")
    assert Launcher("cmd:phone.sh '{request}' 'a b'").words == ("phone.sh", "{request}", "a b")


@pytest.mark.parametrize(
    "spec", ["pi", "scp:pi", "ssh:", "ssh:-oProxyCommand=id", "ssh:a@-b", "ssh:pi:python -c x",
             "cmd:", "cmd:a 'b"]
)  # fmt: skip
def test_launchers_that_are_none(spec: str) -> None:
    with pytest.raises(ConfigError, match=r"launcher is not understood[\s\S]*ssh:\[USER@\]HOST"):
        Launcher(spec)


def test_a_timeout_is_a_time() -> None:
    with pytest.raises(ConfigError, match=r"timeout is out of range[\s\S]*above 0 s"):
        Launcher(HERE, timeout=0)


def test_by_a_fake_ssh_on_the_path(
    models: dict[str, Any], data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole way: another interpreter, a greeting before, prints of libraries in between."""
    program(
        tmp_path,
        "ssh",
        """
print("Last login: yesterday", flush=True)
words = sys.argv[-1].split()
assert sys.argv[1:-2] == ["-o", "BatchMode=yes", "-o", "ConnectTimeout=20"], sys.argv
assert sys.argv[-2] == "me@pi"
assert words == ["python3", "-m", "samcompress.evaluate.runner"], words
os.execv(sys.executable, [sys.executable, *words[1:]])
""",
    )
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    base = {"base": models["base"]}
    settings = {**FAST, "accuracy": False}
    report = benchmark(base, data, on="ssh:me@pi", **settings)
    assert report.rows[0]["status"] == "measured"
    assert report.rows[0]["latency"]["settings"]["interop_threads"] == 1
    assert report.doc["environment"]["versions"]["torch"]


def test_by_files_as_a_phone_wants_them(tmp_path: Path) -> None:
    """A launcher that copies a file there and one back, as ``adb push`` and ``adb pull`` do."""
    (tmp_path / "answer").write_bytes(reply({"environment": {"cpu": "arm"}, "unavailable": {}}))
    phone = program(
        tmp_path,
        "phone",
        f"""
import shutil
assert sys.stdin.read() == ""
assert open(sys.argv[1], "rb").read(11) == b"samcompress"
shutil.copy({str(tmp_path / "answer")!r}, sys.argv[2])
""",
    )
    found = Launcher(f"cmd:{phone} {{request}} {{reply}}").look(["cpu"])
    assert found["environment"] == {"cpu": "arm"}
    lazy = program(tmp_path, "lazy", "")
    with pytest.raises(BackendError, match="machine gave no reply"):
        Launcher(f"cmd:{lazy} {{request}} {{reply}}").look(["cpu"])


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("sys.exit('Permission denied (publickey).')",
         r"did not measure[\s\S]*exit code 1: Permission denied"),
        ("print('hello')", r"gave no reply[\s\S]*hello"),
        ("pass", r"gave no reply[\s\S]*no output"),
        ("os.kill(os.getpid(), 9)", r"did not measure[\s\S]*exit code -9"),
        (f"sys.stdout.buffer.write({reply({'environment': {}})[:-1]!r})",
         r"reply did not arrive whole[\s\S]*18 of 19 bytes"),
        (f"sys.stdout.buffer.write({reply([1])!r})",
         r"not what was asked for[\s\S]*environment, unavailable"),
        (f"sys.stdout.buffer.write({reply({'environment': {}})!r})", "not what was asked for"),
    ],
)  # fmt: skip
def test_machine_that_fails_at_the_start_is_an_error(
    code: str, said: str, models: dict[str, Any], data: Any, tmp_path: Path
) -> None:
    there = f"cmd:{program(tmp_path, 'there', code)}"
    with pytest.raises(BackendError, match=said):
        benchmark(models, data, on=there, out=tmp_path / "r.json", **FAST)
    assert not (tmp_path / "r.json").exists()


def test_launcher_that_is_not_installed() -> None:
    with pytest.raises(BackendError, match=r"cannot be started[\s\S]*no-such-program: No such"):
        Launcher("cmd:no-such-program").look(["cpu"])


def test_timeout_ends_the_command_and_what_it_started(tmp_path: Path) -> None:
    mark = tmp_path / "alive"
    slow = program(
        tmp_path,
        "slow",
        f"""
if os.fork() == 0:
    time.sleep(2)
    open({str(mark)!r}, "w").close()
time.sleep(60)
""",
    )
    start = time.monotonic()
    with pytest.raises(BackendError, match=r"took too long[\s\S]*more than 0.5 s"):
        Launcher(f"cmd:{slow}", timeout=0.5).look(["cpu"])
    assert time.monotonic() - start < 30
    time.sleep(2.5)
    assert not mark.exists()


def test_machine_that_fails_later_gives_rows_that_say_so(
    models: dict[str, Any], data: Any, inside: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    good = Launcher._run

    def fails(self: Launcher, words: list[str], given: Path | None) -> Any:
        out = good(self, words, given)
        if inside[-1].get("name") == "base":
            raise BackendError("the machine did not measure.", where=self.spec, got="lost power")
        return out

    monkeypatch.setattr(Launcher, "_run", fails)
    report = benchmark(models, data, on=HERE, **{**FAST, "latency": False})
    assert [r["status"] for r in report.rows] == ["not_measured", "measured"]
    assert report.rows[0]["reason"] == f"the machine did not measure. {HERE} lost power"
    assert report.rows[1]["accuracy"][0]["delta"] is None  # there is no base to compare with


def test_row_that_is_none_is_not_taken(
    models: dict[str, Any], data: Any, inside: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "_row", lambda request, folder: {"name": "base", "status": "fine"})
    report = benchmark(models, data, on=HERE, **FAST)
    assert [r["status"] for r in report.rows] == ["not_measured"] * 2
    assert "not a result file of this format" in report.rows[0]["reason"]


def test_requests_of_another_version_or_model_are_refused(tmp_path: Path) -> None:
    request = tmp_path / "request.json"
    request.write_text(json.dumps({"format": 9, "kind": "look", "devices": []}))
    with pytest.raises(CheckpointError, match=r"another version[\s\S]*format 9[\s\S]*format 1"):
        runner.answer(tmp_path)
    sc.save(random_sam(), tmp_path / "this")
    record = write_data(sc.shapes(1, size=48), tmp_path / "images")
    (tmp_path / "data.json").write_text(json.dumps(record))
    job = Job(
        data=sc.shapes(1), prompts=("box",), accuracy=False, latency=False, memory=False,
        energy=False, rounds=FEW, batches=(), threads=1, batch_size=1, protocol={}, progress=False,
    )  # fmt: skip
    asked = {
        "format": 1, "kind": "row", "name": "x", "base": "x", "device": "cpu",
        "weights": "0" * 64, "base_weights": "0" * 64, "settings": job.settings(),
    }  # fmt: skip
    request.write_text(json.dumps(asked))
    with pytest.raises(CheckpointError, match=r"not the one that was sent[\s\S]*000000000000"):
        runner.answer(tmp_path)


def test_runner_says_errors_on_standard_error(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "set_num_interop_threads", lambda n: None)
    monkeypatch.setattr(os, "dup2", lambda a, b: None)
    (tmp_path / "bad").write_bytes(b"rubbish")
    assert runner.main([str(tmp_path / "bad")]) == 1
    assert "CheckpointError: this is no parcel of samcompress." in capfd.readouterr().err
    request = {"format": 1, "kind": "look", "devices": ["cpu"]}
    pack(tmp_path / "good", {"request": request}, {})
    assert runner.main([str(tmp_path / "good"), str(tmp_path / "reply")]) == 0
    assert (tmp_path / "reply").read_bytes().startswith(b"samcompress 0")


def test_nothing_is_unpickled() -> None:
    for name in ("remote", "runner", "_parcel", "_child", "processes"):
        source = Path(importlib.import_module(f"samcompress.evaluate.{name}").__file__ or "")
        text = source.read_text()
        assert "pickle" not in text.replace("allow_pickle=False", "")
        assert "torch.load" not in text
