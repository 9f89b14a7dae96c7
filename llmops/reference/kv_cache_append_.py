"""kv_cache_append_ in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def kv_cache_append_(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    cache_seqlens: Tensor,
    *,
    block_table: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    for b, start in enumerate(cache_seqlens.tolist()):
        rows = torch.arange(start, start + k.shape[2], device=k.device)
        for cache, new in ((k_cache, k[b]), (v_cache, v[b])):
            if block_table is None:
                cache[b, :, rows] = new
            else:
                page = cache.shape[2]
                blocks = block_table[b, rows // page].long()
                cache[blocks, :, rows % page] = new.transpose(0, 1)
    return k_cache, v_cache
