"""quantize.mixed: least sensitive layers first, within the budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_sam
from quantizing import DATA, same_after_loading

import samcompress as sc
from samcompress.core import errors
from samcompress.core.sizes import tensor_bytes
from samcompress.quantize._int8 import DynamicLinear
from samcompress.quantize.b_float16 import BFloat16
from samcompress.quantize.mixed import Mixed


def run(sam: Any = None, data: Any = DATA, **fields: Any) -> Any:
    step = Mixed(**{"images": 1, "force": True, **fields})
    return step(random_sam() if sam is None else sam, data=data, progress=False)


def integers(model: Any) -> list[str]:
    return [n for n, m in model.named_modules() if type(m) is DynamicLinear]


def seen(model: Any) -> torch.Tensor:
    from samcompress.core.predict import encode

    return encode(model, [DATA[0].image])[0].features


def test_error_stays_within_the_budget() -> None:
    sam = random_sam()
    counts = []
    for budget in (0.003, 0.005, 0.5):
        small = run(sam, error=budget)
        state = sc.lineage(small)[-1].state
        assert state["layers"] == integers(small)
        found = float((seen(small) - seen(sam)).norm() / seen(sam).norm())
        assert found == pytest.approx(state["error"], rel=1e-4)
        assert found <= budget
        counts.append(len(state["layers"]))
    assert 0 < counts[0] < counts[1] < counts[2] == 8


def test_size_is_reached_by_what_disturbs_least_for_its_bytes() -> None:
    sam = random_sam()
    small = run(sam, size=0.9)
    share = tensor_bytes(small) / tensor_bytes(sam)
    assert share <= 0.9
    state = sc.lineage(small)[-1].state
    saved = {n: 3 * sam.get_submodule(n).weight.numel() for n in state["alone"]}
    order = sorted(saved, key=lambda n: state["alone"][n] ** 2 / saved[n])
    count = len(state["layers"])
    assert 0 < count < 8
    assert set(state["layers"]) == set(order[:count])
    last = saved[order[count - 1]] / tensor_bytes(sam)
    assert share + last > 0.9


def test_a_layer_made_sensitive_is_left() -> None:
    sam = random_sam()
    sensitive = "image_encoder.blocks.1.mlp.lin2"
    sam.get_submodule(sensitive).weight.data[:, 0] *= 300
    assert sensitive not in sc.lineage(run(sam, size=0.9))[-1].state["layers"]


def test_saved_loaded_and_the_rest_in_bfloat16(tmp_path: Path) -> None:
    small = run(error=0.005)
    again = same_after_loading(small, tmp_path / "small")
    assert integers(again) == integers(small)
    both = BFloat16()(small, progress=False)
    kinds = {p.dtype for p in both.image_encoder.parameters()}
    assert kinds == {torch.bfloat16}


def message(kind: type[Exception], sam: Any = None, **fields: Any) -> str:
    with pytest.raises(kind) as caught:
        run(sam, **fields)
    return str(caught.value)


def test_budgets() -> None:
    assert message(errors.ConfigError).splitlines() == [
        "quantize.mixed takes one budget.",
        "  got       error=None, size=None",
        "  expected  error= or size=",
    ]
    assert "takes one budget" in message(errors.ConfigError, error=0.1, size=0.5)
    assert "size is out of range" in message(errors.ConfigError, size=1.5)
    assert "error is out of range" in message(errors.ConfigError, error=0.0)
    text = message(errors.ConfigError, size=0.1)
    assert text.startswith("quantize.mixed cannot reach the size.")
    assert "integers in all 8 layers" in text
    text = message(errors.NoEffectError, error=1e-6)
    assert text.startswith("quantize.mixed may change no layer.")


def test_bad_input() -> None:
    assert "needs images" in message(errors.DataError, data=None, error=0.1)
    text = message(errors.ModelError, error=0.1, where="mask_decoder.**")
    assert "by the embedding, which this one does not change" in text
    sam = random_sam()
    sam.image_encoder.blocks[0].norm1.weight.data.fill_(torch.nan)
    assert "values that are not finite" in message(errors.DataError, sam, error=0.1)
    text = message(errors.ModelError, run(error=0.5), error=0.5)
    assert text.startswith("quantize.mixed met layers that hold integers already.")
