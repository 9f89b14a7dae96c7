"""Merging attention over two disjoint sets of keys by their log-sum-exp, and its gradient.

    lse = log(exp(lse_a) + exp(lse_b)),  out = w_a out_a + w_b out_b,  w_x = exp(lse_x - lse)
    dout_x = w_x dout,  dlse_x = w_x (dlse + dout . (out_x - out))

Several rows per program, their elements along the lanes, in blocks where a row is longer than one.
A part that saw no key (lse -inf) weighs nothing, whatever its row holds, and is not read; where
neither saw one: zeros and -inf. fp32 inside, rounded once. 3 accesses per element forward, 5
backward.

Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018, taken over parts.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from llmops.kernels.triton import _config, _rows
from llmops.kernels.triton._launch import cdiv, launch
from llmops.kernels.triton._rows import begin_of
from torch import Tensor


@triton.jit
def _weights(lse_a, lse_b):
    """w_a, w_b and lse; a NaN on either side makes all three NaN."""
    top = tl.maximum(lse_a, lse_b)
    shift = tl.where(top == -float("inf"), 0.0, top)
    a = tl.exp(lse_a - shift)
    b = tl.exp(lse_b - shift)
    total = a + b
    safe = tl.where(total == 0.0, 1.0, total)
    lse = tl.where(total == 0.0, -float("inf"), shift + tl.log(safe))
    return a / safe, b / safe, lse


@triton.jit
def _load(x, at, column, inside, weight):
    """Elements [R, C] in fp32, 0 where the weight [R, 1] of their row is 0."""
    return tl.load(x + at + column, mask=inside & (weight != 0.0), other=0.0).to(tl.float32)


@triton.jit
def merge_attention_fwd_kernel(
    out_a, lse_a, out_b, lse_b, out, lse, rows, n,
    a_b, a_c, a0, a1, a2, la_b, la_c, la0, la1, la2,
    b_b, b_c, b0, b1, b2, lb_b, lb_c, lb0, lb1, lb2,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    held = row < rows
    side_a = tl.load(lse_a + begin_of(row, la_b, la_c, la0, la1, la2), mask=held, other=0.0)
    side_b = tl.load(lse_b + begin_of(row, lb_b, lb_c, lb0, lb1, lb2), mask=held, other=0.0)
    weight_a, weight_b, whole = _weights(side_a, side_b)
    tl.store(lse + row, whole, mask=held)
    at_a = begin_of(row, a_b, a_c, a0, a1, a2)
    at_b = begin_of(row, b_b, b_c, b0, b1, b2)
    for begin in range(0, n, BLOCK):
        column = begin + tl.arange(0, BLOCK)[None, :]
        inside = held & (column < n)
        value = weight_a * _load(out_a, at_a, column, inside, weight_a)
        value += weight_b * _load(out_b, at_b, column, inside, weight_b)
        tl.store(out + row * n + column, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def merge_attention_bwd_kernel(
    grad_out, grad_lse, out_a, lse_a, out_b, lse_b, da, dla, db, dlb, rows, n,
    g_b, g_c, g0, g1, g2, lg_b, lg_c, lg0, lg1, lg2,
    a_b, a_c, a0, a1, a2, la_b, la_c, la0, la1, la2,
    b_b, b_c, b0, b1, b2, lb_b, lb_c, lb0, lb1, lb2,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    held = row < rows
    side_a = tl.load(lse_a + begin_of(row, la_b, la_c, la0, la1, la2), mask=held, other=0.0)
    side_b = tl.load(lse_b + begin_of(row, lb_b, lb_c, lb0, lb1, lb2), mask=held, other=0.0)
    side_g = tl.load(grad_lse + begin_of(row, lg_b, lg_c, lg0, lg1, lg2), mask=held, other=0.0)
    weight_a, weight_b, _ = _weights(side_a, side_b)
    at_g = begin_of(row, g_b, g_c, g0, g1, g2)
    at_a = begin_of(row, a_b, a_c, a0, a1, a2)
    at_b = begin_of(row, b_b, b_c, b0, b1, b2)
    # out = w_a out_a + w_b out_b and w_a + w_b = 1, so out_a - out = w_b (out_a - out_b).
    both = weight_a * weight_b
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    for begin in range(0, n, BLOCK):
        column = begin + tl.arange(0, BLOCK)[None, :]
        inside = held & (column < n)
        g = tl.load(grad_out + at_g + column, mask=inside, other=0.0).to(tl.float32)
        to_a = tl.where(weight_a == 0.0, 0.0, weight_a * g)
        to_b = tl.where(weight_b == 0.0, 0.0, weight_b * g)
        tl.store(da + row * n + column, to_a.to(da.dtype.element_ty), mask=inside)
        tl.store(db + row * n + column, to_b.to(db.dtype.element_ty), mask=inside)
        difference = _load(out_a, at_a, column, inside, both)
        difference -= _load(out_b, at_b, column, inside, both)
        sums += tl.where(both == 0.0, 0.0, g * difference)
    dot = both * tl.sum(sums, 1)[:, None]
    tl.store(dla + row, tl.where(weight_a == 0.0, 0.0, weight_a * side_g + dot), mask=held)
    tl.store(dlb + row, tl.where(weight_b == 0.0, 0.0, weight_b * side_g - dot), mask=held)


# ---- launchers -----------------------------------------------------------------------------------


def _table(n: int, tile: int) -> _config.Config:
    """Not measured yet; from ahead-of-time inspection."""
    block = _rows.block(n, 512)
    return {"ROWS": max(1, min(tile // block, 32)), "BLOCK": block, "num_warps": 4}


def entries(op: str, dtype: torch.dtype) -> Iterator[tuple[_config.Key, _config.Config]]:
    for n in _rows.lengths(512):
        yield (n, dtype), _table(n, 4096 if op == "merge_attention" else 2048)


def candidates(op: str, key: tuple[int, torch.dtype]) -> Iterator[_config.Config]:
    """What `llmops tune` tries beside the table."""
    for block in sorted({min(key[0], size) for size in (128, 256, 512)}):
        for config in _rows.tiles(block, most=1024):
            yield {**config, "BLOCK": block}


def _placed(x: Tensor, dims: int) -> tuple[Tensor, tuple[int, ...]]:
    """A tensor and where its rows, of the last `dims` dimensions, begin."""
    if dims and x.shape[-1] > 1 and x.stride(-1) != 1:
        x = x.contiguous()
    shaped = x if dims else x.unsqueeze(-1)
    found, where, _ = _rows.broadcast(shaped, shaped.shape)
    return found, where


def _all_placed(tensors: tuple[Tensor, ...]) -> tuple[list[Tensor], list[int]]:
    """Of outs and lses in turn: tensors whose rows are found by the strides that follow."""
    placed = [_placed(x, (i + 1) % 2) for i, x in enumerate(tensors)]
    return [x for x, _ in placed], [n for _, where in placed for n in where]


def merge_attention(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    """out_x [..., D], lse_x [...] fp32; out and lse are contiguous."""
    out, lse = _rows.contiguous_like(out_a), _rows.contiguous_like(lse_a)
    rows, n = lse.numel(), out.shape[-1]
    if rows == 0:
        return out, lse
    config = _config.choose("merge_attention", (_rows.power_of_2(n), out.dtype), _table(n, 4096))
    tensors, where = _all_placed((out_a, lse_a, out_b, lse_b))
    grid = (cdiv(rows, config["ROWS"]),)
    launch(merge_attention_fwd_kernel, grid, *tensors, out, lse, rows, n, *where, **config)
    return out, lse


def merge_attention_bwd(
    grad_out: Tensor, grad_lse: Tensor, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dout_a, dlse_a, dout_b, dlse_b, contiguous."""
    results = tuple(_rows.contiguous_like(x) for x in (out_a, lse_a, out_b, lse_b))
    rows, n = lse_a.numel(), out_a.shape[-1]
    if rows == 0:
        return results  # type: ignore[return-value]
    key = (_rows.power_of_2(n), out_a.dtype)
    config = _config.choose("merge_attention_bwd", key, _table(n, 2048))
    tensors, where = _all_placed((grad_out, grad_lse, out_a, lse_a, out_b, lse_b))
    grid = (cdiv(rows, config["ROWS"]),)
    launch(merge_attention_bwd_kernel, grid, *tensors, *results, rows, n, *where, **config)
    return results  # type: ignore[return-value]
