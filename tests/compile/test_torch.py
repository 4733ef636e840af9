"""Doors in front of torch's compiler; the compiler itself runs in the slow test alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_sam
from torch import nn
from torch._dynamo.exc import Unsupported

import samcompress as sc
from samcompress.compile.torch import CompiledDecoder, CompiledEncoder, Torch, _next, repeated
from samcompress.core.errors import BackendError
from samcompress.core.macs import macs

PROMPTS = [sc.Prompt(points=[[20, 30]])] * 5 + [sc.Prompt(box=[5, 8, 60, 50])]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Sizes that reach the compiler, which gives the function back as it is."""
    found: list[Any] = []

    def pretend(forward: Any, **options: Any) -> Any:
        found.append(options)

        def run(*args: Any, **kwargs: Any) -> Any:
            given = (*args, *kwargs.values())
            found.append(tuple(tuple(t.shape) for t in given if isinstance(t, torch.Tensor)))
            assert not any(t.is_inference() for t in given if isinstance(t, torch.Tensor))
            assert not torch.is_grad_enabled()
            return forward(*args, **kwargs)

        return run

    monkeypatch.setattr(torch, "compile", pretend)
    # Whole encoders, as on a GPU; `test_blocks` has the other way.
    monkeypatch.setattr(CompiledEncoder, "by_blocks", False)
    return found


def logits(model: torch.nn.Module) -> torch.Tensor:
    image = sc.shapes(1, seed=9, size=(60, 80))[0].image
    return sc.predict(model, [image], [PROMPTS], multimask=True)[0].logits


def test_images_come_in_one_size(seen: list[Any]) -> None:
    sam = random_sam().eval()
    small = Torch(images=2)(sam, progress=False)
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(7))
    with torch.inference_mode():
        found, expected = small.image_encoder(images), sam.image_encoder(images)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    options, *sizes = seen
    assert sizes == [((2, 3, 64, 64),)] * 2
    assert options["fullgraph"] in (True, False)
    assert options["dynamic"] is False
    assert options["options"] == {"triton.cudagraphs": False, "max_autotune": False}


def test_prompts_come_in_few_sizes(seen: list[Any]) -> None:
    sam = random_sam().eval()
    small = Torch(prompts=8)(sam, progress=False)
    torch.testing.assert_close(logits(small), logits(sam), rtol=0, atol=1e-5)
    assert {size[2][0] for size in seen if isinstance(size, tuple) and len(size) == 4} == {1, 8}
    assert [_next(count, 64) for count in (1, 2, 4, 5, 17, 64)] == [1, 4, 4, 16, 64, 64]


def test_other_decoders(seen: list[Any]) -> None:
    """EfficientSAM's too, which no exporter takes, and bfloat16."""
    for chain in (
        sc.Pipeline([sc.substitute.Conventions(of="efficient_sam")]),
        sc.Pipeline([sc.quantize.BFloat16()]),
        sc.Pipeline([sc.quantize.Int8Dynamic(force=True)]),
    ):
        sam = chain(random_sam(), progress=False).eval()
        small = Torch()(sam, progress=False)
        found = logits(small)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, logits(sam), rtol=0, atol=0.05)


def test_copies_and_files(seen: list[Any], tmp_path: Path) -> None:
    sam = random_sam()
    small = Torch(images=2, prompts=4, tune=True)(sam, progress=False)
    assert type(sam.image_encoder) in type(small.image_encoder).__mro__
    assert small.state_dict().keys() == sam.state_dict().keys()
    expected = logits(small)
    assert small.image_encoder.graph is not None
    sc.save(small, tmp_path / "saved")
    again = sc.load(tmp_path / "saved")
    for twin in (copy.deepcopy(small), again):
        assert twin.image_encoder.graph is None
        assert isinstance(twin.image_encoder, CompiledEncoder)
        assert isinstance(twin.mask_decoder, CompiledDecoder)
        assert torch.equal(logits(twin), expected)
        assert twin.mask_decoder.at_a_time == 4
        assert twin.mask_decoder.tune
    assert macs(again) == macs(sam)


