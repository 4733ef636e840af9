from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pytest
from torch import nn

import samcompress as sc
from samcompress.core import errors, registry
from samcompress.core.transform import Context, State, Transform
from samcompress.core.where import Where


@dataclass(frozen=True, kw_only=True)
class Example(Transform, family="example", phase=20):
    """A technique that is not registered."""

    ratio: float = 0.5
    kind: Literal["a", "b"] = "a"
    sizes: tuple[int, ...] = (1, 2)
    limit: int | None = None
    where: Where = Where("image_encoder.blocks.*.mlp")

    def validate(self) -> None:
        self.between("ratio", 0, 1)

    def apply(self, model: nn.Module, ctx: Context) -> State:
        return {}

    def rebuild(self, model: nn.Module, state: State) -> State:
        return state


def test_fields_come_back_from_json_as_they_were() -> None:
    made = Example(ratio=1 / 3, sizes=[3], where="image_encoder.**", limit=4)
    assert made.sizes == (3,)
    assert made.where == sc.Where("image_encoder.**")
    assert Example.from_params(made.params()) == made
    assert hash(Example.from_params(made.params())) == hash(made)


def test_repr_shows_what_differs_from_the_defaults() -> None:
    assert repr(Example()) == "sc.example.Example()"
    assert repr(Example(kind="b", ratio=0.25)) == "sc.example.Example(ratio=0.25, kind='b')"


@pytest.mark.parametrize(
    ("params", "text"),
    [
        ({"ratio": 1.0}, "Example: ratio is out of range.\n  got       1.0\n  expected  0 < ratio < 1"),
        ({"ratio": "x"}, "Example: ratio has a value it cannot take.\n  got       'x'\n  expected  a number"),
        ({"ratio": True}, "expected  a number"),
        ({"kind": "c"}, "got       'c'\n  expected  'a' | 'b'"),
        ({"limit": 1.5}, "expected  a whole number"),
        ({"rato": 1}, "has no field 'rato'.\n  got       rato\n  expected  ratio, kind, sizes, limit, where\n  try       ratio"),
        ({"where": 3}, "Where.include takes patterns"),
    ],
)  # fmt: skip
def test_bad_fields(params: dict, text: str) -> None:
    with pytest.raises(errors.ConfigError) as caught:
        Example.from_params(params)
    assert text in str(caught.value)


def test_register_refuses_a_second_class_of_the_same_name() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Mlp(Example, family="prune", phase=20):
        """Has the name of a shipped technique."""

    with pytest.raises(errors.ConfigError, match=r"prune\.mlp is registered twice"):
        registry.register(Mlp)


def test_get_suggests_and_does_not_substitute() -> None:
    with pytest.raises(errors.UnknownTransformError) as caught:
        sc.get("prune.mpl")
    assert "try       prune.mlp" in str(caught.value)


def test_list_takes_wildcards() -> None:
    assert sc.list_transforms("quant*weights") == ["quantize.int4_weights", "quantize.int8_weights"]
    assert sc.list_transforms("none*") == []


def test_names() -> None:
    assert registry.snake("Int8Weights") == "int8_weights"
    assert registry.snake("ImageSize") == "image_size"
    assert registry.snake("PTQ4SAM") == "ptq4_sam"
    assert sorted(["m10", "m2"], key=registry.natural) == ["m2", "m10"]


def test_plugins_are_loaded_and_failures_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Point:
        def __init__(self, name: str, error: Exception | None) -> None:
            self.name, self.value, self.error = name, "their:plugin", error

        def load(self) -> None:
            if self.error:
                raise self.error

    points = [Point("good", None), Point("bad", ValueError("broken"))]
    monkeypatch.setattr(registry, "entry_points", lambda group: points)
    monkeypatch.setattr(registry, "_failed", None)
    assert registry.plugin_failures() == {"bad": "ValueError: broken"}
    assert sc.list_transforms()


def test_where() -> None:
    model = nn.ModuleDict({"a": nn.ModuleList([nn.ReLU(), nn.Linear(1, 1)]), "b": nn.Linear(1, 1)})

    def names(where: sc.Where, **kwargs: object) -> list[str]:
        return [name for name, _ in where.select(model, **kwargs)]

    assert names(sc.Where("*")) == ["a", "b"]
    assert names(sc.Where("a.*")) == ["a.0", "a.1"]
    assert names(sc.Where("**"), kind=nn.Linear) == ["a.1", "b"]
    assert names(sc.Where("**", exclude="a.1"), kind=nn.Linear) == ["b"]
    with pytest.raises(errors.NoEffectError) as caught:
        sc.Where("c.*").select(model, step="prune.mlp")
    assert "prune.mlp matched no module.\n  where     'c.*'\n  got       nearest: " in str(
        caught.value
    )
    with pytest.raises(errors.NoEffectError, match="matched no module it can act on"):
        sc.Where("a.0").select(model, nn.Linear)
    with pytest.raises(errors.NoEffectError):
        sc.Where("**", exclude="nothing").select(model)
