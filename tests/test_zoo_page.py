"""The docs' page of published models says what the package knows of them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

import samcompress as sc
from samcompress.core.zoo import find

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("zoo_page", DOCS / "zoo_page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def sizes(script: Any) -> dict[str, dict[str, Any]]:
    return json.loads(script.SIZES.read_text())


def test_page_is_up_to_date(script: Any, sizes: dict[str, dict[str, Any]]) -> None:
    names = {row["name"] for row in sc.list_models().records()}
    assert set(sizes) == names, "run python docs/zoo_page.py --count"
    assert script.PAGE.read_text() == script.page(sizes), "run python docs/zoo_page.py"


def test_counted_sizes_are_the_original_ones(sizes: dict[str, dict[str, Any]]) -> None:
    """To half a per cent in MACs, and in parameters but for what no model runs."""
    for name, found in sizes.items():
        entry = find(name)
        assert entry.parameters - found["parameters"] in (0, 321_640), name
        assert found["encoder"] / 1e9 == pytest.approx(entry.macs, rel=0.005), name


@pytest.mark.parametrize("name", ["mobile_sam", "nano_sam"])
def test_sizes_counted_again(name: str, script: Any, sizes: dict[str, dict[str, Any]]) -> None:
    pytest.importorskip("timm")
    assert script.counted(find(name)) == sizes[name]
