"""llmops.KVCache: steps of any size give what attention without a cache gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import llmops


def _qkv(batch: int, tokens: int) -> list[Tensor]:
    """q, k, v with 4 and 2 heads; as one projection [B, T, H, D] holds them."""
    return [torch.randn(batch, tokens, h, d).transpose(1, 2) for h, d in ((4, 16), (2, 16), (2, 8))]


def _cut(tensors: list[Tensor], begin: int, end: int) -> list[Tensor]:
    return [x[:, :, begin:end] for x in tensors]


def _same(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("steps", [(40,), (17, 1, 1, 21), (1,) * 40], ids=str)
def test_kv_cache_attends_to_all_it_holds(steps: tuple[int, ...], backend: str) -> None:
    layers = [_qkv(3, 40) for _ in range(2)]
    cache = llmops.KVCache(3, 2, 40, 16, value_dim=8, layers=2)
    outs: list[list[Tensor]] = [[], []]
    begin = 0
    for tokens in steps:
        cache.extend(tokens)
        for layer, qkv in enumerate(layers):
            new = _cut(qkv, begin, begin + tokens)
            outs[layer].append(cache.attend(*new, layer, window=(9, 0), backend=backend))
        begin += tokens
    assert cache.lengths.tolist() == [40, 40, 40] and cache.longest == 40
    for out, qkv in zip(outs, layers, strict=True):
        _same(torch.cat(out, 2), llmops.attention(*qkv, causal=True, window=(9, 0)))
    with pytest.raises(ValueError, match="holds 40 of 40 tokens, 1 more do not fit"):
        cache.extend(1)
    cache.reset()
    assert cache.longest == 0 and cache.lengths.tolist() == [0, 0, 0]


def test_kv_cache_sequences_begin_anew_one_by_one() -> None:
    """After reset([1]) sequence 1 sees its new tokens alone, the others all of theirs."""
    first, second = _qkv(3, 10), _qkv(3, 6)
    cache = llmops.KVCache(3, 2, 16, 16, value_dim=8)
    cache.extend(10)
    cache.attend(*first)
    cache.reset([1])
    assert cache.lengths.tolist() == [10, 0, 10] and not cache.equal
    cache.extend(6)
    out = cache.attend(*second)
    together = [torch.cat((a, b), 2) for a, b in zip(first, second, strict=True)]
    whole = llmops.attention(*together, causal=True)
    alone = llmops.attention(*second, causal=True)
    assert isinstance(whole, Tensor) and isinstance(alone, Tensor)
    _same(out[[0, 2]], whole[[0, 2], :, 10:])
    _same(out[1], alone[1])


def test_kv_cache_left_pads() -> None:
    """Pads are seen by no query, whatever they hold."""
    qkv, pads = _qkv(2, 12), torch.tensor([0, 5])
    qkv[1][1, :, :5] = float("nan")
    qkv[2][1, :, :5] = float("nan")
    cache = llmops.KVCache(2, 2, 12, 16, value_dim=8)
    cache.pad_left(pads)
    outs = []
    for begin, end in ((0, 9), (9, 10), (10, 12)):
        cache.extend(end - begin)
        outs.append(cache.attend(*_cut(qkv, begin, end)))
    out = torch.cat(outs, 2)
    for b in range(2):
        rows = [x[b : b + 1, :, pads[b] :] for x in qkv]
        _same(out[b : b + 1, :, pads[b] :], llmops.attention(*rows, causal=True))
    assert bool((out[1, :, :5] == 0).all())


def test_kv_cache_rejects_bad_input() -> None:
    cache = llmops.KVCache(2, 2, 12, 16, dtype=torch.bfloat16)
    k = torch.randn(2, 2, 3, 16)
    with pytest.raises(ValueError, match=r"k holds 3 tokens, but extend\(\) made room for 0"):
        cache.append(k, k)
    cache.extend(3)
    with pytest.raises(TypeError, match="k has dtype float32 and k_cache bfloat16"):
        cache.append(k, k)
    with pytest.raises(ValueError, match="KVCache: kv_heads must be >= 0; got -1"):
        llmops.KVCache(2, -1, 12, 16)
