"""RMS norm and layer norm along rows, with the residual addition before them, and their gradients.

    d = h - mean(h) (layer norm) or h,  h = x + residual as rounded to its dtype
    z = d rstd,  rstd = 1 / sqrt(mean(d^2) + eps),  y = z (weight + offset) + bias
    dh = rstd (g - mean(g) - z mean(g z)) + dh_in,  g = dy (weight + offset); no mean(g) in RMS norm
    dweight = sum over rows of dy z,  dbias = sum over rows of dy

Forward: a row of up to LONGEST elements stays in registers, several short rows in one program; a
longer one is swept twice, the second time mostly from the cache. Backward: as many programs as the
device holds walk over the rows, each with its own fp32 sums for the parameters, in registers (in
its own memory for long rows); a second kernel adds the programs' sums in their order, so the bits
depend on the device's number of processors and nothing else.

The mean of a row with mean 25,000 is off by more than a small deviation: all sums are of h less a
first mean, and the second, small one corrects it. fp32 inside, rounded once. Accesses per element:
2 forward (4 with a residual), 3 backward (4 with dh_in).

Ba, Kiros and Hinton, "Layer Normalization", 2016; Zhang and Sennrich, "Root Mean Square Layer
Normalization", 2019.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from llmops.kernels.triton import _config, _rows
from llmops.kernels.triton._launch import launch, processors
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
def _scaled(weight, column, n, offset):
    """weight + offset at the columns; weight is there."""
    return tl.load(weight + column, mask=column < n, other=0.0).to(tl.float32) + offset


@triton.jit
def _rstd(square, eps):
    return 1.0 / tl.sqrt_rn(square + eps)


@triton.jit
def _deviations(h, inside, n, eps, CENTERED: tl.constexpr):
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
    return d, _rstd(square, eps)


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
    d, rstd = _deviations(value, inside, n, eps, CENTERED)
    out = d * rstd
    if weight is not None:
        out = out * _scaled(weight, column, n, offset)
    if bias is not None:
        out += _scaled(bias, column, n, 0.0)
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
    rstd = _rstd(square, eps)
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
            out = out * _scaled(weight, column, n, offset)
        if bias is not None:
            out += _scaled(bias, column, n, 0.0)
        tl.store(y + row * n + column, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _store_gradients(total, dh_in, dh, dx, at_dh_in, at, inside):
    if dh_in is not None:
        total += tl.load(dh_in + at_dh_in, mask=inside, other=0.0).to(tl.float32)
    if dh is not None:
        tl.store(dh + at, total.to(dh.dtype.element_ty), mask=inside)
    if dx is not None:
        tl.store(dx + at, total.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def norm_bwd_kernel(
    dy, h, dh_in, weight, dh, dx, dweight, dbias, rows, n, dy_row, h_row, dh_in_row, eps, offset,
    CENTERED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, HOLD: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Rows in registers, ROWS at a time; dweight, dbias [programs, n] receive this program's sums.
    HOLD keeps the weight in registers, too."""
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)[None, :]
    if HOLD and weight is not None:
        held = _scaled(weight, column, n, offset)
    if dweight is not None:
        weight_sums = tl.zeros([ROWS, BLOCK], tl.float32)
    if dbias is not None:
        bias_sums = tl.zeros([ROWS, BLOCK], tl.float32)
    for group in tl.range(program, tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = (group * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        inside = (row < rows) & (column < n)
        value = tl.load(h + row * h_row + column, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(dy + row * dy_row + column, mask=inside, other=0.0).to(tl.float32)
        d, rstd = _deviations(value, inside, n, eps, CENTERED)
        z = d * rstd
        if dweight is not None:
            # A row outside has no rstd but 1 / sqrt(eps); its g and z are 0, or NaN with eps 0.
            weight_sums += tl.where(inside, g * z, 0.0)
        if dbias is not None:
            bias_sums += g
        if weight is not None:
            if HOLD:
                g = g * held
            else:
                g = g * _scaled(weight, column, n, offset)
        total = g - z * (tl.sum(g * z, 1)[:, None] / n)
        if CENTERED:
            total -= tl.sum(g, 1)[:, None] / n
        at_dh_in = row * dh_in_row + column
        _store_gradients(total * rstd, dh_in, dh, dx, at_dh_in, row * n + column, inside)
    at = program.to(tl.int64) * n + tl.arange(0, BLOCK)
    mask = tl.arange(0, BLOCK) < n
    if dweight is not None:
        tl.store(dweight + at, tl.sum(weight_sums, 0), mask=mask)
    if dbias is not None:
        tl.store(dbias + at, tl.sum(bias_sums, 0), mask=mask)


@triton.jit
def _long_row_sums(
    dy, h, weight, row, rows, n, dy_row, h_row, offset, shift,
    CENTERED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The means [ROWS, 1] of d, d^2, g and g d over rows, d = h - shift."""
    first = tl.arange(0, BLOCK)[None, :]
    d_sums = tl.zeros([ROWS, BLOCK], tl.float32)
    dd_sums = tl.zeros([ROWS, BLOCK], tl.float32)
    g_sums = tl.zeros([ROWS, BLOCK], tl.float32)
    gd_sums = tl.zeros([ROWS, BLOCK], tl.float32)
    for begin in range(0, n, BLOCK):
        column = begin + first
        inside = (row < rows) & (column < n)
        d = tl.load(h + row * h_row + column, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(dy + row * dy_row + column, mask=inside, other=0.0).to(tl.float32)
        if weight is not None:
            g = g * _scaled(weight, column, n, offset)
        if CENTERED:
            d = tl.where(inside, d - shift, 0.0)
            d_sums += d
            g_sums += g
        dd_sums += d * d
        gd_sums += g * d
    return (
        tl.sum(d_sums, 1)[:, None] / n,
        tl.sum(dd_sums, 1)[:, None] / n,
        tl.sum(g_sums, 1)[:, None] / n,
        tl.sum(gd_sums, 1)[:, None] / n,
    )


@triton.jit
def norm_bwd_long_kernel(
    dy, h, dh_in, weight, dh, dx, dweight, dbias, rows, n, dy_row, h_row, dh_in_row, eps, offset,
    CENTERED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS rows at a time, in blocks, swept twice; this program's sums are in its row of dweight
    and dbias [programs, n], which come as zeros."""
    program = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    first = lane[None, :]
    sums_at = program.to(tl.int64) * n
    for group in range(program, tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = (group * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        shift = tl.zeros([ROWS, 1], tl.float32)
        if CENTERED:
            inside = (row < rows) & (first < n)
            value = tl.load(h + row * h_row + first, mask=inside, other=0.0).to(tl.float32)
            shift = tl.sum(value, 1)[:, None] / tl.minimum(n, BLOCK)
        left, square, g_mean, gd_mean = _long_row_sums(
            dy, h, weight, row, rows, n, dy_row, h_row, offset, shift, CENTERED, ROWS, BLOCK
        )
        if CENTERED:
            unlike = left * left > 16.0 * (square - left * left)
            if tl.max(tl.max(unlike.to(tl.int32), 1), 0) > 0:
                shift += left
                left, square, g_mean, gd_mean = _long_row_sums(
                    dy, h, weight, row, rows, n, dy_row, h_row, offset, shift, CENTERED, ROWS, BLOCK
                )
            square = tl.maximum(square - left * left, 0.0)
            gd_mean = gd_mean - left * g_mean
        rstd = _rstd(square, eps)
        gz_mean = gd_mean * rstd
        for begin in range(0, n, BLOCK):
            column = begin + first
            inside = (row < rows) & (column < n)
            d = tl.load(h + row * h_row + column, mask=inside, other=0.0).to(tl.float32)
            g = tl.load(dy + row * dy_row + column, mask=inside, other=0.0).to(tl.float32)
            if CENTERED:
                d = d - shift - left
            z = d * rstd
            sums = sums_at + begin + lane
            if dweight is not None:
                part = tl.load(dweight + sums, mask=begin + lane < n, other=0.0)
                part += tl.sum(tl.where(inside, g * z, 0.0), 0)
                tl.store(dweight + sums, part, mask=begin + lane < n)
            if dbias is not None:
                part = tl.load(dbias + sums, mask=begin + lane < n, other=0.0)
                tl.store(dbias + sums, part + tl.sum(g, 0), mask=begin + lane < n)
            if weight is not None:
                g = g * _scaled(weight, column, n, offset)
            total = g - z * gz_mean
            if CENTERED:
                total -= g_mean
            at_dh_in = row * dh_in_row + column
            _store_gradients(total * rstd, dh_in, dh, dx, at_dh_in, row * n + column, inside)
        tl.debug_barrier()  # the sums that one thread stored another may load


@triton.jit
def norm_sum_kernel(
    weight_sums, bias_sums, dweight, dbias, programs, n,
    PROGRAMS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dweight, dbias [n]: the programs' sums [programs, n], added in their order."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    weights = tl.zeros([PROGRAMS, COLUMNS], tl.float32)
    biases = tl.zeros([PROGRAMS, COLUMNS], tl.float32)
    for begin in range(0, programs, PROGRAMS):
        program = (begin + tl.arange(0, PROGRAMS)).to(tl.int64)[:, None]
        at, inside = program * n + column, (program < programs) & (column < n)
        weights += tl.load(weight_sums + at, mask=inside, other=0.0)
        if dbias is not None:
            biases += tl.load(bias_sums + at, mask=inside, other=0.0)
    at = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    tl.store(dweight + at, tl.sum(weights, 0).to(dweight.dtype.element_ty), mask=at < n)
    if dbias is not None:
        tl.store(dbias + at, tl.sum(biases, 0).to(dbias.dtype.element_ty), mask=at < n)


# ---- launchers -----------------------------------------------------------------------------------

# The longest row whose gradient is taken in registers.
LONGEST_BACKWARD = 8192


def _flat(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.contiguous().view(-1)


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
    table = {"BLOCK": 2048, "num_warps": 8} if n > _rows.LONGEST else _rows.tile(n, per_thread=16)
    config = _config.choose(op, (_rows.power_of_2(n), x.dtype), table)
    arguments = (source, added, _flat(weight), _flat(bias), y, h, rows, n, source.stride(0),
                 added_row, eps, offset)  # fmt: skip
    if "ROWS" in config:
        grid = (triton.cdiv(rows, config["ROWS"]),)
        launch(norm_fwd_kernel, grid, *arguments, CENTERED=centered, **config)
    else:
        launch(norm_fwd_long_kernel, (rows,), *arguments, CENTERED=centered, **config)
    return y, x if h is None else h


def _backward_table(n: int) -> _config.Config:
    """Rows in flight, block, warps, and programs per processor: not measured yet; from
    ahead-of-time inspection. Five fp32 tiles are alive (dy, h, weight, two sums): beyond 8192
    elements they spill, beyond 4096 the next rows' copies do not fit AMD's shared memory; with
    the weight held, several rows of 4096 elements together spill."""
    if n > LONGEST_BACKWARD:
        return {"ROWS": 2, "BLOCK": 2048, "num_warps": 8, "PER_PROCESSOR": 2}
    config = _rows.tile(n, per_thread=16)
    several = config["ROWS"] > 1
    if several:  # eight of each tile to a thread
        config["ROWS"] //= 2
    elements = config["ROWS"] * config["BLOCK"]
    small = elements <= 4096
    hold = elements <= 1024 if several else small
    stages = 2 if small and not several else 1
    return {**config, "HOLD": hold, "STAGES": stages, "PER_PROCESSOR": 1 + small}


def backward(
    op: str, dy: Tensor, h: Tensor, dh_in: Tensor | None, weight: Tensor | None,
    bias: Tensor | None, eps: float, dims: int, offset: float, centered: bool, need_h: bool,
    need_x: bool, need_parameters: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dh, dx, dweight, dbias; of no elements where not needed."""

    def empty(shape: torch.Size, needed: bool, like: Tensor | None) -> Tensor:
        dtype = torch.float32 if like is None else like.dtype
        return torch.empty(shape if needed else (0,), dtype=dtype, device=h.device)

    of_row = h.shape[h.dim() - dims :]
    need_bias = need_parameters and centered
    dh, dx = empty(h.shape, need_h, h), empty(h.shape, need_x, dy)
    dweight, dbias = empty(of_row, need_parameters, weight), empty(of_row, need_bias, bias)
    if h.numel() == 0:
        return dh, dx, dweight.zero_(), dbias.zero_()
    source, grad = _rows.as_rows(h, dims), _rows.as_rows(dy, dims)
    added = None if dh_in is None else _rows.as_rows(dh_in, dims)
    rows, n = source.shape
    key = (_rows.power_of_2(n), h.dtype)
    config = dict(_config.choose(op, key, _backward_table(n)))
    groups = triton.cdiv(rows, config["ROWS"])
    programs = min(processors() * config.pop("PER_PROCESSOR"), groups)
    long = "HOLD" not in config
    weight_sums = bias_sums = None
    if need_parameters:
        make = torch.zeros if long else torch.empty
        sums = make((1 + need_bias, programs, n), dtype=torch.float32, device=h.device)
        weight_sums, bias_sums = sums[0], sums[1] if need_bias else None
    launch(
        norm_bwd_long_kernel if long else norm_bwd_kernel, (programs,), grad, source, added,
        _flat(weight), dh if need_h else None, dx if need_x else None, weight_sums, bias_sums,
        rows, n, grad.stride(0), source.stride(0), 0 if added is None else added.stride(0), eps,
        offset, CENTERED=centered, **config,
    )  # fmt: skip
    if need_parameters:
        launch(
            norm_sum_kernel, (triton.cdiv(n, 32),), weight_sums, bias_sums, dweight,
            dbias if need_bias else None, programs, n, PROGRAMS=32, COLUMNS=32, num_warps=4,
        )  # fmt: skip
    return dh, dx, dweight, dbias
