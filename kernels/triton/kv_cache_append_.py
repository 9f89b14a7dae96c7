"""New keys and values behind those that each sequence's cache holds, in place.

    cache[b, h, start[b] + t] = new[b, h, t]    paged: block table[b, r // page], row r % page

Several rows (b, t, h) per program, a row's elements along the lanes; keys and values in one launch.
Values are moved, not computed with. 2 accesses per element of the new tokens.

A GPU is not waited for, so nothing raises here: a sequence whose tokens do not fit its cache, and a
row whose table entry names no block, are not written.

Kwon et al., "PagedAttention", 2023.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from llmops.kernels.triton import _config, _rows
from llmops.kernels.triton._launch import cdiv, launch
from torch import Tensor


@triton.jit
def _copy(
    new, cache, b, t, h, held, block, at, n, n0, n1, n2, n3, c0, c1, c2, c3, BLOCK: tl.constexpr
):
    for begin in range(0, n, BLOCK):
        column = begin + tl.arange(0, BLOCK)[None, :].to(tl.int64)
        inside = held & (column < n)
        value = tl.load(new + b * n0 + h * n1 + t * n2 + column * n3, mask=inside)
        tl.store(cache + block * c0 + h * c1 + at * c2 + column * c3, value, mask=inside)


@triton.jit
def kv_cache_append_kernel(
    k, v, k_cache, v_cache, lengths, table, rows, heads, tokens, dim, dim_v, capacity, blocks, page,
    length_stride, table_b, table_i,
    k0, k1, k2, k3, kc0, kc1, kc2, kc3, v0, v1, v2, v3, vc0, vc1, vc2, vc3,
    PAGED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    h = row % heads
    t = row // heads % tokens
    b = row // (heads * tokens)
    held = row < rows
    start = tl.load(lengths + b * length_stride, mask=held, other=0).to(tl.int64)
    held = held & (start >= 0) & (start <= capacity - tokens)
    at = start + t
    block = b
    if PAGED:
        entry = table + b * table_b + at // page * table_i
        block = tl.load(entry, mask=held, other=0).to(tl.int64)
        held = held & (block >= 0) & (block < blocks)
        at = at % page
    if tl.program_id(1) == 0:
        _copy(k, k_cache, b, t, h, held, block, at, dim,
              k0, k1, k2, k3, kc0, kc1, kc2, kc3, BLOCK)  # fmt: skip
    else:
        _copy(v, v_cache, b, t, h, held, block, at, dim_v,
              v0, v1, v2, v3, vc0, vc1, vc2, vc3, BLOCK)  # fmt: skip


# ---- launcher ------------------------------------------------------------------------------------


def _table(n: int, size: int) -> _config.Config:
    """Few rows per program, for a decode step has few: 32 bytes to a thread, whose addresses are
    64-bit. Not measured yet; from ahead-of-time inspection."""
    block = _rows.block(n, 512)
    return {"ROWS": max(1, min(2048 // size // block, 16)), "BLOCK": block, "num_warps": 2}


def entries(op: str, dtype: torch.dtype) -> Iterator[tuple[_config.Key, _config.Config]]:
    for n in _rows.lengths(512):
        yield (n, dtype), _table(n, dtype.itemsize)


def kv_cache_append_(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None = None,
) -> None:
    """k [B, H, T, D], v [B, H, T, Dv], caches [B, H, Tmax, *] or [blocks, H, page, *]."""
    batch, heads, tokens, dim = k.shape
    dim_v, page = v.shape[3], k_cache.shape[2]
    rows = batch * heads * tokens
    if rows == 0 or max(dim, dim_v) == 0:
        return
    if block_table is None:
        table, capacity, strides = cache_seqlens, page, (0, 0)
    else:
        table, strides = block_table, block_table.stride()
        capacity = page * block_table.shape[1]
    widest = _rows.power_of_2(max(dim, dim_v))
    config = _config.choose("kv_cache_append_", (widest, k.dtype), _table(widest, k.itemsize))
    launch(
        kv_cache_append_kernel, (cdiv(rows, config["ROWS"]), 2), k, v, k_cache, v_cache,
        cache_seqlens, table, rows, heads, tokens, dim, dim_v, capacity, k_cache.shape[0], page,
        cache_seqlens.stride(0), *strides, *k.stride(), *k_cache.stride(), *v.stride(),
        *v_cache.stride(), PAGED=block_table is not None, **config,
    )  # fmt: skip
