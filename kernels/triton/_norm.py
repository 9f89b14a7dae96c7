"""RMS norm and layer norm along rows, with the residual addition before them. Their gradients:
`_norm_bwd.py`.

    d = h - mean(h) (layer norm) or h,  h = x + residual as rounded to its dtype
    z = d rstd,  rstd = 1 / sqrt(mean(d^2) + eps),  y = z (weight + offset) + bias

A row of up to LONGEST elements stays in registers, several short rows in one program; a
longer one is swept twice, the second time mostly from the cache.

The mean of a row with mean 25,000 is off by more than a small deviation: all sums are of h less a
first mean, and the second, small one corrects it. fp32 inside, rounded once. Accesses per element:
2 (4 with a residual).

Ba, Kiros and Hinton, "Layer Normalization", 2016; Zhang and Sennrich, "Root Mean Square Layer
Normalization", 2019.
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
def _summed(x, residual, h, at_x, at_residual, inside):
    """h = x + residual as its dtype holds it, in fp32; 0 outside."""
    value = tl.load(x + at_x, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        value += tl.load(residual + at_residual, mask=inside, other=0.0).to(tl.float32)
        value = value.to(h.dtype.element_ty).to(tl.float32)
    return value


@triton.jit
def scaled(weight, column, n, offset):
    """weight + offset at the columns; weight is there."""
    return tl.load(weight + column, mask=column < n, other=0.0).to(tl.float32) + offset


@triton.jit
def rstd_of(square, eps):
    return 1.0 / tl.sqrt_rn(square + eps)


@triton.jit
def deviations(h, inside, n, eps, CENTERED: tl.constexpr):
    """d [ROWS, BLOCK], 0 outside, and rstd [ROWS, 1]."""
    d = h
    if CENTERED:
        d = tl.where(inside, h - tl.sum(h, 1)[:, None] / n, 0.0)
        left = tl.sum(d, 1)[:, None] / n  # the first mean's rounding
        square = tl.sum(d * d, 1)[:, None] / n - left * left
        d = tl.where(inside, d - left, 0.0)
        square = tl.maximum(square, 0.0)
    else:
        square = tl.sum(d * d, 1)[:, None] / n
    return d, rstd_of(square, eps)


@triton.jit
def norm_fwd_kernel(
    x, residual, weight, bias, y, h, rows, n, x_row, residual_row, eps, offset,
    CENTERED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS rows [ROWS, BLOCK] of at most BLOCK elements each, in registers."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < n)
    value = _summed(x, residual, h, row * x_row + column, row * residual_row + column, inside)
    if h is not None:
        tl.store(h + row * n + column, value.to(h.dtype.element_ty), mask=inside)
    d, rstd = deviations(value, inside, n, eps, CENTERED)
    out = d * rstd
    if weight is not None:
        out = out * scaled(weight, column, n, offset)
    if bias is not None:
        out += scaled(bias, column, n, 0.0)
    tl.store(y + row * n + column, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _long_sums(x, residual, h, row, n, x_row, residual_row, shift, BLOCK: tl.constexpr):
    """The means of d and d^2 over a row, d = h - shift."""
    first = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float32)
    squares = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, n, BLOCK):
        column = begin + first
        inside = column < n
        at_x, at_residual = row * x_row + column, row * residual_row + column
        value = _summed(x, residual, h, at_x, at_residual, inside)
        d = tl.where(inside, value - shift, 0.0)
        sums += d
        squares += d * d
    return tl.sum(sums, 0) / n, tl.sum(squares, 0) / n


@triton.jit
def norm_fwd_long_kernel(
    x, residual, weight, bias, y, h, rows, n, x_row, residual_row, eps, offset,
    CENTERED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row, in blocks. Layer norm's sums are of h less the mean of the first block; where the
    row begins unlike itself they are taken again."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.arange(0, BLOCK)
    shift = 0.0
    if CENTERED:
        at_x, at_residual = row * x_row + first, row * residual_row + first
        value = _summed(x, residual, h, at_x, at_residual, first < n)
        shift = tl.sum(value, 0) / tl.minimum(n, BLOCK)
    left, square = _long_sums(x, residual, h, row, n, x_row, residual_row, shift, BLOCK)
    if CENTERED:
        if left * left > 16.0 * (square - left * left):
            shift += left
            left, square = _long_sums(x, residual, h, row, n, x_row, residual_row, shift, BLOCK)
        square = tl.maximum(square - left * left, 0.0)
    rstd = rstd_of(square, eps)
    for begin in range(0, n, BLOCK):
        column = begin + first
        inside = column < n
        at_x, at_residual = row * x_row + column, row * residual_row + column
        value = _summed(x, residual, h, at_x, at_residual, inside)
        if h is not None:
            tl.store(h + row * n + column, value.to(h.dtype.element_ty), mask=inside)
        if CENTERED:
            value = value - shift - left
        out = value * rstd
        if weight is not None:
            out = out * scaled(weight, column, n, offset)
        if bias is not None:
            out += scaled(bias, column, n, 0.0)
        tl.store(y + row * n + column, out.to(y.dtype.element_ty), mask=inside)


# ---- launchers -----------------------------------------------------------------------------------

LOOPED: _config.Config = {"BLOCK": 2048, "num_warps": 8}


def _table(n: int) -> _config.Config:
    return LOOPED if n > _rows.LONGEST else _rows.tile(n, per_thread=16)


def flat(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.contiguous().view(-1)


def entries(op: str, dtype: torch.dtype) -> Iterator[tuple[_config.Key, _config.Config]]:
    for n in _rows.lengths():
        yield (n, dtype), _table(n)


def candidates(op: str, key: tuple[int, torch.dtype]) -> Iterator[_config.Config]:
    """What `llmops tune` tries beside the table."""
    if key[0] <= _rows.LONGEST:
        yield from _rows.tiles(key[0])
        return
    for block in (1024, 2048, 4096, 8192):
        for warps in (4, 8, 16):
            yield {"BLOCK": block, "num_warps": warps}


def forward(
    op: str, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    eps: float, dims: int, offset: float, centered: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y, h), contiguous; without a residual h is x itself."""
    y = _rows.contiguous_like(x)
    h = None
    if residual is not None:
        h = _rows.contiguous_like(x, torch.promote_types(x.dtype, residual.dtype))
    if y.numel() == 0:
        return y, x if h is None else h
    source = _rows.as_rows(x, dims)
    added = None if residual is None else _rows.as_rows(residual, dims)
    (rows, n), added_row = source.shape, 0 if added is None else added.stride(0)
    config = _config.choose(op, (_rows.power_of_2(n), x.dtype), _table(n))
    # Of rows whose elements come one by one a thread of 16 warps has too few registers: 36 spill.
    if centered and n > 8192 and n % 16 and "ROWS" in config:
        config = LOOPED
    arguments = (source, added, flat(weight), flat(bias), y, h, rows, n, source.stride(0),
                 added_row, eps, offset)  # fmt: skip
    if "ROWS" in config:
        grid = (cdiv(rows, config["ROWS"]),)
        launch(norm_fwd_kernel, grid, *arguments, CENTERED=centered, **config)
    else:
        launch(norm_fwd_long_kernel, (rows,), *arguments, CENTERED=centered, **config)
    return y, x if h is None else h
