"""The bidirectional WKV operator of Vision-RWKV in plain PyTorch, linear in the number of tokens.

Each channel averages the values of all tokens, weighted by e to their key and by a decay for each
token between. Tokens are cut into chunks. Inside a chunk the decays are a small matrix; what lies
before and behind a chunk enters as two more tokens, whose keys and values sum up other chunks. So
the work is a product of matrices, and no loop over tokens is in the graph.

Source: Y. Duan et al., "Vision-RWKV", 2024, arXiv 2403.02308; in a SAM: H. Yuan et al., 2024, arXiv
2406.19369 (reference code: a CUDA kernel under S-Lab License 1.0, of which nothing is used). Own
code, from the formula.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK = 64
GROUP = 8  # chunks summed up at once
NOTHING = -1e30  # a key whose weight is 0; -inf would make gradients NaN
LEAST = 1e-30  # added to sums of weights, which are larger by far: 0 / 0 would be NaN


def wkv(key: Tensor, value: Tensor, decay: Tensor, bonus: Tensor, chunk: int = CHUNK) -> Tensor:
    """Bidirectional weighted average of values.

    With ``weight[t, i] = exp(key[i] - (|t - i| - 1) * decay)`` for other tokens and
    ``exp(key[t] + bonus)`` for the token itself, ``out[t]`` is the sum of ``weight[t, i] *
    value[i]`` over the sum of ``weight[t, i]``. Half precision is computed in float32.

    Keys may be of any size: in each chunk they count from the largest that it sees. Decays may be
    negative. Where ``abs(decay) * chunk`` is above 50 and keys in one chunk differ by as much, all
    that a token sees may be lost beside the largest, and the result is 0.

    Args:
        key: (B, C, T).
        value: (B, C, T).
        decay: (C,) for one token's distance.
        bonus: (C,).
        chunk: tokens L handled at once; time grows with T * L.

    Returns:
        (B, C, T) in the type of `value`.
    """
    wide = torch.promote_types(value.dtype, torch.float32)
    with _no_autocast(value):
        inputs = (key.to(wide).contiguous(), value.to(wide).contiguous())
        mixed = _wkv(*inputs, decay.to(wide), bonus.to(wide), chunk)
    return mixed.to(value.dtype)


def _wkv(key: Tensor, value: Tensor, decay: Tensor, bonus: Tensor, chunk: int) -> Tensor:
    tokens = key.shape[-1]
    chunk = min(chunk, tokens)
    if rest := -tokens % chunk:
        key, value = F.pad(key, (0, rest), value=NOTHING), F.pad(value, (0, rest))
    key, value = _cut(key, chunk), _cut(value, chunk)  # (B, C, n, L)
    factors, scale = _factors(chunk, decay, bonus)
    among, beside = factors[:, :chunk].contiguous(), factors[:, chunk:].contiguous()
    # A quotient of sums does not depend on what keys count from, so neither does its gradient.
    top = key.detach().amax(-1, keepdim=True)
    weight = (key - top).exp()
    sums = torch.cat([weight * value, weight], 2)  # (B, C, 2n, L)
    if key.shape[2] == 1:
        above, below = (sums @ among).chunk(2, 2)
        return (above / (below + LEAST)).flatten(-2)
    # Each chunk as one token: as those behind it see it, and as those before it do.
    above, below = (sums @ beside.flip(1).mT.contiguous()).chunk(2, 2)
    below = below + LEAST
    average, whole = above / below, top + scale + below.log()
    keys, means = _around(whole, average, chunk * decay)
    # A chunk and what is beside it, counted from the largest of the three.
    highest = torch.cat([top, keys], -1).detach().amax(-1, keepdim=True)
    outer = (keys - highest).exp()
    outer = torch.cat([outer * means, outer], 2) @ beside
    inner = (sums @ among) * (top - highest).exp().repeat(1, 1, 2, 1)
    above, below = (inner + outer).chunk(2, 2)
    return (above / (below + LEAST)).flatten(-2)[..., :tokens]


def _factors(chunk: int, decay: Tensor, bonus: Tensor) -> tuple[Tensor, Tensor]:
    """Decays of the tokens of a chunk and of the two beside it, as those of the chunk see them.

    Returns:
        (C, L + 2, L) factors, at most 1, and (C, 1, 1) logarithms of what to multiply them with.
    """
    place = torch.arange(chunk, device=decay.device)
    same = place[:, None] == place
    distance = torch.where(same, 0, (place[:, None] - place).abs() - 1)
    distance = torch.cat([distance, place[None], chunk - 1 - place[None]]).to(decay.dtype)
    exponent = F.pad(same, (0, 0, 0, 2)) * bonus.view(-1, 1, 1) - distance * decay.view(-1, 1, 1)
    scale = exponent.detach().amax((1, 2), keepdim=True)
    return (exponent - scale).exp(), scale


def _around(key: Tensor, value: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
    """All tokens before each and all behind it, as two: (B, C, n, 2) keys and values.

    Args:
        key: (B, C, n, 2), as those behind see the token and as those before do.
        value: (B, C, n, 2).
        decay: (C,) for one token's distance.
    """
    both, averages = (torch.cat([x[..., 0], x[..., 1].flip(-1)]) for x in (key, value))
    halves = (x.chunk(2) for x in _before(both, averages, decay))
    keys, means = (torch.stack([before, behind.flip(-1)], -1) for before, behind in halves)
    return keys, means


def _before(key: Tensor, value: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
    """All tokens before each, as one: its key and its value.

    Args:
        key: (B, C, n).
        value: (B, C, n).
        decay: (C,) for one token's distance.
    """
    count, group = key.shape[-1], min(GROUP, key.shape[-1])
    rest = -count % group
    key, value = F.pad(key, (0, rest), value=NOTHING), F.pad(value, (0, rest))
    key, value = _cut(key, group), _cut(value, group)  # (B, C, m, G)
    place = torch.arange(group, device=key.device)
    step = decay.view(-1, 1, 1)
    if count > group:
        first = _before(*_sum_up(key - (group - 1 - place) * step, value), group * decay)
    else:
        first = (torch.full_like(key[..., 0], NOTHING), torch.zeros_like(value[..., 0]))
    # What is before the group takes the place of its last token, which none of the group sees.
    key, value = (
        torch.cat([x[..., None], y[..., :-1]], -1) for x, y in zip(first, (key, value), strict=True)
    )
    apart = place[:, None] - place
    far = torch.where(apart < 0, NOTHING, -apart * step[..., None])  # (C, 1, G, G)
    keys, means = _sum_up(key[..., None, :] + far, value[..., None, :])
    return keys.flatten(-2)[..., :count], means.flatten(-2)[..., :count]


def _sum_up(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens in the last dimension as one, which replaces them: its key and its value."""
    top = key.detach().amax(-1, keepdim=True)
    weight = (key - top).exp()
    total = weight.sum(-1)
    return top[..., 0] + total.log(), (weight * value).sum(-1) / total


def _cut(x: Tensor, size: int) -> Tensor:
    """(..., n * size) to (..., n, size)."""
    return x.reshape(*x.shape[:-1], -1, size)


def _no_autocast(x: Tensor) -> torch.autocast | nullcontext[None]:
    """Sums over an image are not for half precision; storage-less tensors know no autocast."""
    if x.device.type == "meta":
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)
