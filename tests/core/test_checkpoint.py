from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import random_sam

import samcompress as sc
from samcompress.core import errors, files
from samcompress.core.checkpoint import fingerprint


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    pipe = sc.prune.Mlp(ratio=0.5, criterion="magnitude") | sc.quantize.Int8Weights(min_size=0)
    sc.save(pipe(random_sam()), tmp_path / "small")
    return tmp_path / "small"


def edit(folder: Path, **changes: object) -> None:
    path = folder / "samcompress.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_round_trip(saved: Path) -> None:
    model = sc.load(saved)
    assert not model.training
    assert [s.transform.name for s in sc.lineage(model)] == ["prune.mlp", "quantize.int8_weights"]
    sc.save(model, saved)
    assert fingerprint(sc.load(saved)) == fingerprint(model)
    assert sorted(p.name for p in saved.iterdir()) == [
        "README.md",
        "model.safetensors",
        "samcompress.json",
    ]
    assert [p.name for p in saved.parent.iterdir()] == ["small"]


def test_a_plain_sam(tmp_path: Path) -> None:
    sam = random_sam(image_size=48)
    sc.save(sam, tmp_path / "sam")
    assert fingerprint(sc.load(tmp_path / "sam")) == fingerprint(sam)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_keeps_the_type(tmp_path: Path, dtype: torch.dtype) -> None:
    sam = random_sam().to(dtype)
    sc.save(sam, tmp_path / "sam")
    again = sc.load(tmp_path / "sam")
    assert again.pixel_mean.dtype == dtype
    assert torch.equal(again.pixel_mean, sam.pixel_mean)
    assert fingerprint(again) == fingerprint(sam)


def test_a_model_changed_by_hand(tmp_path: Path) -> None:
    sam = random_sam()
    sam.image_encoder.neck = torch.nn.Identity()
    with pytest.raises(errors.ModelError, match="cannot be saved"):
        sc.save(sam, tmp_path / "sam")
    assert not (tmp_path / "sam").exists()


def test_does_not_overwrite_other_things(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(errors.CheckpointError, match="something else here"):
        sc.save(random_sam(), tmp_path)
    with pytest.raises(errors.CheckpointError, match="something else here"):
        sc.save(random_sam(), tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_truncated(saved: Path) -> None:
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(errors.CheckpointError, match="missing or cut short"):
        sc.load(saved)
    weights.unlink()
    with pytest.raises(errors.CheckpointError, match="no file"):
        sc.load(saved)


def test_changed(saved: Path) -> None:
    weights = saved / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(errors.CheckpointError, match="changed after it was saved"):
        sc.load(saved)


def test_weights_of_another_model(saved: Path, tmp_path: Path) -> None:
    sc.save(random_sam(), tmp_path / "other")
    weights = saved / "model.safetensors"
    shutil.copy(tmp_path / "other" / "model.safetensors", weights)
    facts = {"sha256": files.sha256(weights), "bytes": weights.stat().st_size}
    edit(saved, files={"model.safetensors": facts})
    with pytest.raises(errors.CheckpointError, match="do not fit the model") as caught:
        sc.load(saved)
    assert "missing:" in str(caught.value)
    assert "other shape:" in str(caught.value)


def test_damaged_or_newer_record(saved: Path) -> None:
    document = json.loads((saved / "samcompress.json").read_text())
    edit(saved, format=99)
    with pytest.raises(errors.CheckpointError, match="newer samcompress"):
        sc.load(saved)
    edit(saved, format=1, base={"config": {"no": 1}})
    with pytest.raises(errors.CheckpointError, match="record of a checkpoint is damaged"):
        sc.load(saved)
    edit(saved, base=document["base"], steps=[{"type": "no.such", "state": {}}])
    with pytest.raises(errors.UnknownTransformError, match=r"no technique 'no\.such'"):
        sc.load(saved)
    edit(saved, steps=[document["steps"][0] | {"state": {}}])
    with pytest.raises(errors.CheckpointError, match=r"prune\.mlp could not be replayed"):
        sc.load(saved)
    (saved / "samcompress.json").write_text("{")
    with pytest.raises(errors.CheckpointError, match="not a samcompress checkpoint"):
        sc.load(saved)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from samcompress.core import checkpoint

    def full(tensors: object, path: str) -> None:
        with Path("/dev/full").open("wb", buffering=0) as file:
            file.write(b"0")

    sc.save(random_sam(), tmp_path / "sam")
    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(errors.CheckpointError) as caught:
        sc.save(random_sam(), tmp_path / "sam")
    assert "No space left on device" in str(caught.value)
    assert "nothing was left behind" in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["sam"]
    monkeypatch.undo()
    assert sc.load(tmp_path / "sam")


def test_target_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.CheckpointError, match="could not write"):
        sc.save(random_sam(), tmp_path / "file" / "sam")
    if os.geteuid() != 0:
        tmp_path.chmod(0o500)
        with pytest.raises(errors.CheckpointError, match="PermissionError"):
            sc.save(random_sam(), tmp_path / "sam")
        tmp_path.chmod(0o700)


def test_write_whole(tmp_path: Path) -> None:
    files.write_whole(tmp_path / "a" / "b.txt", b"one")
    with pytest.raises(RuntimeError), files.whole(tmp_path / "a" / "b.txt") as temporary:
        temporary.write_bytes(b"two")
        raise RuntimeError
    assert (tmp_path / "a" / "b.txt").read_bytes() == b"one"
    assert len(list((tmp_path / "a").iterdir())) == 1


def test_others_may_read_what_is_saved(tmp_path: Path) -> None:
    sc.save(random_sam(), tmp_path / "model")
    (tmp_path / "plain").touch()
    wanted = (tmp_path / "plain").stat().st_mode
    assert {file.stat().st_mode for file in (tmp_path / "model").iterdir()} == {wanted}
