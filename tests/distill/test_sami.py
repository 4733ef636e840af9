from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import random_sam
from learners import changed, copied, equal, scenes, stopped_and_resumed
from torch import nn
from torch.nn import functional as F

import samcompress as sc
from samcompress.core import errors
from samcompress.core._objective import Share
from samcompress.core._trainable import training
from samcompress.core.data import Dataset
from samcompress.distill._taps import EMBEDDING, block, states
from samcompress.distill.sami import Cross, Decoder, Guesses, Sami, filled, waves


@pytest.fixture(scope="module")
def data() -> Dataset:
    return scenes()


def small(**fields: Any) -> Sami:
    return Sami(
        **{
            "steps": 6,
            "batch_size": 2,
            "decoder_depth": 1,
            "decoder_width": 32,
            "lr": 0.5,
            **fields,
        }
    )


def guesses(student: nn.Module, teacher: nn.Module, **fields: Any) -> Guesses:
    ctx: Any = SimpleNamespace(original=teacher, data=scenes(), device=torch.device("cpu"))
    return Guesses(student, ctx, small(batch_size=4, **fields))


def trained_step(objective: Guesses, step: int = 0) -> float:
    terms = objective(objective.source.draw(step, Share()), step)
    assert list(terms) == ["tokens"]
    terms["tokens"].backward()
    return terms["tokens"].item()


# ----------------------------------------------------------------------------------------- masking


def test_what_is_hidden_depends_on_seed_step_and_place_alone() -> None:
    objective = guesses(random_sam(), random_sam(seed=5))
    order, visible = objective._order(objective.source.draw(3, Share()), 3)
    assert (order.shape, visible) == ((4, 64), 16)
    assert all(sorted(row) == list(range(64)) for row in order.tolist())
    assert len({tuple(row) for row in order.tolist()}) == 4
    parts = [objective._order(objective.source.draw(3, Share(i, 2)), 3)[0] for i in (0, 1)]
    assert torch.equal(torch.cat(parts), order)
    assert not torch.equal(objective._order(objective.source.draw(4, Share()), 4)[0], order)
    shares = {0.01: 63, 0.5: 32, 0.99: 1}
    for share, left in shares.items():
        other = guesses(random_sam(), random_sam(seed=5), hidden=share)
        assert other._order(other.source.draw(0, Share()), 0)[1] == left