def test_first_calls_are_timed(seen: list[Any]) -> None:
    small = Torch(prompts=4)(random_sam(), progress=False)
    assert small.image_encoder.compile_s == 0
    image = torch.zeros(1, 3, 64, 64)
    small.image_encoder(image)
    first = small.image_encoder.compile_s
    assert first > 0
    small.image_encoder(image)
    assert small.image_encoder.compile_s == first
    logits(small)
    assert small.mask_decoder.compile_s > 0
    assert len(small.mask_decoder.seen) == 2  # 4 prompts and 1; a click is as long as a box
    assert copy.deepcopy(small).mask_decoder.seen == set()


def test_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU blocks are compiled, one after the other, and nothing around them."""
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **_: compiled.append(self))
    sam = random_sam().eval()
    small = Torch(decoder=False)(sc.attention.Fused()(sam), progress=False)
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(small.image_encoder(image), sam.image_encoder(image).detach())
    assert [type(m).__name__ for m in compiled] == ["FusedBlock"] * 2


def test_what_is_repeated() -> None:
    def block(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(width, width), nn.GELU())

    part = nn.ModuleDict({"stem": nn.Linear(3, 4), "blocks": nn.ModuleList(map(block, (4, 4, 4)))})
    assert repeated(part) == list(part["blocks"])
    part["other"] = nn.Linear(99, 99)
    assert repeated(part) == []  # most of it is something else
    # Of modules in one another, the largest.
    nested = nn.ModuleList(nn.Sequential(block(4), block(4)) for _ in range(2))
    assert repeated(nested) == list(nested)


def test_encoder_alone(seen: list[Any]) -> None:
    small = Torch(decoder=False)(random_sam(), progress=False)
    assert isinstance(small.image_encoder, CompiledEncoder)
    assert not isinstance(small.mask_decoder, CompiledDecoder)


def test_wrong_size(seen: list[Any]) -> None:
    small = Torch()(random_sam(), progress=False)
    with pytest.raises(sc.errors.ShapeError, match=r"image has the wrong shape"):
        small.image_encoder(torch.zeros(1, 3, 32, 32))


def test_what_the_compiler_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise Unsupported("an operator\nthat it does not know")

    monkeypatch.setattr(torch, "compile", lambda forward, **_: refuse)
    small = Torch()(random_sam(), progress=False)
    with pytest.raises(BackendError) as caught:
        small.image_encoder(torch.zeros(1, 3, 64, 64))
    assert str(caught.value) == (
        "torch could not compile a ImageEncoderViT.\n"
        "  where     the first call of this size\n"
        "  got       Unsupported: an operator that it does not know\n"
        "  try       run the model without sc.compile.Torch, or with decoder=False"
    )


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def none() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.raises(BackendError, match=r"compile\.torch needs a compiler of C\+\+") as caught:
        Torch()(random_sam())
    assert "apt-get install g++" in str(caught.value)


def test_other_devices() -> None:
    with pytest.raises(sc.errors.ModelError) as caught:
        Torch().check(random_sam().to("meta"))
    assert str(caught.value) == (
        "compile.torch does not compile for this device.\n"
        "  got       meta\n"
        "  expected  cpu or cuda\n"
        "  try       leave this step out"
    )


def test_settings() -> None:
    for name in ("images", "prompts"):
        with pytest.raises(sc.errors.ConfigError, match=rf"compile\.torch: {name} is out of range"):
            Torch(**{name: 0})


def test_last_and_alone() -> None:
    with pytest.raises(sc.errors.OrderError, match=r"compile\.torch cannot follow compile\.torch"):
        Torch() | Torch()


@pytest.mark.slow
@pytest.mark.parametrize("freeze", [False, True])
def test_compiled(freeze: bool) -> None:
    """The real compiler: minutes."""
    from torch._dynamo import config, utils

    torch._dynamo.reset()
    utils.counters.clear()
    sam = random_sam(global_attn_indexes=()).eval()
    small = Torch(prompts=4, freeze=freeze, decoder=not freeze)(sam, progress=False)
    with config.patch(disable=False):
        found = logits(small)
    torch.testing.assert_close(found, logits(sam), rtol=0, atol=1e-4)
    assert small.image_encoder.compile_s > 0
    graphs = utils.counters["stats"]["unique_graphs"]
    # Both blocks share one graph; frozen, each has its own. The decoder takes 4 prompts, and 1.
    assert graphs == (2 if freeze else 1 + 2)
