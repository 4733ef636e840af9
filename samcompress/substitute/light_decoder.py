"""A lighter mask decoder: fewer layers, narrower inside."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from segment_anything.modeling.transformer import Attention, TwoWayTransformer
from torch import Tensor, nn

from ..core.contract import parts
from ..core.errors import ConfigError, ModelError, NoEffectError
from ..core.registry import register
from ..core.transform import Context, State, Transform

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
LINEAR = (*PROJECTIONS, "lin1", "lin2")


@register
@dataclass(frozen=True, kw_only=True)
class LightDecoder(Transform, family="substitute", phase=10):
    """Make the mask decoder lighter: fewer two-way layers, narrower MLPs, narrower attention.

    Use it where many prompts follow one image, or where the image encoder is so light that the
    decoder counts: a prompt then costs half as much. The weights that stay are SAM's own, so it
    starts from a decoder, not from nothing; yet without training its masks are poor: let
    `PromptLoop` or `Supervised` follow. Not for a decoder that must stay as it is; to cut it by
    what data say, in finer steps and with all its layers, take `prune.Decoder`.

    Args:
        depth: two-way layers kept, the first ones, >= 1. SAM has 2.
        mlp_dim: hidden units of each layer's MLP, >= 1; None for as many as there are. SAM has
            2048. Matters for the parameters only: the MLPs see tokens, of which there are few.
        attention_dim: channels inside each attention between tokens and image, a multiple of its
            heads; None for as many as there are. SAM has 128.

    Raises:
        ConfigError: if a field is below 1, above what the decoder has, or no multiple of the heads.
        NoEffectError: if the decoder is no larger than that already.
        ModelError: if the model is no SAM, or its decoder has not segment_anything's transformer.

    Effect: of SAM's decoder, 4.06 million parameters and 1.81 GMAC a prompt, ``depth=1`` leaves
        2.48 and 1.25; with ``mlp_dim=512`` 1.69 and 1.25; with ``attention_dim=64`` besides 1.49
        and 0.83. Image encoder and prompt encoder stay.

    Composes with: comes after the image encoder's step and before all other families;
        `distill.PromptLoop` after it trains both halves.

    Source: own design and code. Units are kept by the norms of the weights that write and read
        them, as filters in Li et al. 2016, arXiv 1608.08710.

    Example:
        >>> import samcompress as sc
        >>> small = LightDecoder(mlp_dim=32)(sc.build("tiny"))
        >>> len(small.mask_decoder.transformer.layers)
        1
    """

    depth: int = 1
    mlp_dim: int | None = None
    attention_dim: int | None = None

    def validate(self) -> None:
        """Check the fields."""
        for name in ("depth", "mlp_dim", "attention_dim"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(
                    f"{self.label}: {name} is out of range.", got=value, expected=">= 1"
                )

    def check(self, model: nn.Module) -> None:
        """Check that the decoder has what is to become less."""
        transformer = self._transformer(model)
        attentions = list(_attentions(transformer))
        heads = math.lcm(*(attention.num_heads for attention in attentions))
        if self.attention_dim is not None and self.attention_dim % heads:
            raise ConfigError(
                f"{self.label}: attention_dim does not divide into the heads.",
                where="mask_decoder.transformer",
                got=self.attention_dim,
                expected=f"a multiple of {heads}",
            )
        present = {
            "depth": [len(transformer.layers)],
            "mlp_dim": [layer.mlp.lin1.out_features for layer in transformer.layers],
            "attention_dim": [attention.v_proj.out_features for attention in attentions],
        }
        wanted = {name: getattr(self, name) or max(present[name]) for name in present}
        for name, values in present.items():
            if wanted[name] > max(values):
                raise ConfigError(
                    f"{self.label}: {name} is more than the decoder has.",
                    where="mask_decoder.transformer",
                    got=wanted[name],
                    expected=f"<= {max(values)}",
                )
        if all(wanted[name] == max(values) for name, values in present.items()):
            raise NoEffectError(
                f"{self.label}: the decoder is as light as that already.",
                where="mask_decoder.transformer",
                got=", ".join(f"{name} {max(values)}" for name, values in present.items()),
                fix="less of one of these, or leave this step out",
            )

    def _transformer(self, model: nn.Module) -> Any:
        decoder: Any = parts(model).mask_decoder
        found = getattr(decoder, "transformer", None)
        strange = [("transformer", found)]
        if isinstance(found, TwoWayTransformer):
            strange = [
                (f"transformer.{name}", module)
                for name, module in found.named_modules()
                if name.rpartition(".")[2] in LINEAR and type(module) is not nn.Linear
            ]
        if strange:
            name, kind = strange[0]
            raise ModelError(
                f"{self.label} does not know this mask decoder's transformer.",
                where=f"mask_decoder.{name}",
                got=f"{type(kind).__module__}.{type(kind).__qualname__}",
                expected="segment_anything's two-way transformer with plain linear layers",
                fix="put this step before those that replace modules",
            )
        return found

    def apply(self, model: nn.Module, ctx: Context) -> State:
        """Keep the first layers, and of each the units of the largest norms."""
        transformer = self._transformer(model)
        state = {
            "layers": [len(transformer.layers), self.depth],
            "mlp_dim": self.mlp_dim,
            "attention_dim": self.attention_dim,
        }
        return self.rebuild(model, state)

    def rebuild(self, model: nn.Module, state: State) -> State:
        """The same shapes again."""
        transformer: Any = parts(model).mask_decoder.get_submodule("transformer")
        transformer.depth = state["layers"][1]
        transformer.layers = transformer.layers[: transformer.depth]
        if state["mlp_dim"] is not None:
            transformer.mlp_dim = state["mlp_dim"]
            for layer in transformer.layers:
                narrow_mlp(layer.mlp, state["mlp_dim"])
        if state["attention_dim"] is not None:
            for attention in _attentions(transformer):
                narrow_attention(attention, state["attention_dim"])
        return state


def _attentions(transformer: Any) -> Iterator[Any]:
    """Those between tokens and image, which is where the work is."""
    for layer in transformer.layers:
        yield layer.cross_attn_token_to_image
        yield layer.cross_attn_image_to_token
    yield transformer.final_attn_token_to_image


@torch.no_grad()
def narrow_mlp(mlp: Any, count: int) -> None:
    """Keep the hidden units whose incoming and outgoing weights have the largest norms.

    Args:
        mlp: has ``lin1`` and ``lin2``; changed in place.
        count: units to keep; at least as many as there are leaves it alone.
    """
    score = mlp.lin1.weight.norm(dim=1) * mlp.lin2.weight.norm(dim=0)
    kept = _largest(score[None], count)
    _rows(mlp.lin1, kept)
    _columns(mlp.lin2, kept)


@torch.no_grad()
def narrow_attention(attention: Attention, channels: int) -> None:
    """Keep the channels of each head that say most: of queries with keys, of values with output.

    Args:
        attention: changed in place; its heads stay as many.
        channels: inside of it, a multiple of its heads; at least as many as there are leaves it.
    """
    heads = attention.num_heads
    q, k, v, out = (getattr(attention, name) for name in PROJECTIONS)
    whole = q.out_features
    meet = _largest(_by_head(_norms(q) * _norms(k), heads), channels // heads)
    carry = _largest(_by_head(_norms(v) * out.weight.norm(dim=0), heads), channels // heads)
    for linear, kept in ((q, meet), (k, meet), (v, carry)):
        _rows(linear, kept)
    _columns(out, carry)
    attention.internal_dim = len(carry)
    # It divides by the root of a head's channels, of which there were more.
    factor = math.sqrt(len(meet) / whole)
    q.weight.mul_(factor)
    q.bias.mul_(factor)


def _norms(linear: Any) -> Tensor:
    found: Tensor = torch.cat([linear.weight, linear.bias[:, None]], 1).norm(dim=1)
    return found


def _by_head(score: Tensor, heads: int) -> Tensor:
    return score.view(heads, -1)


def _largest(score: Tensor, count: int) -> Tensor:
    """Places of the `count` largest of each row (G, N), counted through all rows, in order."""
    count = min(count, score.shape[1])
    kept = score.topk(count, dim=1).indices.sort(1).values
    starts = score.shape[1] * torch.arange(len(score), device=score.device)
    return (kept + starts[:, None]).flatten()


def _rows(linear: Any, kept: Tensor) -> None:
    linear.weight = _like(linear.weight, linear.weight[kept])
    linear.bias = _like(linear.bias, linear.bias[kept])
    linear.out_features = len(kept)


def _columns(linear: Any, kept: Tensor) -> None:
    linear.weight = _like(linear.weight, linear.weight[:, kept])
    linear.in_features = len(kept)


def _like(old: Any, values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.detach().clone(), requires_grad=old.requires_grad)