def test_hidden_pixels_reach_nothing() -> None:
    """Whatever the hidden patches show, all of the student's tokens are the same."""
    sam = random_sam()
    encoder = sam.image_encoder
    image = torch.randn(1, 3, 64, 64)
    places = torch.tensor([[0, 9, 63]])
    other = image.clone()
    for place in places[0].tolist():
        row, column = divmod(place, 8)
        other[..., 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = 7.0
    value = torch.randn(32)
    found = []
    for shown in (image, other):
        with filled(encoder.patch_embed, places, value):
            found.append(states(encoder, shown, ["patch_embed", block(1)]))
    tokens = found[0]["patch_embed"].flatten(2)[0].T
    assert torch.equal(found[0][block(1)], found[1][block(1)])
    plain = encoder.patch_embed(image).flatten(1, 2)[0]
    kept = [i for i in range(64) if i not in places[0]]
    assert torch.equal(tokens[kept], plain[kept])
    assert torch.equal(tokens[places[0]], value.expand(3, -1))
    assert not any(m._forward_hooks for m in sam.modules())


# ----------------------------------------------------------------------------------------- decoder


def decoded(decoder: Decoder, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randn(2, 12, 8, generator=g)
    order = torch.stack([torch.randperm(12, generator=g) for _ in range(2)])
    return tokens, order, decoder(tokens, order, 4)


def test_visible_tokens_bypass_the_decoder() -> None:
    decoder = Decoder(8, 5, 32, 2, (3, 4))
    tokens, order, before = decoded(decoder)
    assert before.shape == (2, 12, 5)
    for i in range(2):
        for place in order[i, :4].tolist():
            expected = decoder.head(decoder.norm(decoder.embed(tokens[i, place])))
            torch.testing.assert_close(before[i, place], expected)
    with torch.no_grad():
        for p in (decoder.query, decoder.positions, *decoder.blocks.parameters()):
            p.zero_()
    _, _, after = decoded(decoder)
    seen = order[:, :4, None]
    assert torch.equal(after.take_along_dim(seen, 1), before.take_along_dim(seen, 1))
    hidden = order[:, 4:, None]
    assert not torch.allclose(after.take_along_dim(hidden, 1), before.take_along_dim(hidden, 1))


def test_hidden_tokens_are_not_read() -> None:
    decoder = Decoder(8, 5, 32, 2, (3, 4))
    tokens, order, before = decoded(decoder)
    tokens.scatter_(1, order[:, 4:, None].expand(-1, -1, 8), 1e6)
    assert torch.equal(decoder(tokens, order, 4), before)


def test_cross_attention_by_hand() -> None:
    layer, guess, memory = Cross(64), torch.randn(2, 5, 64), torch.randn(2, 3, 64)
    keys = layer.norm1(torch.cat([memory, guess], 1))
    k, v = layer.kv(keys).split(64, -1)
    q = layer.q(layer.norm1(guess))
    heads = []
    for part in (slice(0, 32), slice(32, 64)):
        scores = q[..., part] @ k[..., part].mT / 32**0.5
        heads.append(F.softmax(scores, -1) @ v[..., part])
    x = guess + layer.proj(torch.cat(heads, -1))
    x = x + layer.mlp(layer.norm2(x))
    torch.testing.assert_close(layer(guess, memory), x)


def test_positions_differ() -> None:
    table = waves(32, (4, 6))
    assert table.shape == (24, 32)
    assert torch.cdist(table, table)[~torch.eye(24, dtype=torch.bool)].min() > 0.1
    assert torch.equal(table[0, :16], table[5, :16])  # same row
    assert torch.equal(table[1, 16:], table[7, 16:])  # same column


# ------------------------------------------------------------------------------------------ losses


@pytest.mark.parametrize("tap", ["tokens", "neck"])
def test_targets_and_loss_by_hand(tap: str) -> None:
    student = random_sam()
    teacher = random_sam(seed=5, embed_dim=48, image_size=96, out_chans=16)
    objective = guesses(student, teacher, tap=tap)
    drawn = objective.source.draw(0, Share())
    name = EMBEDDING if tap == "neck" else block(1)
    target = states(teacher.image_encoder, drawn.images[1], [name])[name]
    assert objective.decoder.head.out_features == target.shape[1] == (16 if tap == "neck" else 48)
    target = F.interpolate(target, (8, 8), mode="area")
    order, visible = objective._order(drawn, 0)
    with filled(student.image_encoder.patch_embed, order[:, visible:], objective.decoder.stand_in):
        tokens = states(student.image_encoder, drawn.images[0], [block(1)])[block(1)]
    guess = objective.decoder(tokens.flatten(2).mT, order, visible).mT.reshape(target.shape)
    each = [
        (guess - target)[i, :, : h // 8, : w // 8].square().mean()
        for i, (h, w) in enumerate(drawn.sizes)
    ]
    torch.testing.assert_close(objective(drawn, 0)["tokens"], torch.stack(each).mean())


def test_padding_does_not_count() -> None:
    objective = guesses(random_sam(), random_sam(seed=5))
    teach = objective.teach

    def disturbed(drawn: Any, names: Any, number: int = 0) -> dict[str, torch.Tensor]:
        valid = drawn.valid((8, 8))
        assert 0 < valid.mean() < 1
        return {n: v + 100 * (1 - valid) for n, v in teach(drawn, names, number).items()}

    with training(objective, objective.settings.parts) as parameters:
        first = trained_step(objective)
        slopes = {n: p.grad for n, p in parameters.items()}
        for p in parameters.values():
            p.grad = None
        objective.teach = disturbed
        assert trained_step(objective) == first
        for name, p in parameters.items():
            assert p.grad is slopes[name] is None or torch.equal(p.grad, slopes[name])


def test_gradients() -> None:
    """The encoder learns from visible and from hidden tokens; the neck has no part in it."""
    objective = guesses(random_sam(), random_sam(seed=5))
    drawn = objective.source.draw(0, Share())
    encoder = objective.student.image_encoder
    order, visible = objective._order(drawn, 0)
    with training(objective, objective.settings.parts):
        for part in (order[:, :visible], order[:, visible:]):
            with filled(encoder.patch_embed, order[:, visible:], objective.decoder.stand_in):
                tokens = objective.learn(drawn, [block(1)])[block(1)].flatten(2).mT
            guess = objective.decoder(tokens, order, visible)
            guess.take_along_dim(part[..., None], 1).square().sum().backward()
            for name, p in encoder.named_parameters():
                assert (p.grad is None) == name.startswith("neck."), name
                assert p.grad is None or p.grad.any(), name
            encoder.zero_grad()
        objective.zero_grad()
        trained_step(objective)
        assert all(p.grad.any() for p in objective.decoder.parameters())
        assert all(p.grad is None for p in objective.student.mask_decoder.parameters())


# -------------------------------------------------------------------------------------------- runs


def test_only_the_encoder_changes_and_the_decoder_is_gone(data: Dataset) -> None:
    teacher, student = random_sam(seed=5, embed_dim=48), random_sam()
    before, kept, random_state = copied(student), copied(teacher), torch.get_rng_state()
    done = small(steps=1)(student, data=data, teacher=teacher, progress=False)
    names = {n for n in before if n.startswith("image_encoder.")}
    assert changed(before, done) == {n for n in names if ".neck." not in n}
    assert [n for n, _ in done.named_modules()] == [n for n, _ in student.named_modules()]
    assert not changed(kept, teacher)
    assert all(p.grad is None for m in (teacher, student, done) for p in m.parameters())
    assert not any(m._forward_hooks for s in (teacher, done) for m in s.modules())
    assert torch.equal(random_state, torch.get_rng_state())


def test_it_learns() -> None:
    done = small(steps=30, batch_size=4, lr=6.0)(
        random_sam(), data=sc.shapes(4, size=64), teacher=random_sam(seed=5), progress=False
    )
    state = sc.lineage(done)[-1].state
    assert state["loss_after"] < state["loss_before"] / 1.5
    assert (state["images"], state["steps"], state["skipped"]) == (4, 30, 0)


def test_students_of_other_families(data: Dataset) -> None:
    chain = sc.substitute.ImageSize(size=48) | sc.attention.Fused() | small(lr=3.0)
    done = chain(random_sam(), data=data, progress=False)
    state = sc.lineage(done)[-1].state
    assert state["loss_after"] < state["loss_before"]


def test_rate_is_in_proportion_to_the_batch(
    data: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    plan = Sami(batch_size=64, steps=100).plan(1)
    assert plan.lr == 2.4e-3 / 64
    assert (plan.betas, plan.weight_decay, plan.warmup) == ((0.9, 0.95), 0.05, 0.1)
    with caplog.at_level(logging.INFO, "samcompress.distill"):
        done = small(steps=1, lr=2.4e-3)(
            random_sam(), data=data, teacher=random_sam(seed=5), progress=False
        )
    assert "distill.sami: highest rate 1.17e-06 = 0.0024 x 2 / 4096" in caplog.messages
    assert sc.lineage(done)[-1].state["lr"] == 2.4e-3 * 2 / 4096


@pytest.mark.parametrize("fields", [{}, {"tap": "neck", "ema": 0.9, "accumulate": 2}], ids=str)
def test_resumed_equals_uninterrupted(
    fields: dict[str, Any], data: Dataset, tmp_path: Path
) -> None:
    step = small(**fields)
    run = {"data": data, "teacher": random_sam(seed=5, image_size=96), "progress": False}
    whole = step(random_sam(), **run)
    again = stopped_and_resumed(step, random_sam(), run, tmp_path)
    assert equal(whole, again)
    assert sc.lineage(whole)[-1].state == sc.lineage(again)[-1].state


def test_micro_batches_change_nothing(data: Dataset) -> None:
    run = {"data": data, "teacher": random_sam(seed=5), "progress": False}
    steps = [small(steps=1, batch_size=4, accumulate=a) for a in (1, 4)]
    curves = [sc.lineage(s(random_sam(), **run))[-1].state["curve"] for s in steps]
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)


# ------------------------------------------------------------------------------------------ errors


class Plain(nn.Module):
    """An image encoder without blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.img_size = 64
        self.stem = nn.Conv2d(3, 32, 8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.stem(x)


def test_encoders_without_blocks(data: Dataset) -> None:
    """As a teacher of embeddings any encoder will do."""
    other = random_sam()
    other.image_encoder = Plain()
    assert small(steps=1, tap="neck")(random_sam(), data=data, teacher=other, progress=False)
    for student, teacher, who in (
        (random_sam(), other, "teacher"),
        (other, random_sam(), "student"),
    ):
        with pytest.raises(errors.ModelError) as caught:
            small(steps=1)(student, data=data, teacher=teacher, progress=False)
        assert str(caught.value).startswith(
            f"the {who} lacks a layer that is tapped.\n"
            f"  where     the {who}'s image_encoder.blocks\n"
            "  got       Plain with stem\n"
        )


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("hidden", 1.0, "0 < hidden < 1"),
        ("tap", "token", "'tokens' | 'neck'"),
        ("decoder_depth", 0, ">= 1"),
        ("decoder_width", 48, "a multiple of 32"),
        ("decoder_width", 0, "a multiple of 32"),
    ],
)
def test_fields_out_of_range(field: str, value: object, expected: str) -> None:
    with pytest.raises(errors.ConfigError) as caught:
        Sami(**{field: value})
    assert str(caught.value).startswith(f"distill.sami: {field} ")
    assert f"  expected  {expected}" in str(caught.value)
