"""The gradient of cross-entropy, also over the logits themselves. Names and forward:
`cross_entropy.py`.

    dx_j = a exp(x_j - lse) - b [j = t] - c w_j

Elementwise over rows and blocks of columns, whatever the target; dx may be x. The row of a target
outside [0, C) gets NaN. fp64 for what is one number per row; 2 accesses per element.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from llmops.kernels.triton import _config, _rows
from llmops.kernels.triton._launch import all_registers, cdiv, launch
from llmops.kernels.triton._rows import begin_of
from llmops.kernels.triton.cross_entropy import (
    MEAN,
    NONE,
    REDUCED,
    TILE,
    fp64,
    share_of_each,
    targets,
    weight_of,
)
from torch import Tensor


@triton.jit
def cross_entropy_scales_kernel(
    target, weight, scales, rows, n, ignore_index, MEAN: tl.constexpr, BLOCK: tl.constexpr
):
    """One program: what the mean multiplies by, 1 / sum of the targets' weights and 1 / number of
    rows (1 and 1 without a mean), and the sum of all weights."""
    first = tl.arange(0, BLOCK).to(tl.int64)
    weights = tl.zeros([BLOCK], tl.float64)
    count = tl.zeros([BLOCK], tl.float64)
    per_weight = 1.0
    per_row = 1.0
    if MEAN:
        for begin in range(0, rows, BLOCK):
            t, _, valid = targets(target, begin + first, rows, n, ignore_index)
            weights += weight_of(weight, t, valid).to(tl.float64)
            count += valid.to(tl.float64)
        per_weight = 1.0 / tl.sum(weights, 0)
        per_row = 1.0 / tl.sum(count, 0)
    every = tl.zeros([BLOCK], tl.float64)
    for begin in range(0, n, BLOCK):
        every += weight_of(weight, begin + first, begin + first < n).to(tl.float64)
    tl.store(scales, per_weight)
    tl.store(scales + 1, per_row)
    tl.store(scales + 2, tl.sum(every, 0))


@triton.jit
def _expm1(d):
    """exp(d) - 1 for d from -1/2 to a rounding above 0: its series, as far as fp32 sees it."""
    series = 1.0 + d * (1.0 / 8)
    series = 1.0 + d * (1.0 / 7) * series
    series = 1.0 + d * (1.0 / 6) * series
    series = 1.0 + d * (1.0 / 5) * series
    series = 1.0 + d * (1.0 / 4) * series
    series = 1.0 + d * (1.0 / 3) * series
    series = 1.0 + d * (1.0 / 2) * series
    return d * series


@triton.jit
def cross_entropy_bwd_kernel(
    grad, grad_lse, x, target, weight, lse, scales, dx, rows, n, size_b, size_c, x_a, x_b, x_c,
    x_n, ignore_index, smoothing: tl.float64, uniform: tl.float64, z_loss: tl.float64,
    SMOOTH: tl.constexpr, ROWWISE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A tile [ROWS, BLOCK]; a program reads no element of x but its own, for dx may be x. scales:
    of cross_entropy_scales_kernel; None for ones, where the sum of the weights is not needed."""
    blocks = tl.cdiv(n, BLOCK)
    program = tl.program_id(0).to(tl.int64)
    row = (program // blocks * ROWS + tl.arange(0, ROWS))[:, None]
    start = program % blocks * BLOCK
    lane = tl.arange(0, BLOCK)[None, :]
    t, kept, valid = targets(target, row, rows, n, ignore_index)
    # What fp32 drops of lse is a factor of all exponentials, 1 - low: it goes into a.
    exact = tl.load(lse + row, mask=valid, other=0.0)
    high = exact.to(tl.float32)
    low = (exact - high.to(tl.float64)).to(tl.float32)
    # In fp64, as few as they are: a result may be a small difference of them.
    g = tl.load(grad + row if ROWWISE else grad + row * 0, mask=valid, other=0.0).to(tl.float64)
    per_loss = g
    per_row = g
    if scales is not None:
        per_loss = g * tl.load(scales)
        per_row = g * tl.load(scales + 1)
    own = weight_of(weight, t, valid).to(tl.float64)
    rest = 2.0 * fp64(z_loss) * per_row * exact  # the gradient that comes through lse alone
    if grad_lse is not None:
        rest += tl.load(grad_lse + row, mask=valid, other=0.0)
    b = per_loss * (1.0 - fp64(smoothing)) * own
    a = b + rest
    c = per_loss * fp64(uniform)
    if SMOOTH:
        # c times the sum of all weights. A difference times c, and not of two products: fused, the
        # rounding of one would remain where nothing should, at a single class.
        if weight is None:
            a += per_loss * fp64(smoothing)
            rest += per_loss * (fp64(smoothing) - fp64(uniform))
        else:
            every = tl.load(scales + 2)
            a += c * every
            rest += c * (every - own)
    # What is one number per row is settled here and not per element: the factor of a row that is
    # ignored, or has no such class, and what the target's column gets.
    scale = (a * (1.0 - low.to(tl.float64))).to(tl.float32)
    scale = tl.where(kept, tl.where(valid, scale, float("nan")), 0.0)
    a = a.to(tl.float32)
    b = b.to(tl.float32)
    c = tl.where(valid, c.to(tl.float32), 0.0)
    rest = rest.to(tl.float32)
    # Places in the block in 32 bits: of 64 a comparison per element takes two.
    here = lane == tl.where(valid & (t >= start) & (t < start + BLOCK), t - start, -1).to(tl.int32)
    inside = (row < rows) & (lane < tl.minimum(n - start, BLOCK).to(tl.int32))
    begin = begin_of(row, size_b, size_c, x_a, x_b, x_c) + start * x_n
    at = begin + lane.to(tl.int64) * x_n
    z = tl.load(x + at, mask=inside & valid, other=0.0).to(tl.float32)
    d = tl.sum(tl.where(here, z, 0.0), 1)[:, None] - high  # of the target, if it is here
    at_target = scale * tl.exp(d) - b
    value = scale * tl.exp(z - high)
    if SMOOTH:
        at_target -= c * own.to(tl.float32)
        if weight is None:
            value -= c
        else:
            value -= c * tl.load(weight + start + lane, mask=start + lane < n, other=0.0)
    # a e - b - c w = a (e - 1) + rest: where the model is sure, e is 1 but for its rounding.
    at_target = tl.where(d > -0.5, a * _expm1(d - low) + rest, at_target)
    value = tl.where(here, at_target, value)
    tl.store(dx + row * n + start + lane, value.to(dx.dtype.element_ty), mask=inside)


# ---- launchers -----------------------------------------------------------------------------------


def _table_bwd(n: int) -> _config.Config:
    block = _rows.block(n, TILE)
    # Of short rows a thread has its elements in many, and each row's scalars cost it registers:
    # warps lie along a row first, so that a thread may have all the rows. Of 16, 99 spill.
    rows = min(TILE // block, 8, max(block // 8, 1))
    return {"ROWS": rows, "BLOCK": block, "num_warps": max(rows * block // 512, 1)}


def entries(op: str, dtype: torch.dtype) -> Iterator[tuple[_config.Key, _config.Config]]:
    for n in _rows.lengths(TILE):
        yield (n, dtype), _table_bwd(n)


def candidates(op: str, key: tuple[int, torch.dtype]) -> Iterator[_config.Config]:
    """What `llmops tune` tries beside the table."""
    for block in sorted({min(key[0], size) for size in (1024, 2048, 4096, 8192)}):
        for config in _rows.tiles(block, most=1024):
            yield {**config, "BLOCK": block}


def cross_entropy_bwd(
    grad: Tensor,
    grad_lse: Tensor | None,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: int,
) -> Tensor:
    """grad and grad_lse of cross_entropy's results; returns dx, of x's shape, contiguous."""
    dx = _rows.contiguous_like(x)
    how = (ignore_index, label_smoothing, z_loss, reduction)
    _backward(dx, grad, grad_lse, x, target, weight, lse, *how)
    return dx


def cross_entropy_bwd_(
    grad: Tensor,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: int,
) -> None:
    """The same over x itself, which is contiguous."""
    how = (ignore_index, label_smoothing, z_loss, reduction)
    _backward(x, grad, None, x, target, weight, lse, *how)


def _backward(
    dx: Tensor, grad: Tensor, grad_lse: Tensor | None, x: Tensor, target: Tensor,
    weight: Tensor | None, lse: Tensor, ignore_index: int, label_smoothing: float, z_loss: float,
    reduction: int,
) -> None:  # fmt: skip
    if dx.numel() == 0:
        return
    n, rows, smooth = x.shape[-1], target.numel(), label_smoothing > 0
    ids, scales = target.contiguous(), None
    if reduction == MEAN or (smooth and weight is not None):
        scales = torch.empty(3, dtype=torch.float64, device=x.device)
        launch(
            cross_entropy_scales_kernel, (1,),
            ids, weight, scales, rows, n, ignore_index,
            MEAN=reduction == MEAN, BLOCK=REDUCED, num_warps=16,
        )  # fmt: skip
    source, where, last = _rows.broadcast(x, x.shape)
    config = _config.choose("cross_entropy_bwd", (_rows.power_of_2(n), x.dtype), _table_bwd(n))
    launch(
        cross_entropy_bwd_kernel,
        (cdiv(rows, config["ROWS"]) * cdiv(n, config["BLOCK"]),),
        grad.contiguous(), None if grad_lse is None else grad_lse.contiguous(), source, ids,
        weight, lse.contiguous(), scales, dx, rows, n, *where, last, ignore_index,
        label_smoothing, share_of_each(label_smoothing, n), z_loss,
        SMOOTH=smooth, ROWWISE=reduction == NONE, **config, **all_registers(config["num_warps"]),
    )  # fmt: skip
