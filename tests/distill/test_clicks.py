from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import random_sam
from torch import Tensor
from torch.nn import functional as F

from samcompress.distill._clicks import Asked, Clicks, embed, pick, rounds, to_cell, to_frame
from samcompress.distill._decode import decode

SIDE, GRID = 64, 16
RATIO = SIDE / GRID
SIZES = ((64, 64), (40, 64), (64, 50))
OWNER = (0, 0, 1, 1, 1, 2)


def shown() -> Tensor:
    """(3, h, w) share of each cell that shows the image."""
    full = torch.zeros(3, 1, SIDE, SIDE)
    for frame, (height, width) in zip(full, SIZES, strict=True):
        frame[:, :height, :width] = 1
    return F.avg_pool2d(full, int(RATIO))[:, 0]


def clicks(**changes: Any) -> Clicks:
    given: dict[str, Any] = {
        "owner": torch.tensor(OWNER),
        "places": (0, 1, 2),
        "valid": shown(),
        "sizes": SIZES,
        "side": SIDE,
        "seed": 7,
        "step": 3,
    }
    return Clicks(**{**given, **changes})


def one_image(prompts: int, **changes: Any) -> Clicks:
    """Many prompts of one image without padding."""
    only = {
        "owner": torch.zeros(prompts, dtype=torch.long),
        "places": (0,),
        "valid": torch.ones(1, GRID, GRID),
        "sizes": ((SIDE, SIDE),),
    }
    return clicks(**{**only, **changes})


