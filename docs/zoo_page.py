"""Writes docs/zoo.md, the page of published models, from what the package knows of them.

    python docs/zoo_page.py              # the page, from the sizes counted before
    python docs/zoo_page.py --count      # counts parameters and MACs of all models first

Sizes are counted on models without storage and kept in docs/results/zoo_sizes.json; a test fails if
the page or the sizes are not those of the package.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

import samcompress as sc
from samcompress.core.display import Column, Table
from samcompress.core.sizes import parameter_count
from samcompress.core.zoo import Figure, Published, find

HERE = Path(__file__).parent
PAGE = HERE / "zoo.md"
SIZES = HERE / "results" / "zoo_sizes.json"

HEAD = """# The zoo

<!-- Written by docs/zoo_page.py; edit that. -->

Published models that `sc.load` opens by name, or from their official file, and that `sc.build`
makes with random weights. `sc.list_models()` is the table of them, `sc.model_info(name)` all that
is said here of one, and its files.

```python
import samcompress as sc

small = sc.build("mobile_sam")  # random weights; sc.load("mobile_sam") gets the official ones
facts = sc.model_info("mobile_sam")
```

Every technique works on every one of them or says why not: `tests/test_zoo_pairs.py` has the table.
Twelve of them are timed on one processor, beside published ratios, in `docs/results/zoo.md`.
"""
COUNTS = """## Sizes

Parameters, and multiply-accumulates of the image encoder for one image at the model's own input
size. "Original" is counted on the original implementation, "ours" on the model that `sc.build`
makes, by `sc.evaluate.macs`. Files of TinyViT carry 321 640 parameters of a classifier that nothing
runs; they are left out here. "A prompt" is one box through prompt encoder and mask decoder.
"""
FIGURES = """## Published figures

Numbers of the authors and of others who measured; none is ours. Rows of different settings do not
compare. Accuracies are shares of 1.
"""


def counted(entry: Published) -> dict[str, int | None]:
    """Parameters and MACs of a model without storage."""
    with torch.device("meta"):
        model = entry.build()
    found: dict[str, int | None] = {"parameters": parameter_count(model)}
    if not hasattr(model, "mask_decoder"):
        counter = FlopCounterMode(display=False)
        side = entry.input_size
        with torch.no_grad(), counter:
            model.eval()(torch.zeros(1, 3, side, side, device="meta"))
        return {**found, "encoder": counter.get_total_flops() // 2, "decoder_per_prompt": None}
    work = sc.evaluate.macs(model).to_dict()
    return {**found, **{name: work[name] for name in ("encoder", "decoder_per_prompt")}}


def entries() -> list[Published]:
    """All published models by name, whatever the order in which they registered themselves."""
    return [find(name) for name in sorted(row["name"] for row in sc.list_models().records())]


def sizes_table(sizes: dict[str, dict[str, Any]]) -> Table:
    """Parameters and MACs beside what is published."""
    columns = (
        Column("model", align="left"),
        Column("parameters, original"),
        Column("ours"),
        Column("encoder, original", "GMAC"),
        Column("ours", "GMAC"),
        Column("a prompt", "GMAC"),
        Column("input", "px"),
    )
    rows = []
    for entry in entries():
        found = sizes[entry.name]
        prompt = found["decoder_per_prompt"]
        rows.append(
            (
                f"`{entry.name}`",
                f"{entry.parameters:,}".replace(",", " "),
                f"{found['parameters']:,}".replace(",", " "),
                f"{entry.macs:.2f}",
                f"{found['encoder'] / 1e9:.2f}",
                None if prompt is None else f"{prompt / 1e9:.2f}",
                entry.input_size,
            )
        )
    return Table(columns, rows)


def sources_table() -> Table:
    """What the models are, and under which licence."""
    names = ("model", "called", "licence of the weights", "paper", "upstream", "note")
    rows = [
        (f"`{e.name}`", e.title, e.licence, e.paper, e.upstream, e.note or None) for e in entries()
    ]
    return Table(tuple(Column(name, align="left") for name in names), rows)


def figures_table() -> Table:
    """All published figures with their sources."""
    columns = (
        Column("model", align="left"),
        Column("metric", align="left"),
        Column("value"),
        Column("setting", align="left"),
        Column("source", align="left"),
    )
    return Table(columns, [_row(entry, f) for entry in entries() for f in entry.figures])


def _row(entry: Published, figure: Figure) -> tuple[str, str, str, str, str]:
    value = f"{figure.value:g}"
    return f"`{entry.name}`", figure.metric, value, figure.setting, figure.source


def page(sizes: dict[str, dict[str, Any]]) -> str:
    """The whole page."""
    parts = (
        HEAD,
        COUNTS,
        sizes_table(sizes).markdown(),
        "\n## Licences and sources\n",
        sources_table().markdown(),
        "\n" + FIGURES,
        figures_table().markdown(),
    )
    return "\n".join(parts) + "\n"


def main() -> None:
    """Read the command line, count if asked, write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", action="store_true", help="count parameters and MACs anew")
    if parser.parse_args().count:
        sizes = {}
        for entry in entries():
            sizes[entry.name] = counted(entry)
            print(entry.name, sizes[entry.name], flush=True)
        SIZES.write_text(json.dumps(sizes, indent=2) + "\n")
    PAGE.write_text(page(json.loads(SIZES.read_text())))


if __name__ == "__main__":
    main()
