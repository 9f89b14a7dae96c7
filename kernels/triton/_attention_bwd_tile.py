"""The tiles of attention's backward: P and dS of one, and the sums over a run of them for a block
of keys or of queries. Formula and modifiers: `_attention_tile.py`.

A run is whole (CUT False: nothing is compared, no load is masked) or cut by causality, a window or
an end. `cut_block` walks over the cut ones on both sides of the whole, as one loop: the code of a
tile is there twice and not three times.
"""

from __future__ import annotations

import triton
import triton.language as tl
from llmops.kernels.triton._attention_tile import (
    ADDED_MASK,
    BOOL_MASK,
    DROPOUT,
    LOG2E,
    NATURAL,
    dropped,
    modify_scores,
    product,
    rows_of,
    weights_and_gradients,
)  # fmt: skip


@triton.jit
def cut_block(i, begin, a, z, BLOCK: tl.constexpr):
    """Where the i-th of the cut blocks begins, those of [begin, a) and from z on. Where a is the
    end of all, inside a block, so is z."""
    before = (a - begin + BLOCK - 1) // BLOCK
    return tl.where(i < before, begin + i * BLOCK, z + (i - before) * BLOCK)


@triton.jit
def cut_blocks(begin, a, z, end, BLOCK: tl.constexpr):
    """How many there are."""
    return (a - begin + BLOCK - 1) // BLOCK + tl.maximum(end - z + BLOCK - 1, 0) // BLOCK


