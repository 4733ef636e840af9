"""Grids, observers and calibration: what all quantization here is made of."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import samcompress as sc
from samcompress.core.data import as_dataset
from samcompress.core.errors import ConfigError, DataError
from samcompress.core.transform import Context
from samcompress.quantize._calibrate import asked, calibrate, observe, tapped
from samcompress.quantize._observe import (
    AverageMinMax,
    MinMax,
    Mse,
    Percentile,
    observer,
    weight_range,
)
from samcompress.quantize._uniform import Grid, affine_range, fake, pack4, symmetric_range


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def context(count: int = 2, **more: object) -> Context:
    return Context(
        step="quantize.test", dataset=as_dataset(sc.shapes(count, size=(48, 64))), **more
    )


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rounding_is_near_idempotent_and_keeps_zero(bits: int, symmetric: bool) -> None:
    x = numbers(1000)
    x[0] = 0
    grid = Grid(bits, symmetric)
    scale, zero = grid.steps(x.min(), x.max())
    once = grid.fake(x, scale, zero)
    assert torch.equal(grid.fake(once, scale, zero), once)
    assert once[0] == 0
    assert len(once.unique()) <= 1 << bits
    # Half a step inside the range; rounding the zero point shifts the range by half a step more.
    inside = (x > (grid.codes[0] - zero) * scale) & (x < (grid.codes[1] - zero) * scale)
    assert inside.float().mean() > 0.9
    assert (once - x)[inside].abs().max() <= scale / 2 * (1 + 1e-5)


@pytest.mark.parametrize("value", [0.0, 3.0, -3.0, 1e-12])
def test_constant_tensors_get_finite_steps(value: float) -> None:
    x = torch.full((5,), value)
    for grid in (Grid(8), Grid(8, symmetric=True)):
        scale, zero = grid.steps(x.min(), x.max())
        assert torch.isfinite(scale)
        assert scale > 0
        assert torch.allclose(grid.fake(x, scale, zero), x, atol=1e-6)


def test_steps_a_channel_are_no_coarser_than_one_for_all() -> None:
    x = numbers(6, 50) * torch.arange(1, 7)[:, None]
    each, _ = affine_range(x.amin(1), x.amax(1), 4)
    whole, _ = affine_range(x.min(), x.max(), 4)
    assert (each <= whole * (1 + 1e-6)).all()
    assert (each < whole).any()


def test_by_hand() -> None:
    # 0 ... 3 over -1 ... 2: a step of 1, the zero at code 1; 0.5 and 1.5 go to even codes.
    scale, zero = affine_range(torch.tensor(-1.0), torch.tensor(2.0), 2)
    assert (float(scale), float(zero)) == (1.0, 1.0)
    x = torch.tensor([-9.0, -1.0, 0.5, 1.5, 9.0])
    assert fake(x, scale, zero, 0, 3).tolist() == [-1.0, -1.0, 0.0, 2.0, 2.0]
    assert float(symmetric_range(torch.tensor(127.0), 8)) == 1.0


def test_gradients_are_those_of_learned_steps() -> None:
    x = torch.tensor([0.3, 0.9, 5.0], requires_grad=True)
    scale = torch.tensor(0.5, requires_grad=True)
    fake(x, scale, torch.tensor(0.0), 0, 3).sum().backward()
    assert x.grad is not None
    assert scale.grad is not None
    assert x.grad.tolist() == [1.0, 1.0, 0.0]  # nothing beyond the range
    # round(x/s) - x/s inside, the last code beyond; times 1 / sqrt(3 numbers * code 3).
    wanted = ((1 - 0.6) + (2 - 1.8) + 3) / 9**0.5
    assert float(scale.grad) == pytest.approx(wanted, rel=1e-5)


def test_four_bits_are_packed_without_loss() -> None:
    codes = torch.arange(-8, 8).repeat(3, 2)
    packed = pack4(codes)
    assert packed.dtype == torch.uint8
    assert packed.shape == (3, 16)
    halves = torch.stack([packed & 15, packed >> 4], -1).flatten(-2)
    assert torch.equal(halves, (codes & 15).to(torch.uint8))  # two's complement


def test_bits_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"so many bits.*\n.*17 bits"):
        Grid(17)


@pytest.mark.parametrize("kind", [MinMax, Percentile])
def test_order_of_images_does_not_matter(kind: type) -> None:
    parts = [numbers(300, seed=n) * 10**n for n in range(4)]
    first, second = kind("layer"), kind("layer")
    for part in parts:
        first.update(part)
    for part in parts[::-1]:
        second.update(part)
    assert all(map(torch.equal, first.range(), second.range()))


def test_observers_by_hand() -> None:
    parts = [torch.tensor([-1.0, 2.0]), torch.tensor([-3.0, 8.0])]
    both, mean, channels = MinMax("a"), AverageMinMax("a"), MinMax("a", axis=0)
    for part in parts:
        for seen in (both, mean, channels):
            seen.update(part)
        both.update(part / 2)  # a second piece of the same image
        mean.update(part / 2)
        mean.end()
    assert [float(end) for end in both.range()] == [-3, 8]
    assert [float(end) for end in mean.range()] == [-2, 5]
    assert [end.tolist() for end in channels.range()] == [[-3, 2], [-1, 8]]


def test_percentile_leaves_out_the_tail() -> None:
    x = torch.cat([torch.linspace(-1, 1, 100_000), torch.tensor([50.0])])
    seen = Percentile("a")
    seen.update(x)
    low, high = seen.range()
    assert -1 <= low <= -0.98
    assert 0.98 <= high <= 1.02


def test_mse_is_no_worse_than_the_whole_range() -> None:
    x = numbers(20_000)
    x[0] = 30
    for symmetric in (False, True):
        grid = Grid(4, symmetric)
        losses = []
        for seen in (Mse("a", grid), MinMax("a")):
            seen.update(x)
            steps = grid.steps(*seen.range())
            losses.append(float((grid.fake(x, *steps) - x).abs().pow(2.4).mean()))
        assert losses[0] < 0.5 * losses[1]


def test_weight_search_lowers_the_error_of_every_channel() -> None:
    weight = numbers(8, 200)
    weight[:, 0] = 12
    grid = Grid(3)

    def errors(search: bool) -> torch.Tensor:
        scale, zero = grid.steps(*weight_range(weight, grid, search=search))
        rounded = grid.fake(weight, scale[:, None], zero[:, None])
        return (rounded - weight).abs().pow(2.4).sum(1)

    assert (errors(True) <= errors(False)).all()
    assert (errors(True) < errors(False)).any()


@pytest.mark.parametrize("kind", ["minmax", "avg_minmax", "percentile", "mse"])
def test_what_is_not_finite_names_the_layer(kind: str) -> None:
    seen = observer(kind, "blocks.3.lin1", Grid(8))  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"not finite while calibrating(.|\n)*blocks\.3\.lin1"):
        seen.update(torch.tensor([1.0, torch.nan]))
    with pytest.raises(DataError, match="never reached while calibrating"):
        seen.range()


def test_calibration_sees_the_padded_image_and_both_parts(tiny_sam: nn.Module) -> None:
    seen: dict[str, list[torch.Size]] = {"encoder": [], "decoder": []}
    modes: list[bool] = []

    def tap(x: torch.Tensor, *rest: torch.Tensor) -> None:
        seen["encoder"].append(x.shape)
        modes.append(tiny_sam.training)

    tiny_sam.train()
    calibrate(
        tiny_sam,
        {"image_encoder.patch_embed": tap},
        context(),
        outputs={"mask_decoder.iou_prediction_head": lambda y: seen["decoder"].append(y.shape)},
    )
    assert seen["encoder"] == [(1, 3, 64, 64)] * 2
    assert len(seen["decoder"]) >= 2
    assert modes == [False, False]
    assert tiny_sam.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny_sam.modules())


def test_hooks_go_even_after_an_error(tiny_sam: nn.Module) -> None:
    def fails(x: torch.Tensor) -> None:
        raise KeyError

    with pytest.raises(KeyError), tapped(tiny_sam, {"image_encoder": fails}):
        tiny_sam.image_encoder(torch.zeros(1, 3, 64, 64))
    assert not any(m._forward_pre_hooks for m in tiny_sam.modules())


def test_boxes_and_points_take_turns(tiny_sam: nn.Module) -> None:
    sample = sc.shapes(1, size=64)[0]
    count = len(sample.instances)
    first, second = (asked(tiny_sam, sample, index, "mixed") for index in (0, 1))
    assert len(first.boxes) + len(first.points) == count
    assert (len(first.boxes), len(first.points)) == (len(second.points), len(second.boxes))
    assert asked(tiny_sam, sample, 0, "box").boxes.shape == (count, 4)
    points = asked(tiny_sam, sample, 0, "point").points
    assert points.shape == (count, 1, 2)
    for (x, y), instance in zip(points[:, 0].tolist(), sample.instances, strict=True):
        assert instance.mask[round(y), round(x)]


def test_ranges_are_kept_in_the_work_folder(tiny_sam: nn.Module, tmp_path) -> None:
    name = "image_encoder.blocks.0.mlp.lin1"

    def ranges(seen: object) -> dict:
        return observe(tiny_sam, {name: seen}, context(workdir=tmp_path), images=1)  # type: ignore[dict-item]

    first = ranges(MinMax(name))
    assert len(list(tmp_path.iterdir())) == 1
    untouched = MinMax(name)
    second = ranges(untouched)
    assert untouched.seen == 0
    assert all(map(torch.equal, first[name], second[name]))
    ranges(AverageMinMax(name))
    assert len(list(tmp_path.iterdir())) == 2  # another observer is another statistic
