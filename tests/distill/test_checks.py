"""What holds for every preset, whatever it teaches."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import fitting
import presets
import pytest
import torch
from conftest import random_sam
from learners import changed, copied, equal
from presets import PRESETS, images, preset, trained
from safetensors.torch import load_file
from torch import Tensor, nn

import samcompress as sc
from samcompress.core import _saved
from samcompress.core._batches import batches
from samcompress.core._objective import Objective, Share
from samcompress.core._progress import Progress
from samcompress.core._trainable import inside, training
from samcompress.core.errors import NoEffectError
from samcompress.core.predict import encode
from samcompress.core.transform import Context
from samcompress.distill import supervised
from samcompress.distill._cache import evaluating
from samcompress.distill._clicks import Asked, Clicks
from samcompress.distill._decode import decode
from samcompress.distill._learner import Learner
from samcompress.distill._samples import Batch
from samcompress.distill._views import Seen
from samcompress.distill.encoder import Pairs

each = pytest.mark.parametrize("name", PRESETS)
PROMPTED = ("prompt_loop", "full_stage", "supervised")
prompted = pytest.mark.parametrize("name", PROMPTED)
many_workers = pytest.mark.filterwarnings(
    "ignore:This DataLoader will create:UserWarning", "ignore:.*fork:DeprecationWarning"
)


def test_all_presets_are_here() -> None:
    found = set(sc.list_transforms("distill.*"))
    # The head is no student: its own tests are in test_heat_head.py.
    assert {f"distill.{name}" for name in PRESETS} | {"distill.heat_head"} == found


def made(step: Learner, student: nn.Module | None = None) -> Objective:
    """Its objective, in eval mode."""
    ctx = Context(
        step="test", teacher=random_sam(seed=5), dataset=images(), progress=Progress(False)
    )
    return step.objective(student or random_sam(), ctx, 6).eval()


def launched(command: str, folder: Path, *options: str) -> None:
    subprocess.run(
        [sys.executable, *options, presets.__file__, command, str(folder)],
        env=fitting.environment() | {"PYTHONPATH": ":".join(filter(None, PATHS))},
        check=True,
        timeout=300,
        capture_output=True,
    )


PATHS = [str(Path(__file__).parents[1]), fitting.environment()["PYTHONPATH"]]


# -------------------------------------------------------------------------- resuming and processes


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of runs that were killed."""
    folder = tmp_path_factory.mktemp("killed")
    launched("killed", folder)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[nn.Module, Path]]:
    """Runs that nothing stopped, made when they are first asked for."""
    folder = tmp_path_factory.mktemp("whole")

    class Made(dict[str, tuple[nn.Module, Path]]):
        def __missing__(self, name: str) -> tuple[nn.Module, Path]:
            step = preset(name, **presets.MIDDLE)
            self[name] = trained(step, folder / name), checkpoint(folder / name)
            return self[name]

    return Made()


def checkpoint(folder: Path) -> Path:
    (place,) = folder.glob("distill-*.safetensors")
    return place


@many_workers
@each
@pytest.mark.parametrize("workers", [0, 2])
def test_killed_amid_a_batch_and_resumed_elsewhere(
    name: str, workers: int, killed: Path, whole: dict[str, tuple[nn.Module, Path]]
) -> None:
    """Neither an epoch nor the batch was at its end; the other process was not this one."""
    folder = killed / f"{name}-{workers}"
    assert _saved.read(checkpoint(folder))[1]["step"] == 3
    found = trained(preset(name, workers=workers, **presets.MIDDLE), folder)
    expected, file = whole[name]
    assert equal(expected, found)
    assert sc.lineage(expected)[-1].state == sc.lineage(found)[-1].state
    # Optimiser, averages and curves as well.
    ours, theirs = load_file(checkpoint(folder)), load_file(file)
    assert any(k.startswith("optimizer.exp_avg.") for k in ours)
    assert any(k.startswith("ema.") for k in ours)
    assert fitting.same(ours, theirs)
    assert _saved.read(checkpoint(folder))[1]["items"] == _saved.read(file)[1]["items"]


