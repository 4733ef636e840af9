from __future__ import annotations

import copy
import json
import logging
import os
import pickle
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_sam
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import samcompress as sc
from samcompress.core import errors
from samcompress.core._objective import Share
from samcompress.core._progress import Event, Progress
from samcompress.core.data import Dataset
from samcompress.core.predict import encode
from samcompress.distill import _cache
from samcompress.distill._cache import Ready, Teacher
from samcompress.distill._embeddings import Embeddings
from samcompress.distill._losses import embedding_loss, valid_cells

RECORD = 32 * 8 * 8  # values of one embedding of random_sam


@pytest.fixture(scope="module")
def scenes() -> Dataset:
    """Six images, wider and higher than square, so that there is padding."""
    wide, high = sc.shapes(3, size=(40, 64)), sc.shapes(6, size=(64, 48))[3:]
    return sc.data.as_dataset([*wide, *high])


@pytest.fixture
def pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two images a file."""
    monkeypatch.setattr(_cache, "SHARD", 2)


def live(sam: nn.Module, images: list[np.ndarray]) -> Tensor:
    return torch.cat([e.features for e in encode(sam, images)]).clone()


def filled(sam: nn.Module, data: Dataset, folder: Path | None, **options: object) -> Teacher:
    teacher = Teacher(sam, data, folder, **options)
    teacher.fill(Progress())
    return teacher


def shards(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.glob("*.safetensors"))


def only(folder: Path) -> Path:
    (path,) = folder.glob("*.safetensors")
    return path


# ------------------------------------------------------------------------------------ what is read


def test_equals_the_live_teacher(tmp_path: Path, scenes: Dataset) -> None:
    sam = random_sam()
    sam.mask_decoder.train()
    wanted = live(sam, [s.image for s in scenes])[[4, 0, 0]]
    for folder in (None, tmp_path / "16"):
        read = filled(sam, scenes, folder).read([4, 0, 0])
        assert read.dtype == torch.float32
        assert not torch.equal(read, wanted)
        assert ((read - wanted).abs() <= wanted.abs() * 2**-11 + 2**-24).all()
        student = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(0))
        losses = [embedding_loss(student, t, torch.ones(3, 1, 8, 8), "mse") for t in (read, wanted)]
        assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-4)
    for folder in (None, tmp_path / "32"):
        assert torch.equal(filled(sam, scenes, folder, dtype="float32").read([4, 0, 0]), wanted)
    assert sam.mask_decoder.training
    assert not sam.image_encoder.training
    assert all(p.grad is None for p in sam.parameters())


def test_batches_of_the_teacher(scenes: Dataset, tmp_path: Path, pairs: None) -> None:
    sam = random_sam()
    sizes = []
    hook = sam.image_encoder.register_forward_hook(lambda *a: sizes.append(len(a[1][0])))
    whole = filled(sam, scenes, None, dtype="float32", batch_size=4)
    hook.remove()
    assert sizes == [2, 2, 2]
    single = filled(sam, scenes, tmp_path, dtype="float32")
    assert torch.allclose(whole.read(range(6)), single.read(range(6)), atol=1e-5)


def test_mirrored_images(tmp_path: Path, scenes: Dataset, pairs: None) -> None:
    sam = random_sam()
    mirrored = live(sam, [np.ascontiguousarray(s.image[:, ::-1]) for s in scenes])
    plain = live(sam, [s.image for s in scenes])
    for folder in (None, tmp_path / "both"):
        read = filled(sam, scenes, folder, dtype="float32", flip=True).read
        assert torch.equal(read(range(6), [True] * 6), mirrored)
        mixed = torch.stack([mirrored[5], plain[0], mirrored[1]])
        assert torch.equal(read([5, 0, 1], [True, False, True]), mixed)
        assert torch.equal(read([5]), plain[[5]])
    assert not torch.allclose(mirrored, plain.flip(-1), atol=0.1)
    # They can be added later; what is there stays.
    filled(sam, scenes, tmp_path / "later", dtype="float32")
    before = {n: (tmp_path / "later" / n).stat().st_mtime_ns for n in shards(tmp_path / "later")}
    later = filled(sam, scenes, tmp_path / "later", dtype="float32", flip=True)
    assert torch.equal(later.read([3], [True]), mirrored[[3]])
    assert {n: (tmp_path / "later" / n).stat().st_mtime_ns for n in before} == before
    assert len(shards(tmp_path / "later")) == 2 * len(before) == 6


def test_only_valid_cells_are_kept(
    tmp_path: Path, scenes: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    sam = random_sam()
    wanted = live(sam, [s.image for s in scenes])
    cells = [
        valid_cells(size, 64, (8, 8)) for size in [(40, 64), (40, 64), (40, 64)] + [(64, 48)] * 3
    ]
    caplog.set_level(logging.INFO, "samcompress.distill")
    for folder in (None, tmp_path / "cropped"):
        teacher = filled(sam, scenes, folder, dtype="float32", crop=True, flip=True)
        assert torch.equal(teacher.read(range(6)), wanted * torch.stack(cells))
    assert "12 images to encode, 0.0676 MB of memory" in caplog.text
    kept = int(torch.stack(cells).sum())
    assert kept == 3 * 5 * 8 + 3 * 8 * 6
    with safe_open(tmp_path / "cropped/teacher-0000000.safetensors", framework="pt") as file:
        assert file.get_tensor("embedding").shape == (kept * 32,)
        assert file.get_tensor("hw").tolist() == [[40, 64]] * 3 + [[64, 48]] * 3


def test_reader_needs_no_teacher(tmp_path: Path, scenes: Dataset) -> None:
    sam = random_sam()
    for folder in (None, tmp_path):
        teacher = filled(sam, scenes, folder)
        content = pickle.dumps(teacher.reader())
        if folder is not None:
            assert len(content) < 4000
        reader = pickle.loads(content)
        assert isinstance(reader, Embeddings)
        assert torch.equal(reader.read([5, 2]), teacher.read([5, 2]))
        assert not any(isinstance(v, nn.Module) for v in vars(reader).values())


def test_what_files_say(tmp_path: Path, scenes: Dataset, pairs: None) -> None:
    sam = random_sam()
    teacher = filled(sam, scenes, tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    assert index["identity"] == teacher.identity
    assert [f["file"] for f in index["files"]] == shards(tmp_path)
    assert [f["keys"] for f in index["files"]] == [
        [s.id for s in scenes[i : i + 2]] for i in (0, 2, 4)
    ]
    assert all(f["bytes"] == (tmp_path / f["file"]).stat().st_size for f in index["files"])
    with safe_open(tmp_path / "teacher-0000002.safetensors", framework="pt") as file:
        header = json.loads(file.metadata()["samcompress"])
        assert file.get_tensor("embedding").dtype == torch.float16
        assert file.get_tensor("hw").tolist() == [[40, 64], [64, 48]]
    assert header.items() >= teacher.identity.items()
    assert (header["tap"], header["image_size"], header["dtype"]) == (
        "image_encoder",
        64,
        "float16",
    )
    assert header["keys"] == [scenes[2].id, scenes[3].id]
    assert len(header["crc32"]) == 2


def test_files_grow_in_large_sets_up_to_a_limit(
    monkeypatch: pytest.MonkeyPatch, scenes: Dataset
) -> None:
    sam = random_sam()

    def images_a_file() -> int:
        return Teacher(sam, scenes, None).identity["shard"]

    assert images_a_file() == 64
    monkeypatch.setattr(_cache, "SHARD_BYTES", 3 * RECORD * 2 + 1)
    assert images_a_file() == 3
    monkeypatch.setattr(_cache, "SHARD", 1)
    monkeypatch.setattr(_cache, "FILES", 3)
    assert images_a_file() == 2


# ------------------------------------------------------------------------------------------ filling


def test_filled_once_and_in_parts(
    tmp_path: Path, scenes: Dataset, monkeypatch: pytest.MonkeyPatch, pairs: None
) -> None:
    sam = random_sam()
    calls: list[int] = []
    hook = sam.image_encoder.register_forward_hook(lambda *_: calls.append(1))
    monkeypatch.setattr(_cache, "save_file", dying := Dying(after=2))
    with pytest.raises(KeyboardInterrupt):
        filled(sam, scenes, tmp_path)
    # Neither half a file nor an index of some.
    names = ["teacher-0000000.safetensors", "teacher-0000002.safetensors"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    assert len(calls) == 6
    written = [(tmp_path / n).stat().st_mtime_ns for n in names]
    dying.after = 99
    events: list[Event] = []
    second = Teacher(sam, scenes, tmp_path)
    second.fill(Progress(events.append))
    assert [(e.label, e.done, e.total) for e in events] == [("teacher", 1, 2), ("teacher", 2, 2)]
    assert len(calls) == 8
    assert [(tmp_path / n).stat().st_mtime_ns for n in names] == written
    assert torch.equal(second.read(range(6)), filled(sam, scenes, None).read(range(6)))
    assert len(calls) == 14
    index = (tmp_path / "index.json").stat().st_mtime_ns
    filled(sam, scenes, tmp_path)
    assert len(calls) == 14
    assert (tmp_path / "index.json").stat().st_mtime_ns == index
    hook.remove()


class Dying:
    """Saves a few files, then half of one, and is interrupted."""

    def __init__(self, after: int) -> None:
        self.after = after

    def __call__(self, tensors: dict, path: Path, **kwargs: object) -> None:
        if self.after == 0:
            path.write_bytes(b"half")
            raise KeyboardInterrupt
        self.after -= 1
        save_file(tensors, path, **kwargs)


def test_disk_full_while_writing(
    tmp_path: Path, scenes: Dataset, monkeypatch: pytest.MonkeyPatch, pairs: None
) -> None:
    """Writing truly fails half-way: no file of this process may grow beyond 5000 bytes."""
    sam = random_sam()
    filled(sam, scenes, tmp_path)
    expected = filled(sam, scenes, tmp_path).read(range(6))
    (tmp_path / "teacher-0000002.safetensors").unlink()
    (tmp_path / "index.json").unlink()

    def full(tensors: dict, path: Path, **kwargs: object) -> None:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
        try:
            save_file(tensors, path, **kwargs)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    kept = ["teacher-0000000.safetensors", "teacher-0000004.safetensors"]
    with monkeypatch.context() as patch:
        patch.setattr(_cache, "save_file", full)
        with pytest.raises(errors.CheckpointError) as caught:
            filled(sam, scenes, tmp_path)
    text = str(caught.value)
    path = tmp_path / "teacher-0000002.safetensors"
    assert text.startswith(f"could not write.\n  where     {path}\n  got       OSError: ")
    assert "File too large" in text
    assert text.endswith(
        "  expected  a writable place with enough room\n"
        "  try       choose another folder, or free some space; nothing was left behind"
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == kept
    assert torch.equal(filled(sam, scenes, tmp_path).read(range(6)), expected)


def test_disk_too_small_is_refused_before_the_teacher_runs(
    tmp_path: Path,
    scenes: Dataset,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    sam = random_sam()
    folder = tmp_path / "not" / "there"
    sam.image_encoder.register_forward_hook(lambda *_: pytest.fail("the teacher ran"))
    need, places = 6 * RECORD * 2, []

    def usage(place: Path) -> object:
        places.append(place)
        return type("Usage", (), {"free": need - 1})

    monkeypatch.setattr(_cache.shutil, "disk_usage", usage)
    caplog.set_level(logging.INFO, "samcompress.distill")
    with pytest.raises(errors.CheckpointError) as caught:
        filled(sam, scenes, folder)
    assert str(caught.value) == (
        "there is no room for the teacher's embeddings.\n"
        f"  where     {folder}\n"
        "  got       0.0246 MB free\n"
        "  expected  0.0246 MB for 6 images\n"
        "  try       workdir= on another disk, or fewer images"
    )
    assert caplog.messages == [
        f"teacher: 6 images to encode, 0.0246 MB in {folder}, where 0.0246 MB are free"
    ]
    assert places == [tmp_path]
    assert not (tmp_path / "not").exists()


def test_sizes_are_told_as_people_read_them() -> None:
    assert _cache._text(2_097_152 * 111_900) == "235 GB"
    assert _cache._text(2_097_152) == "2.1 MB"


def test_shares(tmp_path: Path, scenes: Dataset, pairs: None) -> None:
    sam = random_sam()
    halves = [Teacher(sam, scenes, tmp_path) for _ in range(2)]
    halves[1].fill(Progress(), share=Share(1, 2))
    assert shards(tmp_path) == ["teacher-0000002.safetensors", "teacher-0000004.safetensors"]
    assert not (tmp_path / "index.json").exists()
    with pytest.raises(errors.CheckpointError) as caught:
        halves[1].read([4, 1])
    assert str(caught.value) == (
        "a teacher's embedding is missing.\n"
        f"  where     {tmp_path}/teacher-0000000.safetensors\n"
        "  got       no teacher embedding of image number 1\n"
        "  try       run again what fills the cache; or wait for the process that does"
    )
    halves[0].fill(Progress(), share=Share(0, 2))
    assert (tmp_path / "index.json").exists()
    everything = filled(sam, scenes, None).read(range(6))
    for teacher in halves:
        assert torch.equal(teacher.read(range(6)), everything)


def test_another_process_was_faster(
    tmp_path: Path, scenes: Dataset, monkeypatch: pytest.MonkeyPatch, pairs: None
) -> None:
    """Both see nothing; then the other fills everything while this one encodes its first image."""
    sam = random_sam()
    teacher = Teacher(sam, scenes, tmp_path)
    embed, written = teacher._embed, {}

    def slow(batch: range, *, mirrored: bool) -> list:
        if not written:
            filled(sam, scenes, tmp_path)
            written.update({n: (tmp_path / n).stat().st_mtime_ns for n in shards(tmp_path)})
        return embed(batch, mirrored=mirrored)

    monkeypatch.setattr(teacher, "_embed", slow)
    teacher.fill(Progress())
    assert len(written) == 3
    assert {n: (tmp_path / n).stat().st_mtime_ns for n in shards(tmp_path)} == written


def test_leftovers_of_killed_processes_are_cleared(tmp_path: Path, scenes: Dataset) -> None:
    old, young = (tmp_path / f".teacher-0000000.safetensors.{n}.part" for n in ("a", "b"))
    for path in (old, young):
        path.write_bytes(b"half")
    hours_ago = time.time() - 2 * _cache.ABANDONED
    os.utime(old, (hours_ago, hours_ago))
    filled(random_sam(), scenes, tmp_path)
    assert not old.exists()
    # Another process may be writing it now.
    assert young.exists()


# ---------------------------------------------------------------------------------- many processes

# One interpreter that forks, as importing takes longer than all the rest. The first child is killed
# when half of its third file is written; then two go on together, and both read everything.
PROCESSES = """
import os, signal, sys
from pathlib import Path
import torch
import samcompress as sc
from samcompress.core._progress import Progress
from samcompress.distill import _cache
from conftest import random_sam
torch.set_num_threads(1)
_cache.SHARD = 2
folder = Path(sys.argv[1])
teacher = _cache.Teacher(random_sam(), sc.shapes(7, size=64), folder / "teacher")

