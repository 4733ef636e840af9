from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import random_sam

import samcompress as sc
from samcompress.core import errors
from samcompress.core.checkpoint import fingerprint

MLP = sc.prune.Mlp(ratio=0.5, criterion="magnitude")
INT8 = sc.quantize.Int8Weights(min_size=0)


def test_join_and_show() -> None:
    pipe = MLP | INT8
    assert pipe == sc.Pipeline([MLP, INT8]) == sc.Pipeline([pipe])
    assert len(pipe | sc.get("compile.export")) == 3
    assert eval(repr(pipe), {"sc": sc}) == pipe


def test_order_is_checked_before_anything_runs() -> None:
    with pytest.raises(errors.OrderError) as caught:
        INT8 | MLP
    assert str(caught.value) == (
        "prune.mlp comes after quantize.int8_weights.\n"
        "  where     step 1 and step 2\n"
        "  got       phase 20 after phase 50\n"
        "  expected  prune.mlp before quantize.int8_weights\n"
        "  try       prune.mlp | quantize.int8_weights, or Pipeline([...], any_order=True)"
    )
    loose = sc.Pipeline([INT8, MLP], any_order=True)
    assert sc.Pipeline.from_json(loose.to_json()).any_order


def test_order_counts_what_was_done_before() -> None:
    small = INT8(random_sam())
    with pytest.raises(errors.OrderError, match="the model already went through"):
        MLP(small)


def test_not_a_technique() -> None:
    with pytest.raises(errors.ConfigError) as caught:
        sc.Pipeline([sc.quantize.Int8Weights])
    assert str(caught.value).endswith("try       Int8Weights()")
    with pytest.raises(errors.ConfigError, match="no step"):
        sc.Pipeline([])


def test_copy_or_consume() -> None:
    sam = random_sam()
    small = MLP(sam)
    assert small is not sam
    assert fingerprint(small) != fingerprint(sam)
    assert MLP(sam, consume=True) is sam
    assert fingerprint(small) == fingerprint(sam)


def test_consume_leaves_no_teacher() -> None:
    distil = sc.distill.Encoder(steps=1)
    with pytest.raises(errors.ConfigError, match="needs the original model"):
        distil(random_sam(), data=sc.shapes(2), consume=True)


def test_a_later_step_that_cannot_run_stops_the_first() -> None:
    events = []
    pipe = MLP | sc.distill.Encoder(steps=1)
    with pytest.raises(errors.DataError) as caught:
        pipe(random_sam(), progress=events.append)
    assert str(caught.value) == (
        "distill.encoder needs images.\n"
        "  got       no data\n"
        "  try       pass data=, e.g. pipe(sam, data=sc.shapes(32))"
    )
    assert events == []


def test_progress_events_or_silence(capfd: pytest.CaptureFixture[str]) -> None:
    events = []
    taylor = sc.prune.Mlp(ratio=0.5, criterion="disturbed_taylor", images=2)
    taylor(random_sam(), data=sc.shapes(2), progress=events.append)
    assert len(events) == 2
    assert {event.step for event in events} == {"prune.mlp"}
    assert events[-1].done == events[-1].total
    MLP(random_sam(), progress=True)
    assert capfd.readouterr() == ("", "")


def test_facts() -> None:
    small = (MLP | INT8)(random_sam())
    first, second = (step.facts for step in sc.lineage(small))
    assert first["after"] == second["before"]
    assert second["after"]["bytes"] < second["before"]["bytes"]
    assert second["after"]["parameters"] <= second["before"]["parameters"] * 1.1


def test_flags_are_restored() -> None:
    sam = random_sam()
    sam.image_encoder.requires_grad_(False)
    sam.image_encoder.train()
    small = MLP(sam)
    assert not any(p.requires_grad for p in small.image_encoder.parameters())
    assert small.image_encoder.blocks[0].mlp.lin1.training
    assert not small.mask_decoder.training


def test_flags_follow_a_block_that_gets_another_number() -> None:
    sam = sc.build("tiny")
    last = len(sam.image_encoder.blocks) - 1
    sam.image_encoder.blocks[last].requires_grad_(False).train()
    short = sc.prune.Blocks(count=1)(sam, data=sc.shapes(2))
    left = sc.lineage(short)[-1].state["kept"]["image_encoder.blocks"]
    assert left != list(range(last))
    for at, old in enumerate(left):
        block = short.image_encoder.blocks[at]
        assert block.training == (old == last)
        assert all(p.requires_grad == (old != last) for p in block.parameters())


def test_works_where_the_model_is(device: str) -> None:
    small = MLP(random_sam().to(device))
    assert {p.device.type for p in small.parameters()} == {torch.device(device).type}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "the recipe is not JSON"),
        ("3", "this is not a recipe"),
        ('{"steps": [3]}', "a step is not readable"),
        ('{"steps": [], "extra": 1}', "no key 'extra'"),
        ('{"format": 99, "steps": []}', "newer samcompress"),
        ('{"steps": [{"type": "prune.mlp", "ratio": 1}]}', "unknown keys: ratio"),
        ('{"steps": [{"type": "prune.mlp", "version": 99}]}', "newer samcompress"),
        ('{"steps": [{"type": "prune.mlp", "params": {"r": 1}}]}', "no field 'r'"),
    ],
)
def test_bad_recipes(text: str, message: str) -> None:
    with pytest.raises(errors.ConfigError, match=message):
        sc.Pipeline.from_json(text)


def test_unknown_technique_in_a_recipe() -> None:
    with pytest.raises(errors.UnknownTransformError, match=r"no technique 'prune\.mpl'"):
        sc.Pipeline.from_json('[{"type": "prune.mpl"}]')


def test_recipe_files(tmp_path: Path) -> None:
    pipe = MLP | INT8
    pipe.save(tmp_path / "r.json")
    assert sc.Pipeline.load(tmp_path / "r.json") == pipe
    yaml = pytest.importorskip("yaml")
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(pipe.to_dict()))
    assert sc.Pipeline.load(tmp_path / "r.yaml") == pipe
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(errors.ConfigError, match="not YAML"):
        sc.Pipeline.load(tmp_path / "bad.yaml")
    with pytest.raises(errors.ConfigError, match="no such recipe"):
        sc.Pipeline.load("smal.json")


def test_shipped_recipes() -> None:
    recipes = sc.list_recipes()
    assert recipes
    for name, description in recipes.items():
        assert description
        pipe = sc.Pipeline.load(name)
        assert sc.Pipeline.load(name.removesuffix(".json")) == pipe
        assert json.loads(pipe.to_json())["steps"]


def test_interrupt_leaves_the_model_as_it_was() -> None:
    sam = random_sam()
    before = fingerprint(sam)

    def stop(event: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sc.prune.Mlp(ratio=0.5)(sam, data=sc.shapes(2), progress=stop)
    assert fingerprint(sam) == before
    assert sc.lineage(sam) == ()
