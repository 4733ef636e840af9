"""ExecuTorch programs; and what all runtimes of native code share."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_sam
from halves import DECODER, ENCODER, decoder_half, encoder_half, furthest
from torch import Tensor, nn

import samcompress as sc
from samcompress.compile.backends import Options
from samcompress.compile.backends._native import check_plain, contiguous, muted
from samcompress.compile.backends.executorch import ExecuTorch
from samcompress.core.errors import BackendError

BACKEND = ExecuTorch()
needs = pytest.mark.skipif(BACKEND.unavailable() is not None, reason=str(BACKEND.unavailable()))
OPTIONS = Options(inputs=("x", "y"), outputs=("sum", "share"))


class Small(nn.Module):
    """Two inputs, two outputs, and a buffer that is a permuted view."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layer = nn.Linear(3, 4)
        self.layer.weight.data = torch.randn(4, 3, generator=generator)
        self.register_buffer("strided", torch.randn(4, 2, generator=generator).T)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        out = self.layer(x).relu() + y @ self.strided.T @ self.strided
        return out, out.softmax(-1)


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "executorch", None)
    reason = BACKEND.unavailable()
    assert reason is not None
    assert reason.startswith("executorch is needed for executorch and could not be imported.")
    assert "pip install 'samcompress[executorch]'" in reason


def test_native_code_is_muted(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="out"), muted():
        os.write(1, b"past Python\n")
        os.write(2, b"past Python\n")
        raise ValueError("out")
    os.write(2, b"heard\n")
    assert tuple(capfd.readouterr()) == ("", "heard\n")


def test_views_are_plain_while_inside() -> None:
    module = Small()
    before, storage = module.strided.stride(), module.strided.data_ptr()
    expected = module(torch.ones(2, 3), torch.ones(2, 4))
    with contiguous(module):
        assert module.strided.is_contiguous()
        torch.testing.assert_close(module(torch.ones(2, 3), torch.ones(2, 4)), expected)
    assert (module.strided.stride(), module.strided.data_ptr()) == (before, storage)


def test_views_that_are_no_buffers_are_refused() -> None:
    module = Small()
    kept = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    del module.strided
    module.strided = kept.T.contiguous().T
    with contiguous(module):
        program = torch.export.export(module, (torch.zeros(2, 3), torch.zeros(2, 4)))
    with pytest.raises(ValueError, match=r"strided is a view with strides \(1, 2\)"):
        check_plain(program)


@needs
def test_small_module(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    module, path = Small().eval(), tmp_path / "small.pte"
    example = torch.zeros(2, 3), torch.zeros(2, 4)
    files = BACKEND.export(module, example, path, dtype="float32", options=OPTIONS)
    assert files == [path] == list(tmp_path.iterdir())
    generator = torch.Generator().manual_seed(1)
    for threads in (1, 2):
        run = BACKEND.load(path, device="cpu", threads=threads)
        x, y = (torch.randn(2, n, generator=generator) for n in (3, 4))
        x = x.T.contiguous().T
        first = run(x, y)
        kept = [t.clone() for t in first]
        assert furthest(first, module, (x, y)) < 1e-5
        run(x + 1, y + 1)
        # Results are not the memory that the next call writes to.
        for ours, before in zip(first, kept, strict=True):
            assert torch.equal(ours, before)
    with pytest.raises(BackendError) as caught:
        run(torch.zeros(2, 7), torch.zeros(2, 4))
    assert str(caught.value) == (
        "executorch could not run a graph.\n"
        f"  where     {path}\n"
        "  got       ValueError: sizes are (2, 7), (2, 4)\n"
        "  expected  (2, 3), (2, 4)"
    )
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BackendError, match="executorch could not open a file"):
        BACKEND.load(path, device="cpu", threads=1)
    assert tuple(capfd.readouterr()) == ("", "")


@needs
@pytest.mark.slow
@pytest.mark.parametrize(("prompts", "points"), [(1, 2), (5, 7)])
def test_decoder_with_a_strided_position(prompts: int, points: int, tmp_path: Path) -> None:
    """The trap: as a view, segment_anything's position gave wrong masks without a word."""
    sam: Any = sc.load("tiny")
    module, inputs = decoder_half(sam, prompts, points)
    module.image_pe = sam.prompt_encoder.get_dense_pe()
    assert not module.image_pe.is_contiguous()
    path = tmp_path / "decoder.pte"
    BACKEND.export(module, inputs, path, dtype="float32", options=DECODER)
    run = BACKEND.load(path, device="cpu", threads=1)
    for mask in (False, True):
        _, other = decoder_half(sam, prompts, points, mask=mask, seed=1)
        assert furthest(run(*other), module, other) < 5e-6


@needs
@pytest.mark.slow
def test_encoder(tmp_path: Path) -> None:
    module, inputs = encoder_half(random_sam())
    path = tmp_path / "encoder.pte"
    BACKEND.export(module, inputs, path, dtype="float32", options=ENCODER)
    _, other = encoder_half(random_sam(), seed=1)
    (found,) = BACKEND.load(path, device="cpu", threads=1)(*other)
    assert float((found - module(*other)).abs().max()) < 1e-4
