from __future__ import annotations

import pickle

import pytest
import torch

from samcompress.core import errors
from samcompress.core._require import require
from samcompress.core._shapes import expect


def test_four_parts() -> None:
    error = errors.ConfigError(
        "ratio is out of range.",
        where="prune.mlp",
        got=1,
        expected="0 < ratio < 1",
        fix="ratio=0.5",
    )
    assert str(error) == (
        "ratio is out of range.\n"
        "  where     prune.mlp\n"
        "  got       1\n"
        "  expected  0 < ratio < 1\n"
        "  try       ratio=0.5"
    )
    assert error.got == 1
    assert isinstance(error, ValueError)


def test_parts_that_are_absent_are_left_out() -> None:
    assert str(errors.UnknownTransformError("no such thing.")) == "no such thing."


def test_pickles() -> None:
    error = pickle.loads(pickle.dumps(errors.DataError("a.", got=3)))
    assert (type(error), str(error)) == (errors.DataError, "a.\n  got       3")


@pytest.mark.parametrize(
    ("name", "builtin"),
    [
        ("ConfigError", ValueError),
        ("UnknownTransformError", KeyError),
        ("ModelError", TypeError),
        ("OrderError", ValueError),
        ("NoEffectError", ValueError),
        ("DataError", ValueError),
        ("ShapeError", ValueError),
        ("MissingDependencyError", ImportError),
        ("CheckpointError", ValueError),
        ("BackendError", RuntimeError),
    ],
)
def test_each_is_a_builtin_too(name: str, builtin: type) -> None:
    cls = getattr(errors, name)
    assert issubclass(cls, builtin)
    assert issubclass(cls, errors.SamCompressError)


def test_require_names_the_line_to_type() -> None:
    with pytest.raises(errors.MissingDependencyError) as caught:
        require("no_such_package.part", extra="onnx", purpose="compile.export")
    assert str(caught.value) == (
        "no_such_package is needed for compile.export and could not be imported.\n"
        "  got       No module named 'no_such_package'\n"
        "  try       pip install 'samcompress[onnx]'"
    )


def test_expect() -> None:
    assert expect(torch.zeros(2, 3, 8, 8), "B 3 S S") == {"B": 2, "S": 8}
    with pytest.raises(errors.ShapeError) as caught:
        expect(torch.zeros(2, 3, 8, 9), "B 3 S S", name="image", S=8)
    assert str(caught.value) == (
        "image has the wrong shape.\n  got       (2, 3, 8, 9)\n  expected  (B 3 S S) with S=8"
    )
    with pytest.raises(errors.ShapeError):
        expect(torch.zeros(2), "B 3")
