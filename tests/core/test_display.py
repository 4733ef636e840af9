"""The table in its three faces, and the notebook cards."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest

import samcompress as sc
from samcompress.core.display import Cell, Column, Table, number, pipeline_card, transform_card
from samcompress.core.transform import Transform


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.77196, "0.772"),
        (1.0, "1.00"),
        (9.999, "10.0"),
        (999.6, "1000"),
        (1234.5, "1230"),
        (0.0, "0.00"),
        (-0.01234, "-0.0123"),
        (0.00012345, "0.000123"),
        (1.5e-7, "1.50e-07"),
        (3.2e9, "3.20e+09"),
        (93_735_472, "93735472"),
        (float("nan"), "nan"),
        (None, "-"),
        (True, "yes"),
        ("cpu", "cpu"),
    ],
)
def test_number_has_three_significant_digits(value: object, text: str) -> None:
    assert number(value) == text


def test_sign_is_written_on_demand() -> None:
    assert [number(x, sign=True) for x in (2.5, -2.5, 0.0, 3)] == ["+2.50", "-2.50", "0.00", "+3"]


def test_error_has_the_decimals_of_its_value() -> None:
    assert Cell(0.772, 0.0123).text == "0.772 ±0.012"
    assert Cell(12.34, 1.234).text == "12.3 ±1.2"
    assert Cell(-8.13e-05, 0.000291, sign=True).text == "-0.000081 ±0.000291"
    assert Cell(0.5, 0.00004).text == "0.500 ±0.000"
    assert Cell(0.14123, 0.0996).text == "0.141 ±0.100"
    assert Cell(1234.0, 250.0).text == "1234 ±250"
    assert Cell(0.5, 0.0).text == "0.500"


def test_red_is_told_without_colour_too() -> None:
    assert Cell(0.5, mark="red").text == "! 0.500"


def example(n: int = 2) -> Table:
    columns = (
        Column("name", align="left"),
        *(Column(f"measure number {i}", "ms", group=f"group {i // 4}") for i in range(n)),
    )
    rows = [
        [Cell("base", mark="bold"), *(1.0 + i for i in range(n))],
        [Cell("small"), Cell(0.5, 0.01, mark="red"), *(Cell(None) for _ in range(n - 1))],
        ["mobile", "not measured: pip install 'samcompress[onnx]'"],
    ]
    return Table(columns, rows, title="A title", notes=("a note",))


@pytest.mark.parametrize("n", [2, 12])
def test_table_as_golden_text(golden, n: int) -> None:
    golden(f"table_{n}.txt", example(n).text() + "\n")
    assert repr(example(n)) == str(example(n)) == example(n).text()


def test_table_as_golden_markdown_and_html(golden) -> None:
    golden("table_2.md", example().markdown() + "\n")
    golden("table_2.html", example().html() + "\n")
    assert example()._repr_html_() == example().html()


@pytest.mark.parametrize("n", [2, 7, 12, 40])
def test_text_is_never_wider_than_100_columns(n: int) -> None:
    text = example(n).text()
    assert max(map(len, text.splitlines())) <= 100
    assert all(text.count(f"{1.0 + i:.2f}"[:4]) >= 1 for i in range(n))


def test_long_text_is_wrapped_and_kept_whole() -> None:
    story = " ".join(f"word{i}" for i in range(60))
    table = Table(
        (Column("a", align="left"), Column("b", align="left")), [("x", story)], notes=(story,)
    )
    text = table.text()
    assert max(map(len, text.splitlines())) <= 100
    assert all(text.count(f"word{i} ") + text.count(f"word{i}\n") >= 1 for i in range(59))


def test_word_longer_than_the_line_is_cut_not_lost() -> None:
    path = "/".join("folder" for _ in range(40))
    text = Table((Column("path", align="left"),), [(path,)]).text()
    assert max(map(len, text.splitlines())) <= 100
    assert "".join(text.split("\n")[2:]) == path


def test_groups_stay_together_where_they_fit() -> None:
    first, second = example(12).text().split("\n\n")
    assert first.startswith("A title\nname ")
    assert second.startswith("name ")
    values = [
        len(re.findall(r"\d\.\d", b.split("base")[1].split("\n")[0])) for b in (first, second)
    ]
    assert values == [8, 4]


def test_empty_table_has_its_headers() -> None:
    table = Table((Column("a", align="left"), Column("b", "MB")), [])
    assert table.text().splitlines()[0] == "a     b"
    assert "<tbody></tbody>" in table.html()
    assert table.records() == []


def test_records_hold_values_not_text() -> None:
    records = example().records()
    assert records[0] == {"name": "base", "measure number 0": 1.0, "measure number 1": 2.0}
    assert records[1]["measure number 0 ±"] == 0.01
    assert records[1]["measure number 1"] is None
    assert list(records[2]) == ["name", "measure number 0"]


def test_html_escapes_every_part() -> None:
    bad = '<script>alert("x")</script>&'
    table = Table((Column(bad, bad, group=bad), Column("b")), [(bad, bad)], title=bad, notes=(bad,))
    html = table.html()
    assert "<script" not in html
    assert html.count("&lt;script&gt;") == 7
    assert "src=" not in html
    assert "color-scheme:light dark" in html


def test_markdown_escapes_pipes_and_tags() -> None:
    table = Table((Column("a|b", align="left"),), [("x|y\n<b>*",)])
    assert table.markdown() == "| a\\|b |\n| --- |\n| x\\|y &lt;b>\\* |"


@dataclass(frozen=True, kw_only=True)
class Example(Transform, family="examples", phase=20):
    """Do something <small>.

    Args:
        name_: a name.

    Source:
        Somebody 2023, arXiv 2304.02643; licence
        Apache-2.0.

    Example:
        >>> 1
        1
    """

    name_: str = "<b>"

    def apply(self, model, ctx):  # type: ignore[no-untyped-def]
        return {}

    def rebuild(self, model, state):  # type: ignore[no-untyped-def]
        return state


def test_transform_card(golden) -> None:
    card = transform_card(Example())
    golden("transform_card.html", card + "\n")
    assert "Do something &lt;small&gt;</div>" in card
    assert "&lt;b&gt;" in card
    assert '<a href="https://arxiv.org/abs/2304.02643"' in card
    assert "Apache-2.0." in card
    assert "&gt;&gt;&gt;" not in card
    assert Example()._repr_html_() == card


def test_pipeline_card(golden) -> None:
    pipe = sc.prune.Mlp(ratio=0.5) | sc.quantize.Int8Weights()
    card = pipeline_card(pipe)
    golden("pipeline_card.html", card + "\n")
    assert pipe._repr_html_() == card
    assert re.search(r">1</td>.*prune\.mlp.*>20</td>.*ratio=0\.5.*>data</td>", card)
    assert re.search(r">2</td>.*quantize\.int8_weights.*>50</td>", card)
