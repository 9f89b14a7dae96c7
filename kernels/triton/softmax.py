"""Softmax of scaled, masked logits along rows, and its gradient.

    y = exp(z - max z) / sum exp(z - max z),  z = scale x + mask
    dx = scale y (dy - sum y dy)

A row of up to LONGEST elements stays in registers, several short rows in one program: x is read
once and y written once. A longer row is looped over in blocks: running maximum and sum first, then
the result, so x is read twice, the second time mostly from the cache. Masked and causally dropped
elements are not loaded. fp32 inside, rounded once. 2 accesses per element forward, 3 backward.

Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from llmops.kernels.triton import _config, _rows
from llmops.kernels.triton._launch import all_registers, architecture, cdiv, launch
from llmops.kernels.triton._rows import begin_of
from torch import Tensor

NO_MASK, BOOL_MASK, ADDED_MASK = 0, 1, 2


@triton.jit
def _logits(
    x, mask, row, column, rows, n, x_row, scale, queries, size_b, size_c, mask_a, mask_b, mask_c,
    mask_n, MASK: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """z of rows `row` [R, 1] and columns `column` [1, C]; -inf where there is nothing."""
    keep = (row < rows) & (column < n)
    if CAUSAL:
        keep = keep & (column <= row % queries + (n - queries))
    if MASK != 0:
        m = mask + begin_of(row, size_b, size_c, mask_a, mask_b, mask_c)
        m += column.to(tl.int64) * mask_n
        if MASK == 1:
            keep = keep & (tl.load(m, mask=keep, other=0) != 0)
    z = tl.load(x + row * x_row + column, mask=keep, other=0.0).to(tl.float32) * scale
    if MASK == 2:
        z += tl.load(m, mask=keep, other=0.0).to(tl.float32)
    return tl.where(keep, z, -float("inf"))


@triton.jit
def softmax_fwd_kernel(
    x, y, mask, rows, n, x_row, scale, queries, size_b, size_c, mask_a, mask_b, mask_c, mask_n,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS rows [ROWS, BLOCK] of at most BLOCK elements each, in registers."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    z = _logits(x, mask, row, column, rows, n, x_row, scale, queries, size_b, size_c,
                mask_a, mask_b, mask_c, mask_n, MASK, CAUSAL)  # fmt: skip
    top = tl.max(z, 1)[:, None]
    if MASK != 0 or CAUSAL:  # nothing left in a row: zeros, and not -inf - -inf
        top = tl.where(top == -float("inf"), 0.0, top)
    e = tl.exp(z - top)
    total = tl.sum(e, 1)[:, None]
    if MASK != 0 or CAUSAL:
        total = tl.where(total == 0.0, 1.0, total)
    tl.store(
        y + row * n + column,
        (e / total).to(y.dtype.element_ty),
        mask=(row < rows) & (column < n),
    )


@triton.jit
def softmax_fwd_long_kernel(
    x, y, mask, rows, n, x_row, scale, queries, size_b, size_c, mask_a, mask_b, mask_c, mask_n,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row, in blocks: each lane keeps its own maximum and sum, joined at the end."""
    row = tl.program_id(0).to(tl.int64)[None, None]
    first = tl.arange(0, BLOCK)[None, :]
    top = tl.full([1, BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([1, BLOCK], tl.float32)
    for begin in range(0, n, BLOCK):
        z = _logits(x, mask, row, begin + first, rows, n, x_row, scale, queries, size_b, size_c,
                    mask_a, mask_b, mask_c, mask_n, MASK, CAUSAL)  # fmt: skip
        new = tl.maximum(top, z)
        # A lane that has seen nothing, or only -inf, adds nothing; a NaN z makes its lane NaN.
        shift = tl.where(new == -float("inf"), 0.0, new)
        total = total * tl.exp(top - shift) + tl.exp(z - shift)
        top = new
    row_top = tl.max(top, 1)[:, None]
    lane = tl.where(top == -float("inf"), 0.0, total * tl.exp(top - row_top))
    # A row with a NaN is NaN even where its lane's maximum went on without it.
    row_total = tl.sum(tl.where(total != total, total, lane), 1)[:, None]
    if MASK != 0 or CAUSAL:
        row_top = tl.where(row_top == -float("inf"), 0.0, row_top)
        row_total = tl.where(row_total == 0.0, 1.0, row_total)
    for begin in range(0, n, BLOCK):
        column = begin + first
        z = _logits(x, mask, row, column, rows, n, x_row, scale, queries, size_b, size_c,
                    mask_a, mask_b, mask_c, mask_n, MASK, CAUSAL)  # fmt: skip
        e = tl.exp(z - row_top) / row_total
        tl.store(y + row * n + column, e.to(y.dtype.element_ty), mask=column < n)


@triton.jit
def softmax_bwd_kernel(
    dy, y, dx, rows, n, dy_row, y_row, scale, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < n)
    g = tl.load(dy + row * dy_row + column, mask=inside, other=0.0).to(tl.float32)
    p = tl.load(y + row * y_row + column, mask=inside, other=0.0).to(tl.float32)
    dot = tl.sum(g * p, 1)[:, None]
    tl.store(dx + row * n + column, (scale * p * (g - dot)).to(dx.dtype.element_ty), mask=inside)


@triton.jit
def softmax_bwd_long_kernel(dy, y, dx, n, dy_row, y_row, scale, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    first = tl.arange(0, BLOCK)
    dots = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, n, BLOCK):
        column = begin + first
        g = tl.load(dy + row * dy_row + column, mask=column < n, other=0.0).to(tl.float32)
        dots += g * tl.load(y + row * y_row + column, mask=column < n, other=0.0).to(tl.float32)
    dot = tl.sum(dots, 0)
    for begin in range(0, n, BLOCK):
        column = begin + first
        g = tl.load(dy + row * dy_row + column, mask=column < n, other=0.0).to(tl.float32)
        p = tl.load(y + row * y_row + column, mask=column < n, other=0.0).to(tl.float32)
        value = (scale * p * (g - dot)).to(dx.dtype.element_ty)
        tl.store(dx + row * n + column, value, mask=column < n)


# ---- launchers -----------------------------------------------------------------------------------


def _table(n: int, masked: bool = False) -> _config.Config:
    """Block and warps of a long row: from ahead-of-time inspection, but for Hopper. There 32 warps
    leave a processor one row, whose second reading comes from the cache more often: 1.1 times as
    fast on an H100, both ways (rows of 65536 in bf16). A mask takes more than their registers."""
    if n <= _rows.LONGEST:
        return _rows.tile(n)
    if architecture() == "sm90" and not masked:
        return {"BLOCK": 16384, "num_warps": 32}
    # On sm_120 ptxas holds 16 elements to a thread in 64 registers, and spills.
    return {"BLOCK": 4096 if architecture() == "sm120" else 8192, "num_warps": 16}


def entries(op: str, dtype: torch.dtype) -> Iterator[tuple[_config.Key, _config.Config]]:
    for n in _rows.lengths():
        for masked in (False, True)[: 1 if op == "softmax_bwd" else 2]:
            yield (n, dtype), _table(n, masked)


def candidates(op: str, key: tuple[int, torch.dtype]) -> Iterator[_config.Config]:
    """What `llmops tune` tries beside the table, for the forward and for the backward."""
    if key[0] <= _rows.LONGEST:
        yield from _rows.tiles(key[0])
        return
    # With 32 warps one row is in flight on a processor: its second reading may come from the cache.
    for block in (4096, 8192, 16384):
        for warps in (8, 16, 32):
            yield {"BLOCK": block, "num_warps": warps}


def softmax(
    x: Tensor,
    scale: float = 1.0,
    mask: Tensor | None = None,
    causal: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """x [..., n], mask broadcastable to it, bool or added; y is contiguous."""
    y = _rows.contiguous_like(x, dtype)
    n = x.shape[-1]
    source = _rows.as_rows(x)
    rows = source.shape[0]
    if y.numel() == 0:
        return y
    kind, where, last = NO_MASK, (1, 1, 0, 0, 0), 0
    if mask is not None:
        kind = BOOL_MASK if mask.dtype == torch.bool else ADDED_MASK
        mask, where, last = _rows.broadcast(mask, x.shape)
    config = _config.choose("softmax", (_rows.power_of_2(n), x.dtype), _table(n, mask is not None))
    queries = x.shape[-2] if causal else 1
    arguments = (source, y, mask, rows, n, source.stride(0), scale, queries, *where, last)
    if "ROWS" in config:
        grid = (cdiv(rows, config["ROWS"]),)
        # Told none, ptxas spills where rows share a bool mask.
        bound = all_registers(config["num_warps"]) if kind == BOOL_MASK else {}
        launch(softmax_fwd_kernel, grid, *arguments, MASK=kind, CAUSAL=causal, **config, **bound)
    else:
        launch(softmax_fwd_long_kernel, (rows,), *arguments, MASK=kind, CAUSAL=causal, **config)
    return y


def softmax_bwd(grad: Tensor, y: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """dx [..., n] in `dtype`, contiguous."""
    dx = _rows.contiguous_like(y, dtype)
    n = y.shape[-1]
    dy, y = _rows.as_rows(grad), _rows.as_rows(y)
    rows = y.shape[0]
    if dx.numel() == 0:
        return dx
    config = _config.choose("softmax_bwd", (_rows.power_of_2(n), dtype), _table(n))
    if "ROWS" in config:
        grid = (cdiv(rows, config["ROWS"]),)
        arguments = (dy, y, dx, rows, n, dy.stride(0), y.stride(0), scale)
        launch(softmax_bwd_kernel, grid, *arguments, **config)
    else:
        arguments = (dy, y, dx, n, dy.stride(0), y.stride(0), scale)
        launch(softmax_bwd_long_kernel, (rows,), *arguments, **config)
    return dx