@triton.jit
def chunk_of(part, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """The chunk of a dimension that a program loads: there may be more programs than it has chunks,
    as the other dimension is the wider. Those load the last, and store nothing of it."""
    if DIM <= BLOCK:
        return 0
    else:
        return tl.minimum(part, (DIM - 1) // BLOCK)


@triton.jit
def gradients(
    q_tile, q_rows, q_keep, k_tile, k_rows, held, g_tile, g_rows, v_tile, v_rows, lse, delta, norm,
    at, alive, m, n, start, queries, keys, factor, left, right, slope, cap, mask_rows, mask_n, seed,
    plane, below, keep_scale,
    DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, FORM: tl.constexpr, PRECISION: tl.constexpr,
    QUERIES_IN_ROWS: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """P and dS of a tile, [M, N] or [N, M]; the rows' lse, delta and norm are loaded here."""
    if CUT or QUERIES_IN_ROWS:
        log_sum = tl.load(lse + at, mask=alive, other=float("inf"))
        d = tl.load(delta + at, mask=alive, other=0.0)
    else:
        log_sum = tl.load(lse + at)
        d = tl.load(delta + at)
    log_sum = tl.where(log_sum == -float("inf"), float("inf"), log_sum)
    if not (NATURAL & FORM):
        log_sum = log_sum * LOG2E
    w = d
    if NATURAL & FORM:
        w = tl.load(norm + at, mask=alive, other=0.0)
    if QUERIES_IN_ROWS:
        s = product(q_tile, q_rows, q_keep, k_tile, k_rows, held, DIM, BLOCK_D, PRECISION)
        dp = product(g_tile, g_rows, q_keep, v_tile, v_rows, held, DIM_V, BLOCK_DV, PRECISION)
        query, key, log_sum, d, w = m[:, None], n[None, :], log_sum[:, None], d[:, None], w[:, None]
    else:
        s = product(k_tile, k_rows, held, q_tile, q_rows, q_keep, DIM, BLOCK_D, PRECISION)
        dp = product(v_tile, v_rows, held, g_tile, g_rows, q_keep, DIM_V, BLOCK_DV, PRECISION)
        query, key, log_sum, d, w = m[None, :], n[:, None], log_sum[None, :], d[None, :], w[None, :]
    s, derivative = modify_scores(s * factor, query, key, queries, keys, left, right, slope, cap,
                                  mask_rows, mask_n, FORM, CUT)  # fmt: skip
    drop = s
    if DROPOUT & FORM:
        drop = dropped(seed, plane, query, start, below, BLOCK_N, QUERIES_IN_ROWS)
    return weights_and_gradients(s, dp, log_sum, d, w, drop, keep_scale, derivative, FORM)


@triton.jit
def add_key_gradients(
    dk_sum, dv_sum, q_base, g_base, q_t, dout_t, k_tile, k_rows, seen, v_tile, v_rows, lse, delta,
    norm, at_base, blocks, begin, a, z, low, high, n, first, queries, keys, factor, left, right,
    slope, cap, mask_base, mask_t, mask_n, seed, plane, below, keep_scale, dq_base, dq_t, part,
    DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, FORM: tl.constexpr, PRECISION: tl.constexpr,
    CUT: tl.constexpr,
):  # fmt: skip
    """What `blocks` blocks of queries add to dK and dV of a block of keys: the cut ones, or the
    whole ones from a on. Keys beyond the end get sums that nobody stores. And, where dq_base is not
    None, what the keys add to dQ of those queries, in memory."""
    chunk, chunk_v = chunk_of(part, DIM, BLOCK_D), chunk_of(part, DIM_V, BLOCK_DV)
    for i in range(blocks):
        if CUT:
            start = cut_block(i, begin, a, z, BLOCK_M)
        else:
            start = a + i * BLOCK_M
        m = start + tl.arange(0, BLOCK_M)
        at = at_base + m
        alive = m < high
        if CUT:
            # A row without a key has no gradient, whatever its q and dout hold (0 * NaN is NaN).
            alive = alive & (m >= low) & (
                tl.load(lse + at, mask=alive, other=0.0) != -float("inf"))  # fmt: skip
        keep = alive[:, None]
        row = m.to(tl.int64)[:, None]
        q_rows, g_rows = q_base + row * q_t, g_base + row * dout_t
        if (BOOL_MASK | ADDED_MASK) & FORM:
            mask_rows = mask_base + m.to(tl.int64)[None, :] * mask_t
        else:
            mask_rows = mask_base
        q_tile = rows_of(q_rows, keep, chunk, DIM, BLOCK_D, CUT)
        g_tile = rows_of(g_rows, keep, chunk_v, DIM_V, BLOCK_DV, CUT)
        p, _ds, dx = gradients(
            q_tile, q_rows, keep, k_tile, k_rows, seen, g_tile, g_rows, v_tile, v_rows, lse,
            delta, norm, at, alive, m, n, first, queries, keys, factor, left, right, slope, cap,
            mask_rows, mask_n, seed, plane, below, keep_scale, DIM, DIM_V, BLOCK_M, BLOCK_N,
            BLOCK_D, BLOCK_DV, FORM, PRECISION, False, CUT,
        )  # fmt: skip
        dv_sum = tl.dot(p.to(g_tile.dtype), g_tile, dv_sum, input_precision=PRECISION)
        dx = dx.to(q_tile.dtype)
        dk_sum = tl.dot(dx, q_tile, dk_sum, input_precision=PRECISION)
        if dq_base is not None:
            own = k_tile
            if DIM > BLOCK_D:
                own = rows_of(k_rows, seen, chunk, DIM, BLOCK_D, True)
            step = tl.dot(tl.trans(dx), own, input_precision=PRECISION)
            d = part * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
            tl.atomic_add(dq_base + row * dq_t + d, step, mask=keep & (d < DIM), sem="relaxed")
    return dk_sum, dv_sum


@triton.jit
def add_query_gradients(
    sums, q_tile, q_rows, keep, g_tile, g_rows, k_base, v_base, k_t, v_t, lse, delta, norm, at,
    alive, m, blocks, begin, a, z, low, high, queries, keys, factor, left, right, slope, cap,
    mask_rows, mask_n, seed, plane, below, keep_scale, part,
    DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, FORM: tl.constexpr, PRECISION: tl.constexpr,
    CUT: tl.constexpr,
):  # fmt: skip
    """The same for dQ of a block of queries, whose rows' numbers are masked in either case."""
    for i in range(blocks):
        if CUT:
            start = cut_block(i, begin, a, z, BLOCK_N)
        else:
            start = a + i * BLOCK_N
        n = start + tl.arange(0, BLOCK_N)
        held = ((n >= low) & (n < high))[:, None]
        row = n.to(tl.int64)[:, None]
        k_rows, v_rows = k_base + row * k_t, v_base + row * v_t
        k_tile = rows_of(k_rows, held, part, DIM, BLOCK_D, CUT)
        v_tile = rows_of(v_rows, held, 0, DIM_V, BLOCK_DV, CUT)
        _p, _ds, dx = gradients(
            q_tile, q_rows, keep, k_tile, k_rows, held, g_tile, g_rows, v_tile, v_rows, lse, delta,
            norm, at, alive, m, n, start, queries, keys, factor, left, right, slope, cap, mask_rows,
            mask_n, seed, plane, below, keep_scale, DIM, DIM_V, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
            FORM, PRECISION, True, CUT,
        )  # fmt: skip
        sums = tl.dot(dx.to(k_tile.dtype), k_tile, sums, input_precision=PRECISION)
    return sums
