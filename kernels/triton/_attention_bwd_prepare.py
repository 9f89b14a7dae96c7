"""What attention's backward needs of each query before its products: delta, and where lse cannot
tell it, what is left to multiply the weights by; the sinks' gradient, which comes with them.
Formula: `_attention_tile.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from llmops.kernels.triton._attention_tile import (
    ADDED_MASK,
    ALIBI,
    BOOL_MASK,
    LOG2E,
    NATURAL,
    SINKS,
    key_range,
    modify_scores,
    product,
    rows_of,
    sequence,
)  # fmt: skip


@triton.jit
def attention_prepare_kernel(
    q, k, v, mask, slopes, sinks, seed, cu_q, cu_k, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t,
    mask_b, mask_h, mask_t, mask_n, slope_b, slope_h, heads, group, queries, keys, scale, left,
    right, cap, below, keep_scale,
    out, dout, lse, dlse, delta, norm, dsink, out_b, out_h, out_t, dout_b, dout_h, dout_t, lse_b,
    lse_h, dlse_b, dlse_h, dlse_t, blocks,
    DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, FORM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """delta = dout . out - dlse; norm, what is left to multiply P by: 1, unless lse is too large to
    resolve the sum it holds beside the maximum, as where all keys got the lowest number."""
    index = tl.program_id(0)
    first = index % blocks * BLOCK_M
    h, b = (index // blocks % heads).to(tl.int64), (index // blocks // heads).to(tl.int64)
    q_start, queries = sequence(cu_q, b, queries, FORM)
    k_start, keys = sequence(cu_k, b, keys, FORM)
    if first >= queries:
        return
    m = first + tl.arange(0, BLOCK_M)
    query = m[:, None]
    row = q_start + query
    at = b * lse_b + h * lse_h + q_start + m
    log_sum = tl.load(lse + at, mask=m < queries, other=-float("inf"))
    alive = log_sum != -float("inf")
    dots = tl.zeros([BLOCK_M], tl.float32)
    for part in range((DIM_V + BLOCK_DV - 1) // BLOCK_DV):
        o = rows_of(out + b * out_b + h * out_h + row * out_t, alive[:, None], part, DIM_V,
                    BLOCK_DV, True)  # fmt: skip
        g = rows_of(dout + b * dout_b + h * dout_h + row * dout_t, alive[:, None], part, DIM_V,
                    BLOCK_DV, True)  # fmt: skip
        dots += tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
    if dlse is not None:
        dots -= tl.load(dlse + b * dlse_b + h * dlse_h + (q_start + m) * dlse_t, mask=alive,
                        other=0.0)  # fmt: skip
    tl.store(delta + at, dots, mask=m < queries)
    if NATURAL & FORM:
        lost = tl.where(alive & (tl.abs(log_sum) > 1024.0), 1, 0)
        weight = tl.full([BLOCK_M], 1.0, tl.float32)
        if tl.max(lost, 0) > 0:
            q_rows = q + b * q_b + h * q_h + row * q_t
            q_tile = rows_of(q_rows, alive[:, None], 0, DIM, BLOCK_D, True)
            k_base = k + b * k_b + h // group * k_h + k_start * k_t
            slope, mask_rows = 0.0, mask
            if ALIBI & FORM:
                slope = tl.load(slopes + b * slope_b + h * slope_h)
            if (BOOL_MASK | ADDED_MASK) & FORM:
                mask_rows = mask + b * mask_b + h * mask_h + query.to(tl.int64) * mask_t
            total = tl.zeros([BLOCK_M], tl.float32)
            if SINKS & FORM:
                total = tl.exp2((tl.load(sinks + h) - log_sum) * LOG2E)
            low, _, _, high = key_range(first, BLOCK_M, queries, keys, left, right, FORM)
            for start in range(low // BLOCK_N * BLOCK_N, high, BLOCK_N):
                n = start + tl.arange(0, BLOCK_N)
                held = ((n >= low) & (n < high))[:, None]
                k_rows = k_base + n.to(tl.int64)[:, None] * k_t
                k_tile = rows_of(k_rows, held, 0, DIM, BLOCK_D, True)
                s = product(q_tile, q_rows, alive[:, None], k_tile, k_rows, held, DIM, BLOCK_D,
                            PRECISION)  # fmt: skip
                s, _derivative = modify_scores(s * scale, query, n[None, :], queries, keys, left,
                                     right, slope, cap, mask_rows, mask_n, FORM, True)  # fmt: skip
                total += tl.sum(tl.exp2((s - log_sum[:, None]) * LOG2E), 1)
            weight = tl.where(alive & (total > 0.0), 1.0 / total, 0.0)
        tl.store(norm + at, weight, mask=m < queries)
        if SINKS & FORM:
            sink = tl.exp2((tl.load(sinks + h) - log_sum) * LOG2E) * weight
            tl.store(dsink + at, tl.where(alive, -sink * dots, 0.0), mask=m < queries)
