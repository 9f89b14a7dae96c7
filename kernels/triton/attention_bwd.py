"""Attention's gradients. Programs that hold a block of keys sum dK and dV over the queries of a
group of heads; the gradients of an additive mask and of the sinks are computed apart. Blocks that
nothing cuts are summed without a comparison, as forward. dQ has two forms:

- split: programs of a second kernel that hold a block of queries sum it. Seven products of
  2 Tq Tk D flops per head, no atomics, the same bits in every run.
- one pass: the programs that hold keys add their share to dQ, in fp32 and atomically, and a pass
  over dQ scales and rounds it. Five products; the order of the sums, and so the last bits, differ
  from run to run. Only where `llmops tune` found it faster (`ONE_PASS` of its configuration), and
  never under torch.use_deterministic_algorithms(True). Not measured on a GPU yet.

`_attention_bwd_tile.py` has the loops. Formula: `_attention_tile.py`. Dao, 2023.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from llmops.kernels.triton import _attention_problem
from llmops.kernels.triton._attention_bwd_mask import attention_bwd_dmask_kernel
from llmops.kernels.triton._attention_bwd_prepare import attention_prepare_kernel
from llmops.kernels.triton._attention_bwd_tile import (
    add_key_gradients,
    add_query_gradients,
    cut_blocks,
)
from llmops.kernels.triton._attention_problem import Problem, dense, heads_like
from llmops.kernels.triton._attention_tile import (
    ADDED_MASK,
    ALIBI,
    BOOL_MASK,
    DROPOUT,
    GENERAL,
    LEFT,
    LOG2E,
    NATURAL,
    block_range,
    key_range,
    query_range,
    rows_of,
    sequence,
)  # fmt: skip
from llmops.kernels.triton._launch import all_registers, architecture, cdiv, launch
from torch import Tensor


@triton.jit
def attention_bwd_dkdv_kernel(
    q, k, v, mask, slopes, sinks, seed, cu_q, cu_k, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t,
    mask_b, mask_h, mask_t, mask_n, slope_b, slope_h, heads, group, queries, keys, scale, left,
    right, cap, below, keep_scale,
    dout, lse, delta, norm, dk, dv, dq, dout_b, dout_h, dout_t, lse_b, lse_h, dk_b, dk_h, dk_t,
    dv_b, dv_h, dv_t, dq_b, dq_h, dq_t, blocks,
    DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, FORM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq: what is added to in the one-pass form, fp32, without the scale; None in the other."""
    index, part = tl.program_id(0), tl.program_id(1)
    first = index % blocks * BLOCK_N
    kv_heads = heads // group
    g, b = (index // blocks % kv_heads).to(tl.int64), (index // blocks // kv_heads).to(tl.int64)
    q_start, queries = sequence(cu_q, b, queries, FORM)
    k_start, keys = sequence(cu_k, b, keys, FORM)
    if first >= keys:
        return
    n = first + tl.arange(0, BLOCK_N)
    inside = (n < keys)[:, None]
    row = (k_start + n)[:, None]
    k_rows, v_rows = k + b * k_b + g * k_h + row * k_t, v + b * v_b + g * v_h + row * v_t
    low, full_low, full_high, high = query_range(first, BLOCK_N, queries, keys, left, right, FORM)
    seen = inside & (low < high)
    if LEFT & FORM:  # a key before the first query's window is not read: 0 * NaN is NaN
        seen = seen & (n >= keys - queries - left)[:, None]
    k_tile = rows_of(k_rows, seen, 0, DIM, BLOCK_D, True)
    v_tile = rows_of(v_rows, seen, 0, DIM_V, BLOCK_DV, True)
    factor = scale
    if not (NATURAL & FORM):
        factor = factor * LOG2E
    seed_value = 0
    if DROPOUT & FORM:
        seed_value = tl.load(seed)
    dk_sum = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_sum = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    begin, a, z = block_range(low, full_low, full_high, high, BLOCK_M)
    if GENERAL & FORM:
        a, z = begin, begin
    cut = cut_blocks(begin, a, z, high, BLOCK_M)
    for member in range(group):  # the group's sum, in this order
        h = g * group + member
        slope, mask_base, dq_base = 0.0, mask, dq
        if ALIBI & FORM:
            slope = tl.load(slopes + b * slope_b + h * slope_h)
        if (BOOL_MASK | ADDED_MASK) & FORM:
            mask_base = mask + b * mask_b + h * mask_h
        if dq is not None:
            dq_base = dq + b * dq_b + h * dq_h + q_start * dq_t
        q_base = q + b * q_b + h * q_h + q_start * q_t
        g_base = dout + b * dout_b + h * dout_h + q_start * dout_t
        at = b * lse_b + h * lse_h + q_start
        plane = (b * heads + h).to(tl.int32)
        if not (GENERAL & FORM):
            dk_sum, dv_sum = add_key_gradients(
                dk_sum, dv_sum, q_base, g_base, q_t, dout_t, k_tile, k_rows, seen, v_tile, v_rows,
                lse, delta, norm, at, (z - a) // BLOCK_M, begin, a, z, low, high, n, first, queries,
                keys, factor, left, right, slope, cap, mask_base, mask_t, mask_n, seed_value, plane,
                below, keep_scale, dq_base, dq_t, part, DIM, DIM_V, BLOCK_M, BLOCK_N, BLOCK_D,
                BLOCK_DV, FORM, PRECISION, False,
            )  # fmt: skip
        dk_sum, dv_sum = add_key_gradients(
            dk_sum, dv_sum, q_base, g_base, q_t, dout_t, k_tile, k_rows, seen, v_tile, v_rows,
            lse, delta, norm, at, cut, begin, a, z, low, high, n, first, queries, keys, factor,
            left, right, slope, cap, mask_base, mask_t, mask_n, seed_value, plane, below,
            keep_scale, dq_base, dq_t, part, DIM, DIM_V, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, FORM,
            PRECISION, True,
        )  # fmt: skip
    if DROPOUT & FORM:
        dv_sum = dv_sum * keep_scale
    d = part * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    tl.store(dk + b * dk_b + g * dk_h + row * dk_t + d, (dk_sum * scale).to(dk.dtype.element_ty),
             mask=inside & (d < DIM))  # fmt: skip
    d = part * BLOCK_DV + tl.arange(0, BLOCK_DV)[None, :]
    tl.store(dv + b * dv_b + g * dv_h + row * dv_t + d, dv_sum.to(dv.dtype.element_ty),
             mask=inside & (d < DIM_V))  # fmt: skip


@triton.jit
def attention_bwd_dq_kernel(
    q, k, v, mask, slopes, sinks, seed, cu_q, cu_k, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t,
    mask_b, mask_h, mask_t, mask_n, slope_b, slope_h, heads, group, queries, keys, scale, left,
    right, cap, below, keep_scale,
    dout, lse, delta, norm, dq, dout_b, dout_h, dout_t, lse_b, lse_h, dq_b, dq_h, dq_t, blocks,
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
    row = (q_start + m)[:, None]
    at = b * lse_b + h * lse_h + q_start + m
    alive = tl.load(lse + at, mask=m < queries, other=-float("inf")) != -float("inf")
    keep = alive[:, None]
    q_rows = q + b * q_b + h * q_h + row * q_t
    g_rows = dout + b * dout_b + h * dout_h + row * dout_t
    q_tile = rows_of(q_rows, keep, 0, DIM, BLOCK_D, True)
    g_tile = rows_of(g_rows, keep, 0, DIM_V, BLOCK_DV, True)
    factor = scale
    if not (NATURAL & FORM):
        factor = factor * LOG2E
    slope, mask_rows, seed_value = 0.0, mask, 0
    if ALIBI & FORM:
        slope = tl.load(slopes + b * slope_b + h * slope_h)
    if (BOOL_MASK | ADDED_MASK) & FORM:
        mask_rows = mask + b * mask_b + h * mask_h + m.to(tl.int64)[:, None] * mask_t
    if DROPOUT & FORM:
        seed_value = tl.load(seed)
    sums = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    k_base = k + b * k_b + h // group * k_h + k_start * k_t
    v_base = v + b * v_b + h // group * v_h + k_start * v_t
    plane = (b * heads + h).to(tl.int32)
    low, full_low, full_high, high = key_range(first, BLOCK_M, queries, keys, left, right, FORM)
    begin, a, z = block_range(low, full_low, full_high, high, BLOCK_N)
    if GENERAL & FORM:
        a, z = begin, begin
    else:
        sums = add_query_gradients(
            sums, q_tile, q_rows, keep, g_tile, g_rows, k_base, v_base, k_t, v_t, lse, delta, norm,
            at, alive, m, (z - a) // BLOCK_N, begin, a, z, low, high, queries, keys, factor, left,
            right, slope, cap, mask_rows, mask_n, seed_value, plane, below, keep_scale, part, DIM,
            DIM_V, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, FORM, PRECISION, False,
        )  # fmt: skip
    sums = add_query_gradients(
        sums, q_tile, q_rows, keep, g_tile, g_rows, k_base, v_base, k_t, v_t, lse, delta, norm, at,
        alive, m, cut_blocks(begin, a, z, high, BLOCK_N), begin, a, z, low, high, queries, keys,
        factor, left, right, slope, cap, mask_rows, mask_n, seed_value, plane, below, keep_scale,
        part, DIM, DIM_V, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, FORM, PRECISION, True,
    )  # fmt: skip
    d = part * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    tl.store(dq + b * dq_b + h * dq_h + row * dq_t + d, (sums * scale).to(dq.dtype.element_ty),
             mask=(m < queries)[:, None] & (d < DIM))  # fmt: skip


# ---- launchers -----------------------------------------------------------------------------------

candidates, entries = _attention_problem.candidates, _attention_problem.entries


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
    out: Tensor, lse: Tensor, causal: bool, scale: float, need_mask_grad: bool,
    modifiers: tuple[Any, ...], varlen: tuple[Any, ...] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    dq, dk = heads_like(q, q.shape[3]), heads_like(k, k.shape[3])
    dv, sinks = heads_like(v, v.shape[3]), modifiers[4]
    out, dout, lse = dense(out), dense(grad_out), lse.contiguous()
    problem = Problem("attention_bwd", q, k, v, mask, causal, scale, modifiers, varlen, True)
    constants, common = problem.constants, problem.arguments
    delta = torch.empty_like(lse)
    norm = torch.empty_like(lse) if constants["FORM"] & NATURAL.value else None
    dsink = torch.empty_like(lse) if sinks is not None else None
    of_dout, of_lse = problem.strides(dout), problem.strides(lse)[:2]
    of_dlse = (0, 0, 0) if grad_lse is None else problem.strides(grad_lse)
    blocks = cdiv(problem.queries, constants["BLOCK_M"])
    rows = blocks * problem.heads * problem.batch
    if lse.numel():
        launch(
            attention_prepare_kernel, (rows,), *common, out, dout, lse, grad_lse, delta, norm,
            dsink, *problem.strides(out), *of_dout, *of_lse, *of_dlse, blocks, **constants,
        )  # fmt: skip
    shared = (dout, lse, delta, norm)
    parts = problem.parts("DIM", "DIM_V")
    # BLOCK_M is what a program holds, BLOCK_N what it walks: here keys and queries.
    held, walked = constants["BLOCK_M"], constants["BLOCK_N"]
    key_blocks = cdiv(problem.keys, held)
    sums = torch.zeros_like(dq, dtype=torch.float32) if problem.one_pass else None
    if dk.numel() or dv.numel():
        launch(
            attention_bwd_dkdv_kernel, (key_blocks * problem.kv_heads * problem.batch, parts),
            *common, *shared, dk, dv, sums, *of_dout, *of_lse, *problem.strides(dk),
            *problem.strides(dv), *problem.strides(dq), key_blocks,
            **{**constants, "BLOCK_M": walked, "BLOCK_N": held},
        )  # fmt: skip
    if sums is not None:
        torch.mul(sums, scale, out=dq)
    elif dq.numel():
        launch(
            attention_bwd_dq_kernel, (rows, problem.parts("DIM")), *common, *shared, dq, *of_dout,
            *of_lse, *problem.strides(dq), blocks, **constants,
        )  # fmt: skip
    dsinks = None if dsink is None else dsink.sum((0, 2), dtype=torch.float64).float()
    if not need_mask_grad or mask is None:
        return dq, dk, dv, None, dsinks
    dmask = q.new_empty(mask.shape, dtype=torch.float32)
    if dmask.numel():
        constants["BLOCK_N"] = max(constants["BLOCK_N"] // 2, 16)  # its sums take registers too
        if "num_warps" in constants and q.dtype != torch.float32:
            # Four are a warp group: with fewer there is no HGMMA on Hopper, no UTCHMMA after it.
            warps = max(constants["num_warps"] // 2, 4)
            bound = all_registers(warps) if architecture() == "sm120" else {}
            constants |= {"num_warps": warps, **bound}
        sizes = (*(1,) * (4 - mask.dim()), *mask.shape)
        tiles_m = 1 if sizes[2] == 1 else cdiv(sizes[2], constants["BLOCK_M"])
        tiles_n = 1 if sizes[3] == 1 else cdiv(sizes[3], constants["BLOCK_N"])
        launch(
            attention_bwd_dmask_kernel, (sizes[0] * sizes[1] * tiles_m * tiles_n,), *common,
            *shared, dmask, *of_dout, *of_lse, problem.batch, *sizes, tiles_m, tiles_n, **constants,
        )  # fmt: skip
    return dq, dk, dv, dmask, dsinks


def attention_bwd(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
    out: Tensor, lse: Tensor, causal: bool, scale: float, need_mask_grad: bool,
    window_left: int = -1, window_right: int = -1, alibi_slopes: Tensor | None = None,
    softcap: float = 0.0, sinks: Tensor | None = None, dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """dq, dk, dv laid out as q, k, v; dmask and dsinks fp32."""
    modifiers = (window_left, window_right, alibi_slopes, softcap, sinks, dropout_p, seed)
    return backward(grad_out, grad_lse, q, k, v, mask, out, lse, causal, scale, need_mask_grad,
                    modifiers)  # fmt: skip
