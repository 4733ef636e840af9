from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import random_sam
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

import samcompress as sc
from samcompress.core import errors
from samcompress.core._progress import Progress
from samcompress.core.data import Dataset
from samcompress.core.framing import Framing
from samcompress.core.predict import encode
from samcompress.distill import _cache
from samcompress.distill._losses import embedding_loss, to_grid, valid_cells

KINDS = ("mse", "huber", "l1", "mse+cos")


def pair(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Student, teacher, and valid cells: the second image is padded below and at the right."""
    g = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, 2, 5, 4, 4, generator=g)
    valid = torch.stack([valid_cells(size, 32, (4, 4)) for size in ((32, 32), (24, 13))])
    return student.requires_grad_(), teacher, valid


def pruned(sam: nn.Module) -> nn.Module:
    return sc.prune.Mlp(ratio=0.5, criterion="magnitude")(sam, progress=False)


@pytest.fixture(scope="module")
def scenes() -> Dataset:
    """Images wider and higher than square, so that there is padding."""
    wide, high = sc.shapes(3, size=(40, 64)), sc.shapes(6, size=(64, 48))[3:]
    return sc.data.as_dataset([*wide, *high])


# ------------------------------------------------------------------------------------------ losses


def test_valid_cells() -> None:
    assert torch.equal(
        valid_cells((24, 13), 32, (4, 4))[0],
        torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]]).float(),
    )
    # As shrinking the full-size map bilinearly and cutting at one half.
    for height in range(1, 65):
        full = torch.zeros(1, 1, 64, 64)
        full[:, :, :height] = 1
        small = F.interpolate(full, (8, 8), mode="bilinear") >= 0.5
        expected = small[0].float() if height > 3 else valid_cells((height, 64), 64, (8, 8))
        assert torch.equal(valid_cells((height, 64), 64, (8, 8)), expected)
    assert valid_cells((1, 64), 64, (8, 8)).sum() == 8


@pytest.mark.parametrize("kind", KINDS)
def test_equal_embeddings_cost_nothing(kind: str) -> None:
    student, _, valid = pair()
    loss = embedding_loss(student, student.detach().clone(), valid, kind)
    assert loss.item() == 0.0
    loss.backward()
    if kind != "l1":
        assert student.grad.count_nonzero() == 0


def test_losses_by_hand() -> None:
    student = torch.tensor([3.0, 4.0]).view(1, 2, 1, 1)
    teacher = torch.tensor([4.0, 1.0]).view(1, 2, 1, 1)
    values = {k: embedding_loss(student, teacher, torch.ones(1, 1, 1, 1), k).item() for k in KINDS}
    assert values["mse"] == pytest.approx((1 + 9) / 2)
    assert values["l1"] == pytest.approx((1 + 3) / 2)
    assert values["huber"] == pytest.approx((0.5 + 2.5) / 2)
    cosine = (3 * 4 + 4 * 1) / (5 * 17**0.5)
    assert values["mse+cos"] == pytest.approx(5 + 1 - cosine)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_does_not_count(kind: str) -> None:
    student, teacher, valid = pair()
    loss = embedding_loss(student, teacher, valid, kind)
    loss.backward()
    hidden = (valid == 0).expand_as(teacher)
    other = student.detach().clone()
    other[hidden] = 100.0
    other.requires_grad_()
    changed = embedding_loss(other, teacher.masked_fill(hidden, -7.0), valid, kind)
    changed.backward()
    assert changed.item() == loss.item()
    assert torch.equal(other.grad, student.grad)
    assert student.grad[hidden].count_nonzero() == 0
    crops = [
        embedding_loss(s[None], t[None], torch.ones(1, 1, *s.shape[1:]), kind)
        for s, t in (
            (student[0], teacher[0]),
            (student[1, :, :3, :2], teacher[1, :, :3, :2]),
        )
    ]
    assert loss.item() == pytest.approx(sum(c.item() for c in crops) / 2, rel=1e-6)


def test_to_grid() -> None:
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert to_grid(x, (4, 4)) is x
    assert to_grid(x, (8, 8)).shape == (1, 1, 8, 8)
    assert to_grid(x, (2, 2)).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    # Coarser: nothing is skipped, so the mean stays.
    noise = torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    assert to_grid(noise, (4, 4)).var() < 0.1 * noise.var()
    assert torch.allclose(to_grid(torch.full_like(x, 3.0), (2, 2)), torch.tensor(3.0))


# ------------------------------------------------------------------------------------------- cache


def test_cache_equals_the_live_teacher(tmp_path: Path, scenes: Dataset) -> None:
    sam = random_sam().train()
    live = torch.cat([e.features for e in encode(sam, [s.image for s in scenes])])
    for folder in (None, tmp_path):
        teacher = _cache.Teacher(sam, scenes, folder)
        teacher.fill(Progress())
        read = teacher.read([4, 0, 0])
        assert read.dtype == torch.float32
        wanted = live[[4, 0, 0]]
        assert ((read - wanted).abs() <= wanted.abs() * 2**-11 + 2**-24).all()
    assert sam.training


def test_cache_is_filled_once_and_in_parts(
    tmp_path: Path, scenes: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_cache, "SHARD", 2)
    sam = random_sam()
    calls = []
    hook = sam.image_encoder.register_forward_hook(lambda *_: calls.append(1))
    first = _cache.Teacher(sam, scenes, tmp_path)
    monkeypatch.setattr(_cache, "save_file", dying := Dying(after=2))
    with pytest.raises(KeyboardInterrupt):
        first.fill(Progress())
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "teacher-0000000.safetensors",
        "teacher-0000002.safetensors",
    ]
    dying.after = 99
    assert len(calls) == 6
    second = _cache.Teacher(sam, scenes, tmp_path)
    second.fill(Progress())
    assert len(calls) == 8
    memory = _cache.Teacher(sam, scenes, None)
    memory.fill(Progress())
    assert torch.equal(second.read(range(6)), memory.read(range(6)))
    _cache.Teacher(sam, scenes, tmp_path).fill(Progress())
    assert len(calls) == 14
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


def test_cache_of_another_teacher(tmp_path: Path, scenes: Dataset) -> None:
    sam = random_sam()
    _cache.Teacher(sam, scenes, tmp_path).fill(Progress())
    other = copy.deepcopy(sam)
    with torch.no_grad():
        other.image_encoder.neck[0].weight[0, 0] += 1e-3
    means = copy.deepcopy(sam)
    means.pixel_mean = means.pixel_mean + 1
    deviations = copy.deepcopy(sam)
    deviations.pixel_std = deviations.pixel_std * 2
    sizes = copy.deepcopy(sam)
    sizes.image_encoder.img_size = 72
    for field, model, data in (
        ("teacher", other, scenes),
        ("pixel_mean", means, scenes),
        ("pixel_std", deviations, scenes),
        ("image_size", sizes, scenes),
        ("data", sam, sc.shapes(6)),
    ):
        with pytest.raises(errors.CheckpointError) as caught:
            _cache.Teacher(model, data, tmp_path).fill(Progress())
        assert str(caught.value).startswith(
            f"the cached teacher embeddings do not belong to this run: {field} differs.\n"
            f"  where     {tmp_path}\n  got       "
        )
        assert str(caught.value).endswith(
            "  try       another workdir=, or delete the folder to encode the images again"
        )


def test_damaged_cache(tmp_path: Path, scenes: Dataset) -> None:
    sam = random_sam()
    _cache.Teacher(sam, scenes, tmp_path).fill(Progress())
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(errors.CheckpointError) as caught:
        _cache.Teacher(sam, scenes, tmp_path).fill(Progress())
    text = str(caught.value)
    assert text.startswith(f"cached teacher embeddings cannot be read.\n  where     {file}\n")
    assert text.endswith("  try       delete the file; its images will be encoded again")


@pytest.mark.parametrize(("scale", "shown"), [(float("nan"), "nan"), (1e9, "e+")])
def test_teacher_that_is_not_finite(scenes: Dataset, scale: float, shown: str) -> None:
    sam = random_sam()
    with torch.no_grad():
        sam.image_encoder.neck[3].weight *= scale
    with pytest.raises(errors.DataError) as caught:
        _cache.Teacher(sam, scenes, None).fill(Progress())
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


def test_ready_images_are_kept_while_there_is_room(
    scenes: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_cache, "READY_BYTES", 2 * 3 * 64 * 64 * 4 + 1)
    ready = _cache.Ready(random_sam(), scenes)
    images, sizes = ready.read([0, 3, 1, 0])
    assert images.shape == (4, 3, 64, 64)
    assert sizes == [(40, 64), (64, 48), (40, 64), (40, 64)]
    assert list(ready._kept) == [0, 3]
    assert torch.equal(images[0], images[3])
    assert torch.equal(ready.read([1])[0][0], images[2])


# --------------------------------------------------------------------------------------- technique


def test_only_the_encoder_changes(scenes: Dataset) -> None:
    sam = random_sam()
    small = pruned(sam)
    before = {k: v.clone() for k, v in small.state_dict().items()}
    teacher = {k: v.clone() for k, v in sam.state_dict().items()}
    small.mask_decoder.iou_token.weight.requires_grad_(False)
    done = sc.distill.Encoder(steps=2)(small, data=scenes, teacher=sam, progress=False)
    after = done.state_dict()
    assert before.keys() == after.keys()
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed == {k for k in before if k.startswith("image_encoder.")}
    assert [n for n, p in done.named_parameters() if not p.requires_grad] == [
        "mask_decoder.iou_token.weight"
    ]
    assert not any(m.training for m in done.modules())
    for model in (sam, small, done):
        assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(teacher[k], v) for k, v in sam.state_dict().items())
    assert all(torch.equal(before[k], v) for k, v in small.state_dict().items())


@pytest.mark.parametrize("loss", KINDS)
def test_it_learns(trained: nn.Module, loss: str) -> None:
    """16 images, learned by heart: the error falls tenfold."""
    chain = sc.prune.Mlp(ratio=0.5, criterion="magnitude") | sc.distill.Encoder(
        steps=60 if loss == "mse" else 12, loss=loss, lr=2e-3
    )
    small = chain(trained, data=sc.shapes(16), progress=False)
    state = sc.lineage(small)[-1].state
    assert state["loss_after"] < state["loss_before"] / (10 if loss == "mse" else 1.5)
    assert (state["images"], state["skipped"]) == (16, 0)
    assert 10 < len(state["curve"]) <= 50
    # The loss on record is that of the model that is returned.
    embeddings = [
        torch.cat([e.features for e in encode(m, [s.image for s in sc.shapes(16)])])
        for m in (small, trained)
    ]
    found = embedding_loss(*embeddings, torch.ones(16, 1, 16, 16), loss)
    assert state["loss_after"] == pytest.approx(found.item(), rel=1e-3)


def test_epochs_or_steps(scenes: Dataset) -> None:
    sam = random_sam()
    small = pruned(sam)
    for settings, steps in (({"epochs": 1.5, "batch_size": 3}, 3), ({"steps": 2, "epochs": 9}, 2)):
        done = sc.distill.Encoder(**settings)(small, data=scenes, teacher=sam, progress=False)
        assert sc.lineage(done)[-1].state["steps"] == steps


@pytest.mark.parametrize(
    "step",
    [
        sc.substitute.ImageSize(size=32),
        sc.prune.Mlp(ratio=0.75, criterion="magnitude"),
        sc.substitute.ImageSize(size=48) | sc.attention.Fused(),
    ],
    ids=repr,
)
def test_students_of_other_families(step: sc.Pipeline, scenes: Dataset) -> None:
    chain = step | sc.distill.Encoder(steps=6, lr=1e-3)
    small = chain(random_sam(), data=scenes, progress=False)
    state = sc.lineage(small)[-1].state
    assert state["loss_after"] < state["loss_before"]


def test_teacher_sees_images_by_the_students_rule(scenes: Dataset) -> None:
    sam = random_sam()
    student = sc.substitute.Conventions(of="efficient_sam")(sam, progress=False)
    # The same encoder and another frame: what differs were images in other places.
    with pytest.raises(errors.NoEffectError, match="embeddings equal the teacher's already"):
        sc.distill.Encoder(steps=1)(student, teacher=sam, data=scenes, progress=False)


def test_padding_of_an_encoder_smaller_than_its_frame(scenes: Dataset) -> None:
    sam = random_sam()
    sam.framing = Framing(size=64, frame=128)
    ready = _cache.Ready(sam, scenes)
    images, sizes = ready.read(range(len(scenes)))
    assert sizes == [Framing(64, 64).inside(sample.size) for sample in scenes]
    assert not any(
        image[:, height:].any() for image, (height, _) in zip(images, sizes, strict=True)
    )


def test_teacher_of_another_size(scenes: Dataset) -> None:
    student, teacher = random_sam(), random_sam(image_size=96, embed_dim=48)
    small = sc.distill.Encoder(steps=6)(student, data=scenes, teacher=teacher, progress=False)
    state = sc.lineage(small)[-1].state
    assert state["loss_after"] < state["loss_before"]


@pytest.mark.slow
def test_vit_b_at_512(shared: Path) -> None:
    sam = sc.build("vit_b", image_size=512)
    photos = sc.data.coco(
        shared / "data/coco/val2017", shared / "data/coco/annotations/instances_val2017.json"
    )
    chain = sc.prune.Mlp(ratio=0.5, criterion="magnitude") | sc.distill.Encoder(
        steps=3, batch_size=1, lr=1e-5
    )
    state = sc.lineage(chain(sam, data=photos[:2], progress=False))[-1].state
    assert state["loss_after"] < state["loss_before"]


# ------------------------------------------------------------------------------------------ resume

CHAIN = sc.prune.Mlp(ratio=0.5, criterion="magnitude") | sc.distill.Encoder(steps=6, batch_size=2)
DIE = """
import functools, os, signal, sys, torch
import samcompress as sc
from samcompress.core import _fit
from conftest import random_sam
torch.set_num_threads(1)
rate = _fit.Plan.rate
def dying(plan, step, halved):
    if step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return rate(plan, step, halved)
_fit.Plan.rate = dying
_fit.Plan = functools.partial(_fit.Plan, save_seconds=0.0)
chain = sc.Pipeline.from_json(sys.argv[1])
chain(random_sam(), data=sc.shapes(5, size=64), progress=False, workdir=sys.argv[2])
"""


def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    tests, data = Path(__file__).parents[1], sc.shapes(5, size=64)
    whole = CHAIN(random_sam(), data=data, progress=False)
    killed = subprocess.run(
        [sys.executable, "-c", DIE, CHAIN.to_json(), tmp_path],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (tests, tests.parent)))},
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    (checkpoint,) = tmp_path.glob("distill-encoder-*.safetensors")
    with safe_open(checkpoint, framework="pt") as file:
        assert json.loads(file.metadata()["samcompress"])["step"] == 3
    (cached,) = (tmp_path / "teacher").glob("*.safetensors")
    written = cached.stat().st_mtime_ns
    resumed = CHAIN(random_sam(), data=data, progress=False, workdir=tmp_path)
    assert cached.stat().st_mtime_ns == written
    expected, found = whole.state_dict(), resumed.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[k], found[k]) for k in expected)
    assert sc.lineage(whole)[-1].state == sc.lineage(resumed)[-1].state


def test_two_runs_share_a_folder(tmp_path: Path, scenes: Dataset) -> None:
    sam = random_sam()
    for seed in (0, 1):
        sc.distill.Encoder(steps=2, seed=seed)(
            pruned(sam), data=scenes, teacher=sam, progress=False, workdir=tmp_path
        )
    assert len(list(tmp_path.glob("distill-encoder-*.safetensors"))) == 2


def test_equal_weights_are_not_the_same_student(tmp_path: Path, scenes: Dataset) -> None:
    """A finished run of one attention must not pass for a run of another."""
    sam, learn = random_sam(), sc.distill.Encoder(steps=2, lr=1e-2)

    def taught(step: sc.Transform, workdir: Path | None) -> dict[str, torch.Tensor]:
        chain = step | learn
        return chain(sam, data=scenes, progress=False, workdir=workdir).state_dict()

    steps = sc.attention.Dilated(), sc.attention.PooledKV()
    alone = [taught(step, None) for step in steps]
    shared = [taught(step, tmp_path) for step in steps]
    for expected, found in zip(alone, shared, strict=True):
        assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert any(not torch.equal(alone[0][name], alone[1][name]) for name in alone[0])


# ------------------------------------------------------------------------------------------ errors


def test_nothing_to_learn(scenes: Dataset) -> None:
    sam = random_sam()
    for student in (sam, sc.attention.Fused()(sam, progress=False)):
        with pytest.raises(errors.NoEffectError) as caught:
            sc.distill.Encoder(steps=2)(student, data=scenes, progress=False)
        assert str(caught.value) == (
            "distill.encoder has nothing to learn.\n"
            "  got       a student whose embeddings equal the teacher's already\n"
            "  expected  a step before it that changes the encoder's output\n"
            "  try       teacher=, the model to imitate: without it that is the one that came in"
        )


def test_other_channels_and_grid(scenes: Dataset) -> None:
    """Adapters are chosen, named, trained and thrown away."""
    student, teacher = random_sam(), random_sam(seed=3, out_chans=64, image_size=128)
    names = set(student.state_dict())
    step = sc.distill.Encoder(steps=12, batch_size=3, lr=1e-3)
    small = step(student, data=scenes, teacher=teacher, progress=False)
    facts = sc.lineage(small)[-1].state
    assert facts["adapters"] == [
        "student's channels 32 -> 64, linear",
        "teacher's grid 16x16 -> 8x8, area",
    ]
    assert facts["loss_after"] < 0.9 * facts["loss_before"]
    assert set(small.state_dict()) == names


def test_half_precision_is_refused_before_anything_runs(scenes: Dataset) -> None:
    with pytest.raises(errors.ModelError, match="weights can only be trained in float32"):
        (sc.prune.Mlp(criterion="magnitude") | sc.distill.Encoder())(
            random_sam().half(), data=scenes, progress=False
        )


def test_consume_needs_a_teacher(scenes: Dataset) -> None:
    with pytest.raises(errors.ConfigError, match="needs the original model"):
        sc.distill.Encoder()(random_sam(), data=scenes, consume=True)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("epochs", 0, "0 < epochs < inf"),
        ("lr", -1.0, "0 < lr < inf"),
        ("weight_decay", 2.0, "0 <= weight_decay <= 1"),
        ("steps", 0, ">= 1"),
        ("batch_size", 0, ">= 1"),
        ("loss", "mae", "'mse' | 'huber' | 'l1' | 'mse+cos'"),
    ],
)
def test_fields_out_of_range(field: str, value: object, expected: str) -> None:
    with pytest.raises(errors.ConfigError) as caught:
        sc.distill.Encoder(**{field: value})
    assert str(caught.value).startswith(f"distill.encoder: {field} ")
    assert f"  expected  {expected}" in str(caught.value)
