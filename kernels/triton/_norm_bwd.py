"""The gradients of RMS norm and layer norm. Names and forward: `_norm.py`.

    dh = rstd (g - mean(g) - z mean(g z)) + dh_in,  g = dy (weight + offset); no mean(g) in RMS norm
    dweight = sum over rows of dy z,  dbias = sum over rows of dy

As many programs as the device holds walk over the rows, each with its own fp32 sums for the
parameters, in registers (in its own memory for long rows); a second kernel adds the programs' sums
in their order, so the bits depend on the device's number of processors and nothing else. Accesses
per element: 3 (4 with dh_in).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from llmops.kernels.triton import _config, _rows
from llmops.kernels.triton._launch import all_registers, architecture, cdiv, launch, processors
from llmops.kernels.triton._norm import deviations, flat, rstd_of, scaled
from torch import Tensor


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
        held = scaled(weight, column, n, offset)
    if dweight is not None:
        weight_sums = tl.zeros([ROWS, BLOCK], tl.float32)
    if dbias is not None:
        bias_sums = tl.zeros([ROWS, BLOCK], tl.float32)
    for group in tl.range(program, tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = (group * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        inside = (row < rows) & (column < n)
        value = tl.load(h + row * h_row + column, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(dy + row * dy_row + column, mask=inside, other=0.0).to(tl.float32)
        d, rstd = deviations(value, inside, n, eps, CENTERED)
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
                g = g * scaled(weight, column, n, offset)
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
            g = g * scaled(weight, column, n, offset)
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
        rstd = rstd_of(square, eps)
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
                g = g * scaled(weight, column, n, offset)
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
    column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    weights = tl.zeros([PROGRAMS, COLUMNS], tl.float32)
    biases = tl.zeros([PROGRAMS, COLUMNS], tl.float32)
    for begin in range(0, programs, PROGRAMS):
        program = (begin + tl.arange(0, PROGRAMS)).to(tl.int64)[:, None]
        at, inside = program * n + column, (program < programs) & (column < n)
        weights += tl.load(weight_sums + at, mask=inside, other=0.0)
        if dbias is not None:
            biases += tl.load(bias_sums + at, mask=inside, other=0.0)
    at = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    tl.store(dweight + at, tl.sum(weights, 0).to(dweight.dtype.element_ty), mask=at < n)
    if dbias is not None:
        tl.store(dbias + at, tl.sum(biases, 0).to(dbias.dtype.element_ty), mask=at < n)


# ---- launchers -----------------------------------------------------------------------------------

# The longest row whose gradient is taken in registers.
LONGEST_BACKWARD = 8192


def _backward_table(n: int, dtype: torch.dtype) -> _config.Config:
    """Rows in flight, block, warps, and programs per processor: from ahead-of-time inspection.
    Five fp32 tiles are alive (dy, h, weight, two sums): beyond 8192 elements they spill, beyond
    4096 the next rows' copies do not fit AMD's shared memory; with the weight held, several rows of
    4096 elements together spill.

    Measured on an H100, in bf16: two more rows on their way are worth more than the weight held
    (rms_norm of 1024 columns 1.2 to 1.3 times as fast, of 4096 1.05); and of longer rows blocks of
    4096 instead of 2048, 1.35 (16384 columns)."""
    hopper = architecture() == "sm90" and dtype.itemsize == 2
    if n > LONGEST_BACKWARD:
        block = 4096 if hopper else 2048
        return {"ROWS": 2, "BLOCK": block, "num_warps": 8, "PER_PROCESSOR": 2}
    if hopper and 512 < n <= 4096:
        block = _rows.power_of_2(n)
        warps = 8 if block <= 2048 else 4
        return {"ROWS": 1024 * warps // block, "BLOCK": block, "num_warps": warps, "HOLD": False,
                "STAGES": 3, "PER_PROCESSOR": 2}  # fmt: skip
    config = _rows.tile(n, per_thread=16)
    several = config["ROWS"] > 1
    if several:  # eight of each tile to a thread
        config["ROWS"] //= 2
    elements = config["ROWS"] * config["BLOCK"]
    small = elements <= 4096
    hold = elements <= 1024 if several else small
    stages = 2 if small and not several else 1
    return {**config, "HOLD": hold, "STAGES": stages, "PER_PROCESSOR": 1 + small}


def entries(op: str, dtype: torch.dtype) -> Iterator[tuple[_config.Key, _config.Config]]:
    for n in _rows.lengths(LONGEST_BACKWARD):
        yield (n, dtype), _backward_table(n, dtype)


def candidates(op: str, key: tuple[int, torch.dtype]) -> Iterator[_config.Config]:
    """What `llmops tune` tries beside the table."""
    n = key[0]
    if n > LONGEST_BACKWARD:
        for rows in (1, 2, 4):
            for block in (1024, 2048, 4096):
                for many in (1, 2, 4):
                    yield {"ROWS": rows, "BLOCK": block, "PER_PROCESSOR": many}
        return
    for config in _rows.tiles(n, most=1024):
        for hold, stages, many in ((False, 1, 2), (False, 3, 2), (False, 3, 4), (True, 2, 2)):
            yield {**config, "HOLD": hold, "STAGES": stages, "PER_PROCESSOR": many}


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
    config = dict(_config.choose(op, key, _backward_table(n, h.dtype)))
    config |= all_registers(config["num_warps"])
    groups = cdiv(rows, config["ROWS"])
    programs = min(processors() * config.pop("PER_PROCESSOR"), groups)
    long = "HOLD" not in config
    weight_sums = bias_sums = None
    if need_parameters:
        make = torch.zeros if long else torch.empty
        sums = make((1 + need_bias, programs, n), dtype=torch.float32, device=h.device)
        weight_sums, bias_sums = sums[0], sums[1] if need_bias else None
    launch(
        norm_bwd_long_kernel if long else norm_bwd_kernel, (programs,), grad, source, added,
        flat(weight), dh if need_h else None, dx if need_x else None, weight_sums, bias_sums,
        rows, n, grad.stride(0), source.stride(0), 0 if added is None else added.stride(0), eps,
        offset, CENTERED=centered, **config,
    )  # fmt: skip
    if need_parameters:
        launch(
            norm_sum_kernel, (cdiv(n, 32),), weight_sums, bias_sums, dweight,
            dbias if need_bias else None, programs, n, PROGRAMS=32, COLUMNS=32, num_warps=4,
        )  # fmt: skip
    return dh, dx, dweight, dbias