def test_killed_three_times_at_random_moments(killed: Path, tmp_path: Path) -> None:
    step = preset("supervised", **presets.RANDOM)
    folder = killed / "random"
    assert 0 < _saved.read(checkpoint(folder))[1]["step"] < step.steps
    found, expected = trained(step, folder), trained(step, tmp_path)
    assert equal(found, expected)
    assert fitting.same(load_file(checkpoint(folder)), load_file(checkpoint(tmp_path)))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes made of it."""
    pytest.importorskip("accelerate")
    folder = tmp_path_factory.mktemp("two")
    options = (
        "--multi_gpu --num_processes=2 --num_machines=1 --mixed_precision=no --dynamo_backend=no"
    )
    launched(
        "shared",
        folder,
        *("-m", "accelerate.commands.launch", *options.split(), "--main_process_port=0"),
    )
    return folder


@pytest.mark.parametrize("name", ["encoder", "supervised"])
def test_two_processes_equal_one(name: str, two: Path) -> None:
    """Three of five images a step: one process gets two of them, the other one."""
    main, other = (load_file(two / f"{name}-{rank}") for rank in (0, 1))
    assert fitting.same(main, other)
    step = preset(name, **presets.SHARED)
    done, before = trained(step), random_sam().state_dict()
    assert max((main[k] - v).abs().max() for k, v in before.items()) > step.lr
    for key, value in done.state_dict().items():
        apart = (main[key] - value).abs()
        if key.endswith("k_proj.bias"):
            unseen = apart
        elif key.endswith("qkv.bias"):
            query, unseen, other_ = apart.chunk(3)
            apart = torch.cat([query, other_])
        else:
            unseen = None
        if unseen is not None:
            # A softmax does not see its keys' bias: its gradient is rounding, which Adam enlarges.
            assert unseen.max() <= step.lr * step.steps, key
        if unseen is not apart:
            assert apart.max() <= 1e-6, key
    twin = random_sam()
    twin.load_state_dict(main)
    shown = [s.image for s in images()]
    for a, b in zip(encode(done, shown), encode(twin, shown), strict=True):
        torch.testing.assert_close(a.features, b.features, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------ what changes


@each
def test_only_declared_modules_change(name: str) -> None:
    step = preset(name, steps=1)
    student, run = random_sam(), presets.run()
    teacher = run["teacher"]
    before, kept = copied(student), copied(teacher)
    buffers = [b.clone() for b in student.buffers()]
    done = step(student, **run)
    declared = [p.removeprefix("student.") for p in step.parts if p.startswith("student.")]
    found = changed(before, done)
    assert found <= {n for n in before if inside(n, declared)}
    assert all(any(inside(n, [part]) for n in found) for part in declared)
    assert all(map(torch.equal, buffers, done.buffers()))
    assert not changed(kept, teacher)
    assert not changed(before, student)
    assert all(p.grad is None for m in (teacher, student, done) for p in m.parameters())
    assert not any(m.training for m in done.modules())


class Normed(nn.Module):
    """An image encoder with batch norm, and no blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.img_size = 64
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 8, 8), nn.BatchNorm2d(32))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.stem(x)
        return found


@pytest.mark.parametrize(
    ("name", "fields", "moves"),
    [
        ("encoder", {}, True),
        ("prompt_loop", {"decoder": "freeze"}, True),
        ("full_stage", {}, True),
        ("supervised", {}, True),
        ("supervised", {"train_encoder": False}, False),
    ],
    ids=str,
)
def test_batch_norm(name: str, fields: dict[str, Any], moves: bool) -> None:
    """Its averages move where it trains; never in a teacher or in a part that is frozen."""
    student, run = random_sam(), presets.run()
    student.image_encoder, run["teacher"].image_encoder = Normed(), Normed()
    run["teacher"].train()
    kept, before = copied(run["teacher"]), copied(student)
    done = preset(name, steps=1, **fields)(student, **run)
    averages = {"image_encoder.stem.1.running_mean", "image_encoder.stem.1.num_batches_tracked"}
    assert averages & changed(before, done) == (averages if moves else set())
    assert not changed(kept, run["teacher"])
    assert run["teacher"].image_encoder.training


TAUGHT = {
    "encoder": [({}, False)],
    "prompt_loop": [({}, False), ({"iou": 1.0}, True)],
    "full_stage": [({"decoder": "train"}, True)],
    "layer_wise": [({}, False)],
    "sami": [({}, False)],
    "align_bottleneck": [({}, False)],
    "align_embedding": [({}, False)],
    "supervised": [({}, True)],
}


