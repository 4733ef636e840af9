"""Fixtures and options shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

# Compiling takes minutes; tests of the compiler switch it on. Read when torch is imported.
os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")

import torch

import samcompress as sc

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="device the device-agnostic tests run on")
    parser.addoption("--slow", action="store_true", help="also run tests marked slow")
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="slow; run with --slow"))


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    # More threads than free cores make small models many times slower.
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of real images and reference outputs, which is not part of the repository."""
    default = Path(__file__).resolve().parents[2] / "shared"
    folder = Path(os.environ.get("SAMCOMPRESS_SHARED", default))
    if not folder.is_dir():
        pytest.skip("no folder of shared data (set SAMCOMPRESS_SHARED)")
    return folder


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("--device")


@pytest.fixture
def tiny_sam() -> torch.nn.Module:
    """A SAM of 2 blocks, width 32, S = 64, with random weights in every table."""
    return random_sam()


@pytest.fixture(scope="session")
def trained() -> torch.nn.Module:
    """The shipped `tiny`; tests must not change it."""
    return sc.load("tiny")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compare a text with tests/golden/NAME, or write it there under --update-golden."""

    def compare(name: str, text: str) -> None:
        path = GOLDEN / name
        if request.config.getoption("--update-golden"):
            path.write_text(text)
        assert path.is_file(), f"no golden file {name}; run pytest --update-golden"
        assert text == path.read_text()

    return compare


def random_sam(*, seed: int = 0, **sizes: object) -> torch.nn.Module:
    """A small SAM whose position tables are random too: zero tables hide errors."""
    small = {
        "image_size": 64,
        "patch_size": 8,
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 2,
        "window_size": 3,
        "global_attn_indexes": (1,),
        "out_chans": 32,
    }
    return randomise(sc.build("tiny", seed=seed, **{**small, **sizes}))


def randomise(sam: torch.nn.Module, seed: int = 1) -> torch.nn.Module:
    """Fill all-zero parameters (position tables, biases) with small random numbers."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in sam.parameters():
        if not parameter.detach().any():
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return sam
