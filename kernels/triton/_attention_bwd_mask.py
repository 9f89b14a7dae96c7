"""The gradient of attention's additive mask: dS of a tile of it, summed over what the mask
broadcasts along. Formula: `_attention_tile.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from llmops.kernels.triton._attention_bwd_tile import gradients
from llmops.kernels.triton._attention_tile import ALIBI, DROPOUT, key_range, rows_of


@triton.jit
def attention_bwd_dmask_kernel(
    q, k, v, mask, slopes, sinks, seed, cu_q, cu_k, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t,
    mask_b, mask_h, mask_t, mask_n, slope_b, slope_h, heads, group, queries, keys, scale, left,
    right, cap, below, keep_scale,
    dout, lse, delta, norm, dmask, dout_b, dout_h, dout_t, lse_b, lse_h, batches, size_b, size_h,
    size_m, size_n, tiles_m, tiles_n,
    DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, FORM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of the mask: dS summed over what the mask broadcasts along, in a fixed order."""
    index = tl.program_id(0)
    tile_n, tile_m = index % tiles_n, index // tiles_n % tiles_m
    mh, mb = index // tiles_n // tiles_m % size_h, index // tiles_n // tiles_m // size_h
    b0, b1, h0, h1 = 0, batches, 0, heads
    if size_b > 1:
        b0, b1 = mb, mb + 1
    if size_h > 1:
        h0, h1 = mh, mh + 1
    m0, m1, n0, n1 = 0, queries, 0, keys
    if size_m > 1:
        m0, m1 = tile_m * BLOCK_M, tl.minimum(tile_m * BLOCK_M + BLOCK_M, queries)
    if size_n > 1:
        n0, n1 = tile_n * BLOCK_N, tl.minimum(tile_n * BLOCK_N + BLOCK_N, keys)
    factor = scale
    seed_value = 0
    if DROPOUT & FORM:
        seed_value = tl.load(seed)
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for bi in range(b0, b1):
        b = tl.cast(bi, tl.int64)
        for hi in range(h0, h1):
            h = tl.cast(hi, tl.int64)
            if ALIBI & FORM:
                slope = tl.load(slopes + b * slope_b + h * slope_h)
            else:
                slope = 0.0
            for start_m in range(m0, m1, BLOCK_M):
                m = start_m + tl.arange(0, BLOCK_M)
                at = b * lse_b + h * lse_h + m
                alive = tl.load(lse + at, mask=m < queries, other=-float("inf")) != -float("inf")
                keep, row = alive[:, None], m.to(tl.int64)[:, None]
                q_rows, g_rows = (
                    q + b * q_b + h * q_h + row * q_t,
                    dout + b * dout_b + h * dout_h + row * dout_t,
                )
                q_tile = rows_of(q_rows, keep, 0, DIM, BLOCK_D, True)
                g_tile = rows_of(g_rows, keep, 0, DIM_V, BLOCK_DV, True)
                mask_rows = mask + b * mask_b + h * mask_h + row * mask_t
                low, _, _, high = key_range(start_m, BLOCK_M, queries, keys, left, right, FORM)
                for start in range(
                    tl.maximum(n0, low // BLOCK_N * BLOCK_N), tl.minimum(n1, high), BLOCK_N
                ):
                    n = start + tl.arange(0, BLOCK_N)
                    held, column = ((n >= low) & (n < high))[:, None], n.to(tl.int64)[:, None]
                    k_rows = k + b * k_b + h // group * k_h + column * k_t
                    v_rows = v + b * v_b + h // group * v_h + column * v_t
                    k_tile = rows_of(k_rows, held, 0, DIM, BLOCK_D, True)
                    v_tile = rows_of(v_rows, held, 0, DIM_V, BLOCK_DV, True)
                    _p, ds, _dx = gradients(
                        q_tile, q_rows, keep, k_tile, k_rows, held, g_tile, g_rows, v_tile, v_rows,
                        lse, delta, norm, at, alive, m, n, start, queries, keys, factor, left,
                        right, slope, cap, mask_rows, mask_n, seed_value,
                        (b * heads + h).to(tl.int32), below, keep_scale, DIM, DIM_V, BLOCK_M,
                        BLOCK_N, BLOCK_D, BLOCK_DV, FORM, PRECISION, True, True,
                    )  # fmt: skip
                    sums += ds
    i, j = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
    if size_m == 1:
        sums = tl.where(i == 0, tl.sum(sums, 0)[None, :], 0.0)
    if size_n == 1:
        sums = tl.where(j == 0, tl.sum(sums, 1)[:, None], 0.0)
    i, j = tile_m * BLOCK_M + i, tile_n * BLOCK_N + j
    plane = (mb * size_h + mh).to(tl.int64)
    tl.store(dmask + (plane * size_m + i) * size_n + j, sums, mask=(i < size_m) & (j < size_n))
