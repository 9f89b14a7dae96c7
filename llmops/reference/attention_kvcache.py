"""attention_kvcache in plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmops.reference._common import _wide
from llmops.reference.attention import attention, attention_bwd


def cached_rows(
    cache: Tensor, block_table: Tensor | None, batch: int, begin: int, end: int
) -> Tensor:
    """Rows [begin, end) of one sequence of a cache, [H, end - begin, D]."""
    if block_table is None:
        return cache[batch, :, begin:end]
    page = cache.shape[2]
    first, last = begin // page, -(-end // page)  # the blocks that hold them
    blocks = cache[block_table[batch, first:last].long()]  # [blocks, H, page, D]
    return blocks.transpose(0, 1).flatten(1, 2)[:, begin - first * page : end - first * page]


def attention_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    block_table: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    return_lse: bool = False,
    alibi_slopes: Tensor | None = None,
    **modifiers: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` of one sequence after the other, over the rows of the cache that it holds."""
    outs = [q[:0, ..., :1] * v_cache[:0].sum() + q.new_zeros(0, *q.shape[1:3], v_cache.shape[3])]
    lses = [_wide(q[:0].sum(-1))]
    for b, end in enumerate(cache_seqlens.tolist()):
        begin = 0 if cache_leftpad is None else int(cache_leftpad[b])
        keys, values = (
            cached_rows(cache, block_table, b, begin, end)[None] for cache in (k_cache, v_cache)
        )
        per_batch = alibi_slopes is not None and alibi_slopes.dim() == 2
        slopes = alibi_slopes[b : b + 1] if per_batch and alibi_slopes is not None else alibi_slopes
        one = q[b : b + 1]
        out, lse = attention(one, keys, values, alibi_slopes=slopes, return_lse=True, **modifiers)
        outs.append(out)
        lses.append(lse)
    out = torch.cat(outs)
    return (out, torch.cat(lses)) if return_lse else out


def attention_kvcache_bwd(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    cache_leftpad: Tensor | None,
    causal: bool,
    scale: float,
    window_left: int,
    window_right: int,
    alibi_slopes: Tensor | None,
    softcap: float,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk_cache, dv_cache and dsinks: each sequence's forward again, then `attention_bwd`. By
    formula, without torch.func, which an operator's kernel cannot call under a dispatch mode."""
    score = (window_left, window_right)
    dqs, dsinks = [q[:0]], q.new_zeros(0) if sinks is None else torch.zeros_like(sinks)
    caches: list[list[Tensor]] = [[k_cache[:0]], [v_cache[:0]]]
    paged = [torch.zeros_like(k_cache), torch.zeros_like(v_cache)]
    for b, end in enumerate(cache_seqlens.tolist()):
        begin = 0 if cache_leftpad is None else int(cache_leftpad[b])
        keys, values = (
            cached_rows(cache, block_table, b, begin, end)[None] for cache in (k_cache, v_cache)
        )
        per_batch = alibi_slopes is not None and alibi_slopes.dim() == 2
        slopes = alibi_slopes[b : b + 1] if per_batch and alibi_slopes is not None else alibi_slopes
        one = q[b : b + 1]
        out, lse = attention(
            one, keys, values, causal=causal, scale=scale, window=score, alibi_slopes=slopes,
            softcap=softcap or None, sinks=sinks, return_lse=True,
        )  # fmt: skip
        dq, dk, dv, _, dsink = attention_bwd(
            torch.zeros_like(out) if grad_out is None else grad_out[b : b + 1],
            None if grad_lse is None else grad_lse[b : b + 1],
            one, keys, values, None, out, lse, causal, scale, False, *score, slopes, softcap, sinks,
        )  # fmt: skip
        dqs.append(dq)
        if dsink is not None:
            dsinks = dsinks + dsink.to(dsinks.dtype)
        for at, grad in enumerate((dk[0], dv[0])):  # [H, end - begin, D]
            if block_table is None:
                whole = F.pad(grad, (0, 0, begin, k_cache.shape[2] - end))
                caches[at].append(whole[None])
                continue
            rows = torch.arange(begin, end, device=q.device)
            page = k_cache.shape[2]
            blocks, heads = block_table[b, rows // page].long(), torch.arange(grad.shape[0])
            where = (blocks[:, None], heads.to(q.device), (rows % page)[:, None])
            paged[at] = paged[at].index_put(where, grad.transpose(0, 1), accumulate=True)
    if block_table is None:
        dk_cache, dv_cache = (torch.cat(each) for each in caches)
    else:
        dk_cache, dv_cache = paged
    return torch.cat(dqs), dk_cache, dv_cache, dsinks