def child(work, *args):
    number = os.fork()
    if number == 0:
        work(*args)
        os._exit(0)
    return number

def killed():
    save = _cache.save_file
    def die(tensors, path, **kwargs):
        save(tensors, path, **kwargs)
        if len(list(path.parent.glob("*.safetensors"))) == 2:
            os.truncate(path, 1000)
            os.kill(os.getpid(), signal.SIGKILL)
    _cache.save_file = die
    teacher.fill(Progress())

def together(rank):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    embed, done = teacher._embed, []
    teacher._embed = lambda batch, **kwargs: done.extend(batch) or embed(batch, **kwargs)
    teacher.fill(Progress())
    torch.save((done, teacher.read(range(7))), folder / f"read{rank}")

code = os.waitstatus_to_exitcode(os.waitpid(child(killed), 0)[1])
assert code == -signal.SIGKILL, code
parts = {p.name: p.stat().st_mtime_ns for p in (folder / "teacher").iterdir()}
torch.save(parts, folder / "after")
for number in [child(together, rank) for rank in (0, 1)]:
    assert os.waitpid(number, 0)[1] == 0
"""


def test_killed_then_finished_by_two_processes(tmp_path: Path) -> None:
    tests, folder = Path(__file__).parents[1], tmp_path / "teacher"
    subprocess.run(
        [sys.executable, "-c", PROCESSES, tmp_path],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (tests, tests.parent)))},
        check=True,
        timeout=120,
    )
    after = torch.load(tmp_path / "after")
    whole = ["teacher-0000000.safetensors", "teacher-0000002.safetensors"]
    assert sorted(n for n in after if not n.endswith(".part")) == whole
    assert len(after) == 3
    assert len(shards(folder)) == 4
    assert [(folder / n).stat().st_mtime_ns for n in whole] == [after[n] for n in whole]
    (first, read0), (second, read1) = (torch.load(tmp_path / f"read{rank}") for rank in (0, 1))
    # Two files were missing, and each did one.
    assert (first, second) == ([4, 5], [6])
    expected = filled(random_sam(), sc.shapes(7, size=64), None).read(range(7))
    assert torch.equal(read0, expected)
    assert torch.equal(read1, expected)


def test_machines_that_share_no_folder(
    tmp_path: Path, scenes: Dataset, monkeypatch: pytest.MonkeyPatch, pairs: None
) -> None:
    """As the second of two processes, whose other half never arrives here."""
    world = _cache.distributed
    monkeypatch.setattr(world, "is_initialized", lambda: True)
    monkeypatch.setattr(world, "get_rank", lambda: 1)
    monkeypatch.setattr(world, "get_world_size", lambda: 2)
    monkeypatch.setattr(world, "broadcast_object_list", lambda objects: None)
    monkeypatch.setattr(world, "barrier", lambda: None)
    with pytest.raises(errors.CheckpointError) as caught:
        filled(random_sam(), scenes, tmp_path)
    assert str(caught.value) == (
        "embeddings that other processes computed are not here.\n"
        f"  where     {tmp_path}/teacher-0000000.safetensors\n"
        "  expected  one folder that all processes and machines see\n"
        "  try       workdir= on a shared disk"
    )
    # In memory each has its own, and all of them.
    assert len(filled(random_sam(), scenes, None).read(range(6))) == 6


# ------------------------------------------------------------------------------------------ refusal


def test_cache_of_another_teacher(tmp_path: Path, scenes: Dataset) -> None:
    sam = random_sam()
    reader = filled(sam, scenes, tmp_path).reader()
    other = copy.deepcopy(sam)
    with torch.no_grad():
        other.image_encoder.neck[0].weight[0, 0] += 1e-3
    means = copy.deepcopy(sam)
    means.pixel_mean = means.pixel_mean + 1
    deviations = copy.deepcopy(sam)
    deviations.pixel_std = deviations.pixel_std * 2
    sizes = copy.deepcopy(sam)
    sizes.image_encoder.img_size = 72
    turned = sc.data.as_dataset(list(scenes)[::-1])
    for field, model, data, options in (
        ("teacher", other, scenes, {}),
        ("pixel_mean", means, scenes, {}),
        ("pixel_std", deviations, scenes, {}),
        ("image_size", sizes, scenes, {}),
        ("data", sam, sc.shapes(6), {}),
        ("order", sam, turned, {}),
        ("dtype", sam, scenes, {"dtype": "float32"}),
        ("crop", sam, scenes, {"crop": True}),
    ):
        with pytest.raises(errors.CheckpointError) as caught:
            filled(model, data, tmp_path, **options)
        assert str(caught.value).startswith(
            f"the cached teacher embeddings do not belong to this run: {field} differs.\n"
            f"  where     {tmp_path}\n  got       "
        )
        assert str(caught.value).endswith(
            "  try       another workdir=, or delete the folder to encode the images again"
        )
    reader = Embeddings({**reader.identity, "tap": "blocks.1"}, tmp_path)
    with pytest.raises(errors.CheckpointError, match="tap differs"):
        reader.read([0])


def test_cut_file(tmp_path: Path, scenes: Dataset) -> None:
    sam = random_sam()
    filled(sam, scenes, tmp_path)
    file = only(tmp_path)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(errors.CheckpointError) as caught:
        filled(sam, scenes, tmp_path)
    text = str(caught.value)
    assert text.startswith(f"cached teacher embeddings cannot be read.\n  where     {file}\n")
    assert text.endswith("  try       delete the file; its images will be encoded again")


def test_altered_record(tmp_path: Path, scenes: Dataset) -> None:
    sam = random_sam()
    filled(sam, scenes, tmp_path)
    file = only(tmp_path)
    with safe_open(file, framework="pt") as opened:
        third = opened.get_slice("embedding")[2 * RECORD : 3 * RECORD].numpy().tobytes()
    content = bytearray(file.read_bytes())
    content[content.index(third) + 100] ^= 1
    file.write_bytes(content)
    teacher = filled(sam, scenes, tmp_path)
    assert len(teacher.read([1, 3])) == 2
    with pytest.raises(errors.CheckpointError) as caught:
        teacher.read([1, 2])
    assert str(caught.value) == (
        "cached teacher embeddings cannot be read.\n"
        f"  where     {file}\n"
        f"  got       another checksum of image {scenes[2].id}\n"
        "  try       delete the file; its images will be encoded again"
    )
    # As the message says.
    file.unlink()
    assert len(filled(sam, scenes, tmp_path).read([1, 2])) == 2


def test_file_whose_parts_do_not_fit(tmp_path: Path, scenes: Dataset) -> None:
    sam = random_sam()
    filled(sam, scenes, tmp_path)
    file = only(tmp_path)
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
        tensors = {k: opened.get_tensor(k).clone() for k in ("embedding", "cells", "hw")}
    for key, value, told in (
        ("embedding", tensors["embedding"][:-1].clone(), "contradict one another"),
        ("cells", tensors["cells"][:-1].clone(), "contradict one another"),
        ("embedding", tensors["embedding"].view(2, -1), "ValueError"),
    ):
        save_file({**tensors, key: value}, file, metadata=metadata)
        with pytest.raises(errors.CheckpointError, match=told):
            filled(sam, scenes, tmp_path)
    save_file(tensors, file)
    with pytest.raises(errors.CheckpointError, match="KeyError: 'samcompress'"):
        filled(sam, scenes, tmp_path)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(("scale", "shown"), [(float("nan"), "nan"), (1e9, "e+")])
def test_embedding_that_is_not_finite(
    tmp_path: Path, scenes: Dataset, scale: float, shown: str, dtype: str
) -> None:
    sam = random_sam()
    with torch.no_grad():
        sam.image_encoder.neck[3].weight *= scale
    with pytest.raises(errors.DataError) as caught:
        filled(sam, scenes, tmp_path, dtype=dtype, batch_size=3)
    text = str(caught.value)
    assert text.startswith(
        "the teacher's embedding of an image cannot be used.\n"
        f"  where     image {scenes[0].id}\n  got       a largest value of "
    )
    assert shown in text
    assert text.endswith(
        "  expected  finite values up to 60000\n"
        "  try       look for NaN in the teacher's weights, or leave the image out"
    )
    assert not list(tmp_path.iterdir())


def test_folder_that_is_a_file(tmp_path: Path, scenes: Dataset) -> None:
    place = tmp_path / "file"
    place.write_text("mine")
    with pytest.raises(errors.CheckpointError, match=r"could not write\."):
        filled(random_sam(), scenes, place)
    assert place.read_text() == "mine"


# ------------------------------------------------------------------------------- the student's side


def test_ready_images_are_kept_while_there_is_room(
    scenes: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_cache, "READY_BYTES", 2 * 3 * 64 * 64 * 4 + 1)
    ready = Ready(random_sam(), scenes)
    images, sizes = ready.read([0, 3, 1, 0])
    assert images.shape == (4, 3, 64, 64)
    assert sizes == [(40, 64), (64, 48), (40, 64), (40, 64)]
    assert list(ready._kept) == [0, 3]
    assert torch.equal(images[0], images[3])
    assert torch.equal(ready.read([1])[0][0], images[2])
