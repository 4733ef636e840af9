"""The public face: names, imports, arrows between packages, docstrings."""

from __future__ import annotations

import ast
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import samcompress as sc
from samcompress.core._require import EXTRAS
from samcompress.core.registry import find

PACKAGE = Path(sc.__file__).parent
FAMILIES = ("prune", "distill", "attention", "quantize", "substitute", "compile")
SECTIONS = ("Args:", "Raises:", "Effect:", "Composes with:", "Source:", "Example:")
LEAN = """
import sys, time, warnings
import torch, segment_anything
before = set(sys.modules)
warnings.simplefilter("error")
start = time.perf_counter()
import samcompress
seconds = time.perf_counter() - start
import json
new = {name.split(".")[0] for name in set(sys.modules) - before}
print(json.dumps({"seconds": seconds, "new": sorted(new), "cuda": torch.cuda.is_initialized()}))
"""


def test_public_names(golden: Callable[[str, str], None]) -> None:
    modules = {"samcompress": sc, "samcompress.evaluate": sc.evaluate, "samcompress.data": sc.data}
    modules |= {f"samcompress.{f}": getattr(sc, f) for f in FAMILIES}
    names = {name: sorted(module.__all__) for name, module in modules.items()}
    golden("public_names.json", json.dumps(names, indent=1) + "\n")
    for name, module in modules.items():
        for public in module.__all__:
            value = getattr(module, public)
            if not isinstance(value, (str, dict, int)):
                assert inspect.getdoc(value), f"{name}.{public} has no docstring"


def test_import_is_lean() -> None:
    done = subprocess.run([sys.executable, "-c", LEAN], check=True, capture_output=True, text=True)
    found = json.loads(done.stdout)
    optional = {"onnx", "onnxruntime", "transformers", "matplotlib", "rich", "typer", "tqdm",
                "scipy", "jsonschema", "pycocotools", "huggingface_hub", "yaml"}  # fmt: skip
    assert not optional & set(found["new"])
    assert not found["cuda"]
    assert done.stderr == ""


def files() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        yield name.removesuffix(".__init__"), ast.parse(path.read_text())


def imported(name: str, tree: ast.Module) -> Iterator[str]:
    is_package = (PACKAGE.parent / name.replace(".", "/") / "__init__.py").exists()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = name.split(".")
            if node.level:
                base = base[: len(base) - node.level + is_package]
                module = ".".join(base + ([node.module] if node.module else []))
            else:
                module = node.module or ""
            yield from (f"{module}.{alias.name}" for alias in node.names)


def area(name: str) -> str:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[0] == "samcompress" else ""


def test_import_arrows() -> None:
    allowed = {"core": {"core"}, "evaluate": {"core", "evaluate"}}
    allowed |= {family: {"core", family} for family in FAMILIES}
    for name, tree in files():
        mine = area(name)
        if mine not in allowed:
            continue
        for target in imported(name, tree):
            if target.startswith("samcompress.") and area(target) != "__version__":
                assert area(target) in allowed[mine], f"{name} imports {target}"
                private = [p for p in target.split(".")[1:] if re.match(r"_[a-z]", p)]
                assert not private or area(target) in (mine, "core"), f"{name} imports {target}"


def test_core_names_no_family() -> None:
    words = re.compile(rf"\b({'|'.join(FAMILIES)})\.[a-z0-9_]+\b", re.I)
    allowed = re.compile(r"sc\.|torch\.compile|re\.compile")
    for name, tree in files():
        if area(name) != "core":
            continue
        docs = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
            and node.body
            and isinstance(node.body[0], ast.Expr)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                if id(node) in docs or allowed.search(node.value):
                    continue
                assert not words.search(node.value), f"{name}: {node.value!r}"


def test_backends_know_no_sam() -> None:
    for name, tree in files():
        if name.startswith("samcompress.compile.backends"):
            for target in imported(name, tree):
                if target.startswith("samcompress."):
                    assert re.match(r"samcompress\.(compile\.backends|core\.(errors|_require|files))",
                                    target), f"{name} imports {target}"  # fmt: skip
            assert "mask_decoder" not in ast.unparse(tree)


@pytest.mark.parametrize("name", sc.list_transforms())
def test_technique_is_documented(name: str) -> None:
    cls = find(name)
    family, short = name.split(".")
    assert (PACKAGE / family / f"{short}.py").is_file()
    assert cls.__name__ in getattr(sc, family).__all__
    doc = inspect.getdoc(cls) or ""
    places = [doc.find(section) for section in SECTIONS]
    assert -1 not in places, f"{name} lacks {SECTIONS[places.index(-1)]}"
    assert places == sorted(places)
    assert re.search(r"arXiv|https://", doc)
    assert (
        name in (getattr(sc, family).__doc__ or "") or cls.__name__ in getattr(sc, family).__doc__
    )
    card = PACKAGE.parent / "docs" / "methods" / family / f"{short}.md"
    assert card.is_file(), f"{name} has no card"


def test_extras_agree_with_pyproject() -> None:
    text = (PACKAGE.parent / "pyproject.toml").read_text()
    tomllib = pytest.importorskip("tomllib")  # in the standard library from 3.11 on
    extras = tomllib.loads(text)["project"]["optional-dependencies"]
    for extra, modules in EXTRAS.items():
        listed = {re.split(r"[<>=\[]", line)[0].replace("-", "_") for line in extras[extra]}
        assert set(modules) <= listed
