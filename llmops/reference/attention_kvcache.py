"""attention_kvcache in plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmops.reference._common import _wide
from llmops.reference.attention import attention


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
