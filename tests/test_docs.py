"""Docs that run: docstring examples, Markdown snippets, notebooks; cards and links that exist."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import samcompress as sc

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
MODULES = [
    info.name
    for info in pkgutil.walk_packages(sc.__path__, "samcompress.")
    if not info.name.endswith("__main__")
]


def title(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    failed, _ = doctest.testmod(
        module,
        extraglobs={"sc": sc},
        optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE | doctest.IGNORE_EXCEPTION_DETAIL,
    )  # fmt: skip
    assert failed == 0


def blocks(page: Path) -> str:
    """The Python blocks of a page, one after another, as one program."""
    found = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)
    return "\n".join(block for block in found if not block.startswith("# not run"))


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=title)
def test_snippets(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks(page), title(page), "exec"), {"__name__": "snippet"})


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_links(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if not re.match(r"https?:|mailto:", target):
            assert (page.parent / target).exists(), f"{title(page)} links to {target}"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=title)
def test_notebook(notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    content = nbformat.read(notebook, as_version=4)
    nbclient.NotebookClient(
        content, timeout=600, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    kinds = {out.output_type for cell in content.cells for out in cell.get("outputs", [])}
    assert "error" not in kinds
    assert kinds & {"execute_result", "display_data"}


def test_every_technique_is_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    for name in sc.list_transforms():
        assert f"`{name}`" in text
