"""Attention in tiles: softmax(scale q k^T + mask) v with an online softmax, O(T) memory.

Forward: a program holds a block of queries and loops over the keys they see: full blocks without a
comparison, blocks that causality, a window or the end cuts with them; blocks that no query sees are
skipped, and the heaviest query blocks of a head come first. Exponentials in base 2, scale * log2 e
folded in; K and V are shared by a group of heads and never repeated. Backward: `attention_bwd.py`.
fp32 softmax and sums, weights rounded to v's dtype for the product with v. Head dimensions are
padded to a power of two; above BLOCK_D they are split in chunks, one program per chunk of the
output, each with the whole scores. Full blocks come by pointers or, on Hopper and later where
`llmops tune` found it faster (`DESCRIPTORS` of its configuration), by tensor descriptors, TMA's;
the numbers are the same, the speed is not measured. Few queries over many keys:
`attention_kvcache.py`'s kernels, which divide the keys. 4 Tq Tk D flops per head. Formula:
`_attention_tile.py`.

Dao et al., "FlashAttention", 2022; Dao, "FlashAttention-2", 2023.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from llmops.kernels.triton import _attention_problem
from llmops.kernels.triton import _attention_tile as tile
from llmops.kernels.triton._attention_problem import Problem, heads_like
from llmops.kernels.triton._attention_tile import (
    ADDED_MASK,
    ALIBI,
    BOOL_MASK,
    DROPOUT,
    GENERAL,
    LN2,
    LOG2E,
    NATURAL,
    NEGATIVE,
    SINKS,
    VARLEN,
    block_range,
    dropped,
    key_range,
    modify_scores,
    product,
    rows_of,
    sequence,
    tile_of,
)  # fmt: skip
from llmops.kernels.triton._launch import cdiv, launch
from llmops.kernels.triton.attention_kvcache import attention_kvcache, divides_keys
from torch import Tensor


@triton.jit
def _attend(
    acc, top, total, q_tile, q_rows, q_keep, k_base, v_base, k_t, v_t, begin, end, low, high, query,
    queries, keys, factor, left, right, slope, cap, mask_rows, mask_n, seed, plane, below, part,
    k_tiles, v_tiles, batch, head, start,
    DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, FORM: tl.constexpr, PRECISION: tl.constexpr,
    CUT: tl.constexpr,
):  # fmt: skip
    """The keys [begin, end) in blocks; of cut ones no row outside [low, high) is read. Full ones
    come by the descriptors k_tiles and v_tiles where these are not None."""
    for first in range(begin, end, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        key, held = n[None, :], ((n >= low) & (n < high))[:, None]
        at = n.to(tl.int64)[:, None]
        k_rows = k_base + at * k_t
        if k_tiles is None:
            k_tile = rows_of(k_rows, held, 0, DIM, BLOCK_D, CUT)
        else:
            k_tile = tile_of(k_tiles, batch, head, start + first, 0, BLOCK_N, BLOCK_D)
        s = product(q_tile, q_rows, q_keep, k_tile, k_rows, held, DIM, BLOCK_D, PRECISION)
        if NEGATIVE & FORM:
            s = -s
        s = s * factor
        if CUT or ((BOOL_MASK | ADDED_MASK | ALIBI | tile.SOFTCAP) & FORM):
            s, _derivative = modify_scores(
                s, query, key, queries, keys, left, right, slope, cap, mask_rows, mask_n, FORM, CUT
            )
        new = tl.maximum(top, tl.max(s, 1))
        shift = tl.where(new == -float("inf"), 0.0, new)  # nothing seen yet: not -inf - -inf
        if NATURAL & FORM:
            alpha = tl.exp2((top - shift) * LOG2E)
            p = tl.exp2((s - shift[:, None]) * LOG2E)
        else:
            alpha = tl.exp2(top - shift)
            p = tl.exp2(s - shift[:, None])
        total = total * alpha + tl.sum(p, 1)
        if DROPOUT & FORM:
            p = tl.where(dropped(seed, plane, query, first, below, BLOCK_N, True), 0.0, p)
        if v_tiles is None:
            v_tile = rows_of(v_base + at * v_t, held, part, DIM_V, BLOCK_DV, CUT)
        else:
            v_tile = tile_of(v_tiles, batch, head, start + first, part, BLOCK_N, BLOCK_DV)
        acc = acc * alpha[:, None]
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision=PRECISION)
        top = new
    return acc, top, total


@triton.jit
def attention_fwd_kernel(
    q, k, v, mask, slopes, sinks, seed, cu_q, cu_k, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t,
    mask_b, mask_h, mask_t, mask_n, slope_b, slope_h, heads, group, queries, keys, scale, left,
    right, cap, below, keep_scale,
    out, lse, out_b, out_h, out_t, lse_b, lse_h, blocks, k_tiles, v_tiles,
    DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, FORM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    index, part = tl.program_id(0), tl.program_id(1)
    first = (blocks - 1 - index % blocks) * BLOCK_M
    h, b = (index // blocks % heads).to(tl.int64), (index // blocks // heads).to(tl.int64)
    q_start, queries = sequence(cu_q, b, queries, FORM)
    k_start, keys = sequence(cu_k, b, keys, FORM)
    if first >= queries:
        return
    m = first + tl.arange(0, BLOCK_M)
    query = m[:, None]
    inside = query < queries
    row = q_start + query
    q_rows = q + b * q_b + h * q_h + row * q_t
    q_tile = rows_of(q_rows, inside, 0, DIM, BLOCK_D, True)
    k_base = k + b * k_b + h // group * k_h + k_start * k_t
    v_base = v + b * v_b + h // group * v_h + k_start * v_t
    slope, mask_rows, seed_value = 0.0, mask, 0
    if ALIBI & FORM:
        slope = tl.load(slopes + b * slope_b + h * slope_h)
    if (BOOL_MASK | ADDED_MASK) & FORM:
        mask_rows = mask + b * mask_b + h * mask_h + query.to(tl.int64) * mask_t
    if DROPOUT & FORM:
        seed_value = tl.load(seed)
    factor = tl.abs(scale)
    if not (NATURAL & FORM):
        factor = factor * LOG2E
    plane = (b * heads + h).to(tl.int32)

    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if SINKS & FORM:  # a key of weight exp(sink) and value 0, seen first
        sink = tl.load(sinks + h)
        top = tl.zeros([BLOCK_M], tl.float32) + sink
        total = tl.where(top == -float("inf"), 0.0, 1.0)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    low, full_low, full_high, high = key_range(first, BLOCK_M, queries, keys, left, right, FORM)
    begin, a, z = block_range(low, full_low, full_high, high, BLOCK_N)
    batch, kv_head, start = b.to(tl.int32), (h // group).to(tl.int32), k_start.to(tl.int32)
    if VARLEN & FORM:
        batch = tl.cast(0, tl.int32)  # of one tensor, in which the sequences are
    if GENERAL & FORM:
        z = begin
    else:
        acc, top, total = _attend(
            acc, top, total, q_tile, q_rows, inside, k_base, v_base, k_t, v_t, a, z, low, high,
            query, queries, keys, factor, left, right, slope, cap, mask_rows, mask_n, seed_value,
            plane, below, part, k_tiles, v_tiles, batch, kv_head, start, DIM, DIM_V, BLOCK_M,
            BLOCK_N, BLOCK_D, BLOCK_DV, FORM, PRECISION, False,
        )  # fmt: skip
    acc, top, total = _attend(
        acc, top, total, q_tile, q_rows, inside, k_base, v_base, k_t, v_t, z, high, low, high,
        query, queries, keys, factor, left, right, slope, cap, mask_rows, mask_n, seed_value,
        plane, below, part, None, None, batch, kv_head, start, DIM, DIM_V, BLOCK_M, BLOCK_N,
        BLOCK_D, BLOCK_DV, FORM, PRECISION, True,
    )  # fmt: skip

    nothing = total == 0.0
    inverse = 1.0 / tl.where(nothing, 1.0, total)
    if DROPOUT & FORM:
        inverse = inverse * keep_scale
    if NATURAL & FORM:
        log_sum = top + tl.log(tl.where(nothing, 1.0, total))
    else:
        log_sum = top * LN2 + tl.log(tl.where(nothing, 1.0, total))
    log_sum = tl.where(nothing, -float("inf"), log_sum)
    d = part * BLOCK_DV + tl.arange(0, BLOCK_DV)[None, :]
    value = (acc * inverse[:, None]).to(out.dtype.element_ty)
    tl.store(out + b * out_b + h * out_h + row * out_t + d, value, mask=inside & (d < DIM_V))
    if part == 0:
        tl.store(lse + b * lse_b + h * lse_h + q_start + m, log_sum, mask=m < queries)


# ---- launchers -----------------------------------------------------------------------------------

candidates, entries = _attention_problem.candidates, _attention_problem.entries


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float,
    modifiers: tuple[Any, ...], varlen: tuple[Any, ...] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out = heads_like(q, v.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse
    problem = Problem("attention", q, k, v, mask, causal, scale, modifiers, varlen, False)
    blocks = cdiv(problem.queries, problem.constants["BLOCK_M"])
    grid = (blocks * problem.heads * problem.batch, problem.parts("DIM_V"))
    strides = (*problem.strides(out), *problem.strides(lse)[:2])
    launch(
        attention_fwd_kernel, grid, *problem.arguments, out, lse, *strides, blocks,
        *problem.tiles(), **problem.constants,
    )  # fmt: skip
    return out, lse


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float,
    window_left: int = -1, window_right: int = -1, alibi_slopes: Tensor | None = None,
    softcap: float = 0.0, sinks: Tensor | None = None, dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out [B, Hq, Tq, Dv] laid out as q, lse [B, Hq, Tq] fp32."""
    if mask is None and not dropout_p and divides_keys(q, k, v):
        form = (window_left, window_right, alibi_slopes, softcap, sinks)
        return attention_kvcache(q, k, v, None, None, None, causal, scale, *form)
    modifiers = (window_left, window_right, alibi_slopes, softcap, sinks, dropout_p, seed)
    return forward(q, k, v, mask, causal, scale, modifiers)