def masks(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Answer and truth (6, h, w)."""
    g = torch.Generator().manual_seed(seed)
    answer, truth = torch.rand(2, len(OWNER), GRID, GRID, generator=g) > 0.5
    return answer, truth


def at(mask: Tensor, points: Tensor) -> Tensor:
    """The value of each mask where its point falls."""
    x, y = to_cell(points, RATIO).T
    return mask[torch.arange(len(mask)), y, x]


def chi_square(counts: Tensor) -> float:
    """As many standard deviations above what uniform draws give."""
    expected = counts.sum() / len(counts)
    freedom = len(counts) - 1
    return float(((counts - expected) ** 2 / expected).sum() - freedom) / (2 * freedom) ** 0.5


# ---------------------------------------------------------------------------------------- places


def test_cells_and_frame() -> None:
    cells = torch.arange(256).float()
    for ratio in (4.0, 2.0, 16.0):
        assert torch.equal(to_cell(to_frame(cells, ratio), ratio), cells.long())
    # The mean of the pixel centres that a cell covers, not its corner.
    assert to_frame(torch.tensor([0.0]), 4).item() == 1.5
    pixels = torch.arange(1024).float()
    error = to_frame(to_cell(pixels, 4).float(), 4) - pixels
    assert float(error.mean()) == 0
    assert float(error.abs().max()) <= 2


def test_where_in_its_cell_a_click_falls() -> None:
    truth = torch.zeros(2000, 64, 64, dtype=torch.bool)
    truth[:, 63, 63] = True
    frame = {"valid": torch.ones(1, 64, 64), "sizes": ((256, 256),), "side": 256}
    spread, _ = one_image(2000, **frame).first(truth.float())
    centre, _ = one_image(2000, **frame, spread=False).first(truth.float())
    assert torch.equal(centre, torch.full((2000, 2), 63 * 4 + 1.5))
    away = spread - centre
    assert bool((to_cell(spread, 4) == 63).all())
    assert float(away.abs().max()) < 2
    assert float(away.abs().max()) > 1.9
    # Uniform: standard deviation 4 / sqrt 12, so the mean of 4000 is within 0.018 (one sigma).
    assert abs(float(away.mean())) < 0.07
    assert float(away.std()) == pytest.approx(4 / 12**0.5, rel=0.05)


def test_places_in_a_cell_have_no_bias_and_stay_in_it() -> None:
    within = (torch.arange(256) + 0.5) / 256
    for ratio in (2.0, 4.0, 8.0):
        points = to_frame(torch.tensor([0.0, 127, 255])[:, None], ratio, within)
        assert torch.equal(to_cell(points, ratio), torch.tensor([[0], [127], [255]]).expand(3, 256))
        assert torch.equal(points.mean(1), to_frame(torch.tensor([0.0, 127, 255]), ratio))


def test_pick_reaches_every_cell_once() -> None:
    g = torch.Generator().manual_seed(0)
    allowed = torch.rand(1, 5, 7, generator=g) > 0.4
    inside = allowed.flatten().nonzero()[:, 0]
    n = len(inside)
    u = (torch.arange(n) + 0.5) / n
    cell, count = pick(allowed.expand(n, -1, -1), u)
    assert torch.equal(cell, inside)
    assert bool((count == n).all())
    last = torch.nextafter(torch.ones(1), torch.zeros(1))
    assert pick(allowed, last)[0].item() == inside[-1]
    assert pick(allowed, torch.zeros(1))[0].item() == inside[0]
    cell, count = pick(torch.zeros(1, 5, 7, dtype=torch.bool), last)
    assert (cell.item(), count.item()) == (0, 0)


# ---------------------------------------------------------------------------------------- clicks


def test_clicks_lie_in_the_error_and_in_the_image() -> None:
    valid = shown()[list(OWNER)] >= 0.5
    for step in range(40):
        answer, truth = masks(step)
        points, labels = clicks(step=step).errors(answer, truth, 1)
        assert bool(at((answer != truth) & valid, points).all())
        assert torch.equal(labels, at(truth, points).long())
        assert torch.equal(labels == 0, at(answer & ~truth, points))
        points, labels = clicks(step=step).errors(answer, truth, 1, policy="fn_only")
        assert bool(at(truth & ~answer & valid, points).all())
        assert torch.equal(labels, torch.ones(6).long())
        points, labels = clicks(step=step).first(truth.float())
        assert bool(at(truth & valid, points).all())
        assert torch.equal(labels, torch.ones(6).long())


def test_both_kinds_of_error_are_clicked() -> None:
    answer, truth = masks()
    labels = torch.cat([clicks(step=s).errors(answer, truth, 1)[1] for s in range(20)])
    assert 0.3 < float(labels.float().mean()) < 0.7


def test_clicks_are_uniform() -> None:
    n = 10_000
    g = torch.Generator().manual_seed(1)
    answer, truth = torch.rand(2, 1, GRID, GRID, generator=g) > 0.7
    answer, truth = (m.expand(n, -1, -1) for m in (answer, truth))
    source = one_image(n)
    drawn = {
        "fp_fn": (answer != truth, source.errors(answer, truth, 1)[0]),
        "fn_only": (truth & ~answer, source.errors(answer, truth, 1, policy="fn_only")[0]),
        "first": (truth, source.first(truth.float())[0]),
    }
    for name, (allowed, points) in drawn.items():
        x, y = to_cell(points, RATIO).T
        counts = torch.bincount(y * GRID + x, minlength=GRID * GRID).double()
        inside = allowed[0].flatten()
        assert counts[~inside].sum() == 0, name
        assert abs(chi_square(counts[inside])) < 4, name
    # And those of a cell are spread over it, and independent of which cell it is.
    offsets = (source.errors(answer, truth, 1)[0] + 0.5) % RATIO
    quarters = (offsets * 2).long()
    assert (
        chi_square(torch.bincount(quarters[:, 1] * 8 + quarters[:, 0], minlength=64).double()) < 4
    )


def test_soft_targets_of_first_points() -> None:
    target = torch.zeros(3, GRID, GRID)
    target[0, 3, 4], target[0, 5, 5] = 0.5, 0.49
    target[1, 7, 8], target[1, 9, 9] = 0.3, 0.2  # thin: covers no cell by half
    source = one_image(3)
    points, labels = source.first(target)
    assert to_cell(points, RATIO)[:2].tolist() == [[4, 3], [8, 7]]
    assert labels.tolist() == [1, 1, -1]
    assert points[2].tolist() == [0, 0]


def test_small_errors_are_ignored() -> None:
    answer = torch.zeros(4, GRID, GRID, dtype=torch.bool)
    truth = answer.clone()
    truth[1, 0, :9], truth[2, 0, :10], truth[3] = True, True, True
    points, labels = one_image(4).errors(answer, truth, 1)
    assert labels.tolist() == [-1, -1, 1, 1]
    assert not points[:2].any()
    assert one_image(4).errors(answer, truth, 1, ignore_below=0)[1].tolist() == [-1, 1, 1, 1]
    # Too much is no error for fn_only; what lies in the padding is none at all.
    assert one_image(4).errors(truth, answer, 1, policy="fn_only")[1].tolist() == [-1] * 4
    valid = torch.ones(1, GRID, GRID)
    valid[:, 0] = 0.49
    assert one_image(4, valid=valid).errors(answer, truth, 1)[1].tolist() == [-1, -1, -1, 1]


def test_equal_models_have_no_error() -> None:
    answer, _ = masks()
    points, labels = clicks().errors(answer, answer, 1)
    assert labels.tolist() == [-1] * 6
    assert not points.any()


# ----------------------------------------------------------------------------------------- boxes


def test_jitter() -> None:
    n = 10_000
    source = one_image(n, valid=torch.ones(1, 64, 64), side=1024, sizes=((1024, 1024),))
    box = torch.tensor([300.0, 400, 400, 450])  # 100 and 50 wide: noise is seldom cut off
    shift = source.boxes(box.expand(n, -1)) - box
    assert shift.abs().amax(0).tolist() == [20, 20, 20, 20]
    assert shift.mean(0).abs().max() < 0.4
    # A normal distribution cut at two sigma has 0.9594 of its spread, one at four all of it.
    expected = torch.tensor([9.594, 5, 9.594, 5])
    torch.testing.assert_close(shift.std(0), expected, rtol=0.03, atol=0)
    off_diagonal = torch.corrcoef(shift.T) - torch.eye(4)
    assert float(off_diagonal.abs().max()) < 0.05
    # The limit follows the frame: 20 px of 1024 are 1.25 of 64.
    wide = torch.tensor([4.0, 4, 60, 60]).expand(n, -1)
    assert (one_image(n).boxes(wide) - wide).abs().max() == 1.25


def test_jittered_boxes_stay_boxes_in_the_image() -> None:
    g = torch.Generator().manual_seed(0)
    ends = torch.tensor(SIZES).flip(1).repeat(1, 2)[list(OWNER)]
    low = 0.8 * torch.rand(6, 2, generator=g) * ends[:, :2]
    for width in (0.01, 1.0, 1000.0):
        high = torch.minimum(low + width * torch.rand(6, 2, generator=g) + 1e-2, ends[:, 2:])
        for step in range(100):
            boxes = clicks(step=step).boxes(torch.cat([low, high], 1))
            assert bool((boxes[:, :2] < boxes[:, 2:]).all())
            assert bool((boxes >= 0).all())
            assert bool((boxes <= ends).all())


def test_the_largest_noise_turns_no_box_inside_out(monkeypatch: pytest.MonkeyPatch) -> None:
    most = 1 - 2**-24
    u = torch.tensor([[most, most, 0, 0], [0, 0, most, most], [0, most, most, 0]])
    monkeypatch.setattr(Clicks, "numbers", lambda *_: u)
    boxes = one_image(3).boxes(torch.tensor([[10.0, 20, 11, 22]]).repeat(3, 1))
    expected = [[10.45, 20.9, 10.55, 21.1], [9.55, 19.1, 11.45, 22.9], [9.55, 20.9, 11.45, 21.1]]
    torch.testing.assert_close(boxes, torch.tensor(expected))


# ----------------------------------------------------------------------------- order and division


def everything(source: Clicks, prompts: Tensor) -> list[Tensor]:
    answer, truth = (m[prompts] for m in masks())
    boxes = torch.tensor([8.0, 8, 30, 30]).repeat(len(prompts), 1)
    asked = source.begin(boxes, truth.float())
    for number in (1, 2):
        asked = asked.grown(*source.errors(answer, truth, number))
    return [asked.points, asked.labels]


def test_same_prompts_in_every_division_of_the_batch() -> None:
    whole = everything(clicks(), torch.arange(6))
    owner = torch.tensor(OWNER)
    for parts in (((0,), (1,), (2,)), ((0, 1), (2,)), ((0,), (1, 2))):
        found = []
        for images in parts:
            prompts = torch.cat([(owner == i).nonzero()[:, 0] for i in images])
            source = clicks(
                owner=owner[prompts] - images[0],
                places=images,
                valid=shown()[list(images)],
                sizes=[SIZES[i] for i in images],
            )
            found.append(everything(source, prompts))
        for a, *b in zip(whole, *found, strict=True):
            assert torch.equal(a, torch.cat(b))


def test_order_of_images_and_images_without_prompts_change_nothing() -> None:
    whole = everything(clicks(), torch.arange(6))
    # The last image first, and another without prompts in between.
    order = [5, 0, 1, 2, 3, 4]
    source = clicks(
        owner=torch.tensor([0, 2, 2, 3, 3, 3]),
        places=(2, 9, 0, 1),
        valid=shown()[[2, 0, 0, 1]],
        sizes=[SIZES[i] for i in (2, 0, 0, 1)],
    )
    for a, b in zip(whole, everything(source, torch.tensor(order)), strict=True):
        assert torch.equal(a[order], b)
    # Prompts of several images interleaved: each image's keep their order.
    order = [2, 0, 5, 3, 1, 4]
    source = clicks(owner=torch.tensor([1, 0, 2, 1, 0, 1]))
    for a, b in zip(whole, everything(source, torch.tensor(order)), strict=True):
        assert torch.equal(a[order], b)


def test_what_the_draws_depend_on() -> None:
    first = clicks().numbers(3, "click", 1)
    assert torch.equal(first, clicks().numbers(3, "click", 1))
    assert bool(((first >= 0) & (first < 1)).all())
    others = [
        clicks(seed=8).numbers(3, "click", 1),
        clicks(step=4).numbers(3, "click", 1),
        clicks(places=(3, 4, 5)).numbers(3, "click", 1),
        clicks().numbers(3, "first", 1),
        clicks().numbers(3, "click", 2),
    ]
    for other in others:
        assert not bool((first == other).any())
    assert len(first.unique()) == first.numel()


def test_global_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    everything(clicks(), torch.arange(6))
    assert torch.equal(torch.get_rng_state(), before)


# ------------------------------------------------------------------------------------- the state


def test_state_grows_by_a_click_a_round() -> None:
    answer, truth = masks()
    boxes = torch.tensor([8.0, 8, 30, 30]).repeat(6, 1)
    source = clicks()
    boxed = source.numbers(1, "kind")[:, 0] < 0.5
    assert boxed.any()
    assert not boxed.all()
    asked = source.begin(boxes.requires_grad_(), truth.float().requires_grad_())
    jittered = source.boxes(boxes.detach())
    assert torch.equal(asked.points[boxed].flatten(1), jittered[boxed])
    assert asked.labels[boxed].tolist() == [[2, 3]] * int(boxed.sum())
    assert asked.labels[~boxed].tolist() == [[1, -1]] * int((~boxed).sum())
    assert torch.equal(asked.ambiguous, ~boxed)
    history = [asked]
    for number in (1, 2, 3):
        history.append(history[-1].grown(*source.errors(answer, truth, number)))
    last = history[-1]
    assert last.points.shape == (6, 5, 2)
    assert last.labels.shape == (6, 5)
    for number, earlier in enumerate(history):
        assert torch.equal(last.points[:, : 2 + number], earlier.points)
        assert torch.equal(last.labels[:, : 2 + number], earlier.labels)
    assert len({tuple(p.flatten().tolist()) for p in last.points[:, 2:].unbind(1)}) == 3
    assert not any(t.requires_grad for t in (last.points, last.labels))
    assert not last.ambiguous.any()
    assert bool(last.going.all())
    for share, all_ in ((0.0, False), (1.0, True)):
        labels = source.begin(boxes, truth.float(), box_share=share).labels
        assert bool(((labels[:, 0] == 2) == all_).all())


def test_once_ignored_stays_ignored() -> None:
    asked = Asked(torch.zeros(2, 2, 2), torch.tensor([[1, -1], [2, 3]]), torch.rand(2, 1, 4, 4))
    assert asked.going.tolist() == [True, True]
    asked = asked.grown(torch.zeros(2, 2), torch.tensor([0, -1]))
    assert asked.going.tolist() == [True, False]
    asked = asked.grown(torch.zeros(2, 2), torch.tensor([1, 1]))
    assert asked.going.tolist() == [True, False]
    rest = asked.rows(asked.going)
    assert rest.labels.tolist() == [[1, -1, 0, 1]]
    assert rest.masks is not None
    assert asked.masks is not None
    assert torch.equal(rest.masks, asked.masks[:1])


def test_clicks_of_some_prompts_are_those_they_get_among_all() -> None:
    answer, truth = masks()
    points, labels = clicks().errors(answer, truth, 1)
    rows = torch.tensor([1, 4, 5])
    some = clicks().errors(answer[rows], truth[rows], 1, rows=rows)
    assert torch.equal(some[0], points[rows])
    assert torch.equal(some[1], labels[rows])


def test_last_losses_stand_for_rounds_not_asked() -> None:
    weight = torch.ones(3, 4, requires_grad=True)  # rounds, prompts
    ends = torch.tensor([0, 9, 1, 0])  # the round after whose answer a prompt is right
    asked_for = []

    def answer(asked: Asked, rows: Tensor, number: int) -> tuple[dict[str, Tensor], Asked]:
        asked_for.append(rows.tolist())
        assert asked.points.shape == (len(rows), 2 + number, 2)
        label = torch.where(ends[rows] <= number, -1, 1)
        term = (number + 1) * weight[number, rows]
        return {"a": term, "b": 2 * term}, asked.grown(torch.zeros(len(rows), 2), label)

    first = Asked(torch.zeros(4, 2, 2), torch.tensor([[2, 3]] * 4))
    total = rounds(first, 3, answer)
    assert asked_for == [[0, 1, 2, 3], [1, 2], [1]]
    # Latest losses by round: 1 1 1 1, then 1 2 2 1, then 1 3 2 1.
    assert total["a"].item() == pytest.approx((4 + 6 + 7) / 12)
    assert total["b"].item() == pytest.approx(2 * total["a"].item())
    slope = torch.autograd.grad(total["a"], weight)[0] * 12
    expected = torch.tensor([[3.0, 1, 1, 3], [0, 2, 4, 0], [0, 3, 0, 0]])
    torch.testing.assert_close(slope, expected)
    # All are right at once: nothing is asked with no prompts.
    asked_for.clear()
    ends.zero_()
    assert rounds(first, 3, answer)["a"].item() == 1
    assert asked_for == [[0, 1, 2, 3]]


# --------------------------------------------------------------------------- against SAM's own call


@pytest.fixture(scope="module")
def sam() -> Any:
    return random_sam()


def plain(sam: Any, features: Tensor, asked: Asked) -> Tensor:
    """(1, 4, h, w) logits of one prompt by SAM's own prompt encoder and decoder."""
    points, labels = asked.points, asked.labels
    boxed = int(labels[0, 0]) == 2
    box = points[:, :2].reshape(1, 4) if boxed else None
    keep = labels[0] >= 0
    keep[:2] &= not boxed
    given = (points[:, keep], labels[:, keep].float()) if keep.any() else None
    sparse, dense = sam.prompt_encoder(given, box, asked.masks)
    place = sam.prompt_encoder.get_dense_pe()
    logits: Tensor = sam.mask_decoder.predict_masks(features, place, sparse, dense)[0]
    return logits


@torch.no_grad()
def test_tokens_are_those_of_sam(sam: Any) -> None:
    g = torch.Generator().manual_seed(0)
    points, boxes = 64 * torch.rand(3, 2, 2, generator=g), 64 * torch.rand(3, 4, generator=g)
    labels = torch.tensor([[1, 0], [0, 1], [1, -1]])
    theirs = sam.prompt_encoder((points, labels.float()), None, None)[0]
    pad = torch.zeros(3, 1, 2), torch.full((3, 1), -1)
    ours = embed(sam.prompt_encoder, torch.cat([points, pad[0]], 1), torch.cat([labels, pad[1]], 1))
    assert torch.equal(ours, theirs)
    theirs = sam.prompt_encoder((points, labels.float()), boxes, None)[0]
    both = torch.cat([points, boxes.view(3, 2, 2)], 1)
    corners = torch.tensor([[2, 3]]).expand(3, -1)
    ours = embed(sam.prompt_encoder, both, torch.cat([labels, corners], 1))
    assert torch.equal(ours, theirs)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(embed(sam.prompt_encoder, both, torch.cat([labels, corners], 1)), theirs)


def test_tokens_teach_the_prompt_encoder(sam: Any) -> None:
    encoder = sam.prompt_encoder
    weights = [encoder.not_a_point_embed.weight, *(e.weight for e in encoder.point_embeddings)]
    labels = torch.tensor([[1, -1], [2, 3]])
    tokens = embed(encoder, torch.ones(2, 2, 2), labels)
    slopes = torch.autograd.grad(tokens.sum(), weights)
    assert [bool(s.any()) for s in slopes] == [True, False, True, True, True]


@torch.no_grad()
@pytest.mark.parametrize("fed", [False, True])
def test_loop_equals_a_plain_call_for_each_prompt(sam: Any, fed: bool) -> None:
    """Boxes, points and ignored clicks of several images in one batch, and each by SAM alone."""
    g = torch.Generator().manual_seed(2)
    features, owner = torch.randn(3, 32, 8, 8, generator=g), torch.tensor(OWNER)
    prompts = len(owner)
    valid = F.interpolate(shown()[:, None], scale_factor=2)[:, 0]
    source = clicks(valid=valid)
    target = torch.rand(prompts, 32, 32, generator=g) > 0.5
    low = 10 * torch.rand(prompts, 2, generator=g)
    first = source.begin(torch.cat([low, low + 20], 1), target.float())
    boxed = first.labels[:, 0] == 2
    start = decode(sam, features, owner, first).logits
    # Two prompts, one of each kind, are right from the beginning.
    right = [int(boxed.nonzero()[0]), int((~boxed).nonzero()[0])]
    target[right] = start[right, 0] > 0
    logits, kept = torch.zeros_like(start), [first.rows(torch.tensor([p])) for p in range(prompts)]

    def answer(asked: Asked, rows: Tensor, number: int) -> tuple[dict[str, Tensor], Asked]:
        if number:
            assert sorted({*range(prompts)} - {*rows.tolist()}) == sorted(right)
        found = decode(sam, features, owner[rows], asked).logits
        logits[rows] = found
        for i, row in enumerate(rows.tolist()):
            kept[row] = asked.rows(torch.tensor([i]))
        more = asked.grown(*source.errors(found[:, 0] > 0, target[rows], number, rows=rows))
        return {"loss": found.mean((1, 2, 3))}, replace(more, masks=found[:, :1] if fed else None)

    rounds(first, 3, answer)
    # A click that is ignored changes nothing, bit for bit.
    assert torch.equal(logits[right], start[right])
    for row, asked in enumerate(kept):
        assert asked.labels.shape[1] == (2 if row in right else 4)
        one = features[owner[row] : owner[row] + 1]
        expected = plain(sam, one, asked)
        torch.testing.assert_close(logits[row : row + 1], expected, rtol=1e-5, atol=1e-5)
    # Asked again all the same, its token would have changed the answer.
    ignored = first.grown(torch.zeros(prompts, 2), torch.full((prompts,), -1))
    moved = (decode(sam, features, owner, ignored).logits - start).abs().amax((1, 2, 3))
    assert bool((moved > 1e-3).all())


@torch.no_grad()
def test_models_of_other_sizes_see_the_same_places(sam: Any) -> None:
    half = random_sam(image_size=32)
    half.prompt_encoder.load_state_dict(sam.prompt_encoder.state_dict())
    _, truth = masks()
    asked = clicks().begin(torch.tensor([8.0, 8, 30, 30]).repeat(6, 1), truth.float())
    small = asked.scaled(0.5)
    torch.testing.assert_close(
        embed(half.prompt_encoder, small.points, small.labels),
        embed(sam.prompt_encoder, asked.points, asked.labels),
        rtol=0,
        atol=1e-5,
    )