@pytest.mark.parametrize(
    ("name", "fields", "taught"), [(n, *case) for n, cases in TAUGHT.items() for case in cases]
)
def test_iou_head_learns_if_the_record_says_so(
    name: str, fields: dict[str, Any], taught: bool
) -> None:
    step = preset(name, steps=1, **fields)
    objective = made(step)
    head = objective.student.get_submodule("mask_decoder.iou_prediction_head")
    with training(objective, step.parts):
        total(objective, objective.source.draw(0, Share())).backward()
        slopes = [p.grad is not None and bool(p.grad.any()) for p in head.parameters()]
    assert slopes == [taught] * len(slopes)
    done = trained(step)
    assert sc.lineage(done)[-1].state["iou_trained"] is taught


# ------------------------------------------------------------------------ division, order, workers


def total(objective: Objective, drawn: Any, step: int = 0) -> Tensor:
    return torch.stack(list(objective(drawn, step).values())).sum()


@each
@pytest.mark.parametrize("count", [2, 4])
def test_loss_and_gradient_whatever_the_division(name: str, count: int) -> None:
    """Four images at once, in four parts, and in two with other numbers of prompts."""
    step = preset(name, batch_size=4)
    objective = made(step)
    found = []
    with training(objective, step.parts) as parameters, evaluating(objective):
        for divided in (1, count):
            parts = [objective.source.draw(2, Share(i, divided)) for i in range(divided)]
            weight = sum(part.weight for part in parts)
            loss = sum(total(objective, p, 2) * (p.weight / weight) for p in parts)
            loss.backward()
            grads = {n: p.grad.clone() for n, p in parameters.items() if p.grad is not None}
            found.append((loss.item(), grads))
            for p in parameters.values():
                p.grad = None
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-6, rel=1e-6)
    assert found[0][1].keys() == found[1][1].keys()
    for key, grad in found[0][1].items():
        size = max(1.0, float(grad.abs().max()))
        assert (grad - found[1][1][key]).abs().max() <= 1e-6 * size, key


def permuted(drawn: Any, order: list[int]) -> Any:
    """The same images in another order, each with its place and prompts."""
    if isinstance(drawn, Seen):
        images_ = tuple(t[order] for t in drawn.images)
        sizes, places = (tuple(v[i] for i in order) for v in (drawn.sizes, drawn.places))
        return Seen(images_, sizes, places)
    if isinstance(drawn, Pairs):
        return Pairs(drawn.images[order], [drawn.sizes[i] for i in order], drawn.teacher[order])
    if not isinstance(drawn, Batch):
        features = drawn.features[order]
        return replace(drawn, batch=permuted(drawn.batch, order), features=features)
    # First prompts of all images, then second ones: only those of one image keep their order.
    rank = [drawn.owner[:i].tolist().count(o) for i, o in enumerate(drawn.owner.tolist())]
    rows = torch.tensor(rank).argsort(stable=True)
    where = torch.tensor([order.index(i) if i in order else -1 for i in range(len(drawn.places))])
    return replace(
        drawn,
        images=drawn.images[order],
        valid=drawn.valid[order],
        **{f: tuple(getattr(drawn, f)[i] for i in order) for f in ("sizes", "places", "indices")},
        owner=where[drawn.owner[rows]],
        target=drawn.target[rows],
        boxes=drawn.boxes[rows],
    )


@torch.no_grad()
@each
def test_order_of_images_and_prompts_does_not_matter(name: str) -> None:
    objective = made(preset(name, batch_size=4))
    drawn = objective.source.draw(2, Share())
    expected = objective(drawn, 2)
    found = objective(permuted(drawn, [2, 0, 3, 1]), 2)
    for term, value in expected.items():
        assert found[term].item() == pytest.approx(value.item(), rel=1e-5, abs=1e-6), term


@torch.no_grad()
@prompted
def test_an_image_without_prompts_changes_nothing(name: str) -> None:
    objective = made(preset(name, batch_size=4))
    drawn = objective.source.draw(2, Share())
    batch = drawn if isinstance(drawn, Batch) else drawn.batch
    rows = batch.owner != 1
    assert not rows.all()
    bare = replace(batch, **{f: getattr(batch, f)[rows] for f in ("owner", "target", "boxes")})
    with_ = bare if batch is drawn else replace(drawn, batch=bare)
    expected, found = (objective(d, 2) for d in (with_, permuted(with_, [0, 2, 3])))
    for term, value in expected.items():
        assert found[term].item() == pytest.approx(value.item(), rel=1e-5, abs=1e-6), term


