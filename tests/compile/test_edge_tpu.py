"""The rules of the Edge TPU against graphs written by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from tflite_file import Operators, Tensors, ints, write_tflite

from samcompress.compile.edge_tpu import LIMITS, _rules, edge_tpu_check
from samcompress.core.errors import CheckpointError

IMAGE = ("INT8", (1, 8, 8, 16), None)
ROW = ("INT8", (1, 16), None)


def weights(*sizes: int, kind: str = "INT8") -> tuple[str, tuple[int, ...], bytes]:
    count = 1
    for size in sizes:
        count *= size
    return kind, sizes, b"\1" * count * (4 if kind == "INT32" else 1)


# A classifier of convolutions with ReLU6.
CNN: dict[str, Any] = {
    "image": ("INT8", (1, 16, 16, 3), None),
    "w": weights(16, 3, 3, 3),
    "b": weights(16, kind="INT32"),
    "a": IMAGE,
    "dw": weights(1, 3, 3, 16),
    "c": IMAGE,
    "d": IMAGE,
    "e": IMAGE,
    "p": ("INT8", (1, 1, 1, 16), None),
    "shape": ("INT32", (2,), ints(1, 16)),
    "flat": ROW,
    "fw": weights(10, 16),
    "logits": ("INT8", (1, 10), None),
    "out": ("INT8", (1, 10), None),
}
LAYERS: Operators = [
    ("CONV_2D", ["image", "w", "b"], ["a"], {4: ("i", 2), 5: ("i", 2)}),
    ("DEPTHWISE_CONV_2D", ["a", "dw", "b"], ["c"], {}),
    ("RELU6", ["c"], ["d"], {}),
    ("ADD", ["a", "d"], ["e"], {}),
    ("AVERAGE_POOL_2D", ["e"], ["p"], {}),
    ("RESHAPE", ["p", "shape"], ["flat"], {}),
    ("FULLY_CONNECTED", ["flat", "fw", None], ["logits"], {}),
    ("SOFTMAX", ["logits"], ["out"], {}),
]


def one(
    tmp_path: Path, name: str, tensors: Mapping[str, Any], settings: Mapping[int, Any] | None = None
) -> tuple[str, ...]:
    """Reasons against one operator, whose inputs are all tensors but the last."""
    *inputs, output = tensors
    operators = [(name, inputs, [output], settings or {})]
    report = edge_tpu_check(write_tflite(tmp_path / "one.tflite", tensors, operators))
    return report.operators[0].reasons


def test_every_limit_is_used_and_known() -> None:
    rules = _rules()
    used = {limit for rule in rules["operators"].values() for limit in rule.get("limits", ())}
    assert used == set(LIMITS)
    assert set(rules["operators"]) <= set(rules["schema_operators"])
    refused = "BATCH_MATMUL GELU DIV SQRT SIN COS EQUAL CAST SELECT_V2 HARD_SWISH GATHER EXP POW"
    assert not set(refused.split()) & set(rules["operators"])


def test_convolutions_run_there(tmp_path: Path) -> None:
    report = edge_tpu_check(write_tflite(tmp_path / "cnn.tflite", CNN, LAYERS))
    assert report.ready
    assert report.mapped == len(LAYERS)
    assert report.breaks is None
    # Each constant once, though two layers share a bias.
    assert report.weights == 16 * 27 + 64 + 144 + 8 + 160
    assert report.streamed == 0
    assert report.runtime is None
    assert str(report).startswith("cnn.tflite: 8 of 8 operators would run on the Edge TPU\n")
    assert "RESHAPE: the compiler may refuse it for large tensors" in report.notes
    assert "rules not compared with the maker's page again: SOFTMAX" in report.notes


def test_large_files_have_their_weights_behind_the_tables(tmp_path: Path) -> None:
    path = write_tflite(tmp_path / "cnn.tflite", CNN, LAYERS, behind=True)
    (tmp_path / "small").mkdir()
    inside = edge_tpu_check(write_tflite(tmp_path / "small" / "cnn.tflite", CNN, LAYERS))
    assert edge_tpu_check(path) == inside
    assert inside.ready
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="the file ends early"):
        edge_tpu_check(path)


def test_everything_after_the_first_break_is_for_the_cpu(
    tmp_path: Path, golden: Callable[[str, str], None]
) -> None:
    tensors = {**CNN, "g": ROW, "m": ("INT8", (1, 10), None)}
    layers = [
        *LAYERS[:6],
        ("GELU", ["flat"], ["g"], {}),
        ("BATCH_MATMUL", ["g", "fw"], ["m"], {}),
        ("RELU6", ["m"], ["logits"], {}),
        LAYERS[7],
    ]
    report = edge_tpu_check(write_tflite(tmp_path / "vit.tflite", tensors, layers))
    assert not report.ready
    assert report.mapped == 6
    assert report.breaks is report.operators[6]
    assert report.operators[6].name == "GELU"
    assert report.operators[6].reasons == ("not an operator of the Edge TPU",)
    assert report.operators[7].reasons == ("not an operator of the Edge TPU",)
    # By itself it could run there.
    assert report.operators[8].reasons == ()
    assert [row["on the Edge TPU"] for row in report.table().records()][2] == 1
    golden("edge_tpu.txt", str(report))
    golden("edge_tpu.md", report.markdown())
    golden("edge_tpu.html", report._repr_html_())


def test_floats_batches_and_free_sizes(tmp_path: Path) -> None:
    floats = ("FLOAT32", (1, 16), None)
    assert one(tmp_path, "RELU", {"x": floats, "y": floats}) == (
        "a tensor of FLOAT32, not int8 or uint8",
    )
    # A constant of int32 is a bias or a shape; one made at run time is not.
    assert one(tmp_path, "RELU", {"x": ("INT32", (1, 16), None), "y": ROW}) == (
        "a tensor of INT32, not int8 or uint8",
    )
    two = ("INT8", (2, 8, 8, 16), None)
    outside = ("sizes other than 1 outside the three innermost",)
    assert one(tmp_path, "RELU", {"x": two, "y": two}) == outside
    assert one(tmp_path, "RELU", {"x": IMAGE, "y": IMAGE}) == ()
    assert one(tmp_path, "RELU", {"x": ("UINT8", (25, 8, 8), None), "y": ROW}) == ()
    path = write_tflite(
        tmp_path / "a.tflite", {"x": ROW, "y": ROW}, [("RELU", "x", "y", {})], free="x"
    )
    assert edge_tpu_check(path).operators[0].reasons == ("a size that is not fixed",)


AXES = {"rows": ints(1), "channels": ints(-1), "batch": ints(0), "both": ints(0, 2)}
STRIDED: Tensors = {
    "x": IMAGE,
    "begin": ("INT32", (4,), ints(0, 0, 0, 0)),
    "end": ("INT32", (4,), ints(1, 8, 8, 16)),
    "step": ("INT32", (4,), ints(1, 1, 1, 1)),
    "y": IMAGE,
}
CONV: Tensors = {"x": IMAGE, "w": weights(16, 3, 3, 16), "b": weights(16, kind="INT32"), "y": IMAGE}


def axis(name: str) -> tuple[str, tuple[int, ...], bytes]:
    return "INT32", (len(AXES[name]) // 4,), AXES[name]


@pytest.mark.parametrize(
    ("name", "tensors", "settings", "reasons"),
    [
        ("MAX_POOL_2D", {"x": IMAGE, "y": IMAGE}, {5: ("b", 1)}, "an activation built in"),
        ("CONCATENATION", {"x": IMAGE, "z": IMAGE, "y": IMAGE}, {}, ""),
        (
            "CONCATENATION",
            {"x": IMAGE, "z": IMAGE, "y": IMAGE},
            {1: ("b", 3)},
            "an activation built in",
        ),
        ("CONCATENATION", {"x": ROW, "z": ("INT8", (1, 4), b"\0" * 4), "y": ROW}, {}, ""),
        (
            "CONCATENATION",
            {"x": ROW, "z": weights(1, 4), "y": ROW},
            {},
            "joined to a constant that is not zero",
        ),
        ("CONV_2D", CONV, {4: ("i", 2)}, "another dilation across than down"),
        ("CONV_2D", {**CONV, "w": IMAGE}, {}, "weights made at run time"),
        ("DEPTHWISE_CONV_2D", CONV, {6: ("i", 2)}, "another dilation across than down"),
        (
            "FULLY_CONNECTED",
            {"x": ROW, "w": weights(16, 16), "y": ROW},
            {1: ("b", 1)},
            "weights in another order",
        ),
        (
            "FULLY_CONNECTED",
            {"x": IMAGE, "w": weights(16, 16), "y": IMAGE},
            {},
            "more than one row",
        ),
        ("MEAN", {"x": IMAGE, "a": axis("rows"), "y": IMAGE}, {}, ""),
        ("MEAN", {"x": IMAGE, "a": axis("channels"), "y": IMAGE}, {}, ""),
        ("MEAN", {"x": IMAGE, "a": axis("batch"), "y": IMAGE}, {}, "reduces the batch axis"),
        (
            "MEAN",
            {"x": ("INT8", (1, 8, 8, 6), None), "a": axis("channels"), "y": IMAGE},
            {},
            "a mean over channels whose number is no multiple of 4",
        ),
        ("SUM", {"x": IMAGE, "a": axis("both"), "y": IMAGE}, {}, "reduces the batch axis"),
        ("REDUCE_MAX", {"x": ROW, "a": axis("batch"), "y": ROW}, {}, ""),
        ("PACK", {"x": ("INT8", (8, 8, 16), None), "y": IMAGE}, {}, "stacks along the batch axis"),
        ("PACK", {"x": ("INT8", (1, 8, 16), None), "y": IMAGE}, {1: ("i", 2)}, ""),
        ("UNPACK", {"x": IMAGE, "y": ROW}, {}, "stacks along the batch axis"),
        (
            "PAD",
            {"x": IMAGE, "p": ("INT32", (4, 2), ints(0, 0, 1, 1, 1, 1, 0, 0)), "y": IMAGE},
            {},
            "",
        ),
        (
            "PAD",
            {"x": IMAGE, "p": ("INT32", (4, 2), ints(0, 1, 0, 0, 0, 0, 0, 0)), "y": IMAGE},
            {},
            "padding of the batch axis",
        ),
        ("PRELU", {"x": IMAGE, "s": weights(1, 1, 16), "y": IMAGE}, {}, ""),
        (
            "PRELU",
            {"x": IMAGE, "s": weights(8, 8, 16), "y": IMAGE},
            {},
            "slopes of more than one axis",
        ),
        ("SOFTMAX", {"x": IMAGE, "y": IMAGE}, {}, "more than one row"),
        (
            "SOFTMAX",
            {"x": ("INT8", (1, 16_001), None), "y": ("INT8", (1, 16_001), None)},
            {},
            "more than 16000 numbers",
        ),
        ("SPLIT", {"a": axis("rows"), "x": IMAGE, "y": IMAGE}, {}, ""),
        ("SPLIT", {"a": axis("batch"), "x": IMAGE, "y": IMAGE}, {}, "splits the batch axis"),
        ("STRIDED_SLICE", STRIDED, {}, ""),
        (
            "STRIDED_SLICE",
            STRIDED,
            {3: ("i", 1)},
            "a stride other than 1, or axes left out or added",
        ),
        (
            "STRIDED_SLICE",
            {**STRIDED, "step": ("INT32", (4,), ints(1, 2, 2, 1))},
            {},
            "a stride other than 1, or axes left out or added",
        ),
        (
            "TRANSPOSE_CONV",
            {"s": axis("rows"), "w": weights(4, 2, 2, 16), "x": IMAGE, "y": IMAGE},
            {},
            "",
        ),
        ("BATCH_MATMUL", {"x": ROW, "z": ROW, "y": ROW}, {}, "not an operator of the Edge TPU"),
        ("edgetpu-custom-op", {"x": ROW, "y": ROW}, {}, "not an operator of the Edge TPU"),
    ],
)
def test_limits(
    name: str, tensors: Tensors, settings: dict[int, Any], reasons: str, tmp_path: Path
) -> None:
    assert one(tmp_path, name, tensors, settings) == tuple(filter(None, [reasons]))


def test_weights_beyond_the_memory_are_streamed(tmp_path: Path) -> None:
    tensors = {"x": ROW, "w": weights(625_000, 16), "y": ("INT8", (1, 625_000), None)}
    layers = [("FULLY_CONNECTED", ["x", "w"], ["y"], {}), ("TRANSPOSE", ["y"], ["y"], {})]
    report = edge_tpu_check(write_tflite(tmp_path / "big.tflite", tensors, layers))
    assert (report.weights, report.memory, report.streamed) == (10**7, 8 * 10**6, 2 * 10**6)
    assert report.runtime == 14
    assert (
        "weights: 10 MB, of which 8 fit into the 8 MB on the chip, less what the program takes; "
        "2 MB are sent for every image" in report.table().notes
    )
    assert "needs runtime 14 of the Edge TPU or later" in report.table().notes


def test_conditions_and_empty_files(tmp_path: Path) -> None:
    path = write_tflite(
        tmp_path / "a.tflite", {"x": ROW, "y": ROW}, [("RELU", "x", "y", {})], branches=1
    )
    report = edge_tpu_check(path)
    assert report.mapped == 0
    assert "conditions or loops: the compiler refuses the file" in report.notes
    empty = edge_tpu_check(write_tflite(tmp_path / "b.tflite", {"x": ROW}, []))
    assert not empty.ready
    assert empty.breaks is None


def test_files_that_are_none(tmp_path: Path) -> None:
    path = write_tflite(tmp_path / "cnn.tflite", CNN, LAYERS)
    whole = path.read_bytes()
    for content in (b"", b"not a file", whole[:200], whole[:-3], b"\xff" * 64, b"\0\0\0\x7fTFL3"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError) as caught:
            edge_tpu_check(path)
        assert str(caught.value).startswith("a file cannot be read as .tflite.\n")
        assert str(path) in str(caught.value)
    with pytest.raises(CheckpointError, match="FileNotFoundError"):
        edge_tpu_check(tmp_path / "none.tflite")
