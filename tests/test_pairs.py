"""Every ordered pair of families, and the chain of all of them, on the small random SAM."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from cases import CASES, Case
from conftest import random_sam
from test_contract import RUN, logits

import samcompress as sc

FIRST_OF_FAMILY = {case.name.split(".")[0]: case for case in reversed(CASES)}
ORDERED = sorted(FIRST_OF_FAMILY.values(), key=lambda case: sc.get(case.name, **case.params).phase)


def chain(*cases: Case) -> sc.Pipeline:
    return sc.Pipeline([sc.get(case.name, **case.params) for case in cases])


@pytest.mark.parametrize(
    "pair",
    list(itertools.combinations(ORDERED, 2)),
    ids=lambda pair: f"{pair[0].name}-{pair[1].name}",
)
def test_pair(pair: tuple[Case, Case], tmp_path: Path) -> None:
    first, second = pair
    small = chain(first, second)(random_sam(), **RUN)
    assert [s.transform.name for s in sc.lineage(small)] == [first.name, second.name]
    sc.save(small, tmp_path / "small")
    again = sc.load(tmp_path / "small")
    atol = max(first.tolerance, second.tolerance)
    torch.testing.assert_close(logits(again), logits(small), rtol=0, atol=atol)
    with pytest.raises(sc.errors.OrderError):
        chain(second, first)


def test_all_families(tmp_path: Path) -> None:
    sam = random_sam()
    small = chain(*ORDERED)(sam, **RUN)
    assert len(sc.lineage(small)) == len(ORDERED) == 6
    sc.save(small, tmp_path / "small")
    again = sc.load(tmp_path / "small")
    torch.testing.assert_close(logits(again), logits(small), rtol=0, atol=1e-5)
    steps = [s.transform for s in sc.lineage(again)]
    assert sc.Pipeline(steps) == chain(*ORDERED)
    facts = [s.facts for s in sc.lineage(again)]
    assert all(earlier["after"] == later["before"] for earlier, later in itertools.pairwise(facts))