@many_workers
@prompted
def test_same_prompts_on_one_and_four_workers(name: str) -> None:
    objective = made(preset(name, batch_size=3))
    source: Any = objective.source
    found = []
    for workers in (0, 1, 4):
        asked = []
        for step, (drawn,) in enumerate(batches(source, range(5), [Share()], workers)):
            batch = drawn if isinstance(drawn, Batch) else drawn.batch
            clicks = Clicks.of(batch, 64, seed=0, step=step)
            first = clicks.begin(batch.boxes, batch.target)
            nothing = torch.zeros_like(batch.target, dtype=torch.bool)
            more = first.grown(*clicks.errors(nothing, batch.target >= 0.5, 1))
            asked += [more.points, more.labels, batch.images, batch.target]
        found.append(asked)
    assert len(found[0]) == 20
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@many_workers
@prompted
def test_same_weights_on_one_and_four_workers(name: str) -> None:
    one, four = (trained(preset(name, steps=2, workers=workers)) for workers in (1, 4))
    assert equal(one, four)


# ---------------------------------------------------------------------------------------- the rest


def test_rounds_of_supervised(monkeypatch: pytest.MonkeyPatch) -> None:
    """R answers, R - 1 clicks in order, boxes in all of them, and no history in any."""
    seen: list[Asked] = []

    def spy(model: nn.Module, features: Tensor, owner: Tensor, asked: Asked) -> Any:
        assert features.requires_grad
        seen.append(asked)
        return decode(model, features, owner, asked)

    monkeypatch.setattr(supervised, "decode", spy)
    objective = made(preset("supervised", batch_size=4, rounds=4))
    objective(objective.source.draw(0, Share()), 0)
    assert [a.labels.shape[1] for a in seen] == [2, 3, 4, 5]
    assert len({len(a.labels) for a in seen}) == 1  # a random student is never right
    for earlier, later in itertools.pairwise(seen):
        known = earlier.labels.shape[1]
        assert torch.equal(later.points[:, :known], earlier.points)
        assert torch.equal(later.labels[:, :known], earlier.labels)
        assert later.masks is not None
        assert not later.masks.requires_grad
        assert not later.points.requires_grad
    assert (seen[0].labels[:, 0] == 2).any()


@each
def test_student_that_is_the_teacher_is_refused(name: str) -> None:
    """Nothing could be learned, and training would only do harm."""
    if name == "supervised":
        pytest.skip("has no teacher")
    if name == "sami":
        pytest.skip("guesses what is hidden, also of itself")
    with pytest.raises(NoEffectError, match="has nothing to learn"):
        preset(name, steps=1)(random_sam(), data=images(), progress=False)


@each
def test_saved_student_gives_the_predictor_the_logits_of_training(
    name: str, tmp_path: Path
) -> None:
    done = trained(preset(name, steps=2))
    sc.save(done, tmp_path / "student")
    source: Any = made(preset("supervised", batch_size=4, augment=None), done).source
    batch: Batch = source.draw(0, Share())
    asked = Clicks.of(batch, 64, seed=0, step=0).begin(batch.boxes, batch.target)
    # Clicks fall anywhere in a cell; the predictor takes none before the first pixel's centre.
    asked = dataclasses.replace(asked, points=asked.points.clamp(min=0))
    with torch.no_grad():
        logits = decode(done, done.image_encoder(batch.images), batch.owner, asked).logits
    loaded = sc.load(tmp_path / "student")
    for row, (owner, points) in enumerate(zip(batch.owner.tolist(), asked.points, strict=True)):
        boxed = int(asked.labels[row, 0]) == 2
        prompt = (
            sc.Prompt(box=points.flatten().tolist())
            if boxed
            else sc.Prompt(points=points[:1].tolist(), labels=[1])
        )
        image = source.data[batch.indices[owner]].image
        (found,) = sc.predict(loaded, [image], [[prompt]])
        torch.testing.assert_close(found.logits[0, 0], logits[row, 0], rtol=0, atol=1e-5)
