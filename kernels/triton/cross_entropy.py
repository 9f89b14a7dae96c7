"""Cross-entropy of logits and class indices, and its gradient, also over the logits themselves.

    lse = log sum_j exp(x_j)
    loss = (1 - s) w_t (lse - x_t) + (s / C) sum_j w_j (lse - x_j) + z lse^2
    dx_j = a exp(x_j - lse) - b [j = t] - c w_j

Forward: a row in blocks of PARTS times LANES elements, the logits read once. A lane keeps a maximum
and a sum of its own and meets PARTS elements at a time, their maximum first: 1 + 1 / PARTS
exponentials per element and no word between threads before the end of the row. Short rows: several
in one program. Backward: elementwise over rows and blocks of columns, whatever the target; dx may
be x. Reductions over rows are one program's, in fp64 and in a fixed order: the same bits each run.

fp32 in the lanes, fp64 for what is one number per row, rounded once. Ignored rows are not read. A
target outside [0, C), which a GPU cannot report, reads nothing; its row's loss and gradient are
NaN. 1 access per element forward, 2 backward.

Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from llmops.kernels.triton import _config, _rows
from llmops.kernels.triton._launch import launch
from torch import Tensor

NONE, MEAN, SUM = 0, 1, 2


@triton.jit
def _fp64(number):
    """A kernel's number in fp64; a Python float (the interpreter's) would be narrowed to fp32."""
    return tl.full([], number, tl.float64)


@triton.jit
def _targets(target, row, rows, n, ignore_index):
    """The targets of the rows, which of them count, and which of those have a class."""
    t = tl.load(target + row, mask=row < rows, other=0).to(tl.int64)
    kept = (row < rows) & (t != ignore_index)
    return t, kept, kept & (t >= 0) & (t < n)


@triton.jit
def _weight_of(weight, t, valid):
    """w_t in fp32: 0 where there is none."""
    if weight is None:
        return valid.to(tl.float32)
    else:
        return tl.load(weight + t, mask=valid, other=0.0)


@triton.jit
def _place(row, size_b, size_c, x_a, x_b, x_c):
    """Where a row of x begins: see _rows.broadcast."""
    return row // (size_b * size_c) * x_a + row // size_c % size_b * x_b + row % size_c * x_c


@triton.jit
def cross_entropy_fwd_kernel(
    x, target, weight, losses, lse, rows, n, size_b, size_c, x_a, x_b, x_c, x_n, ignore_index,
    smoothing: tl.float64, uniform: tl.float64, z_loss: tl.float64, SMOOTH: tl.constexpr,
    ROWWISE: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """ROWWISE: losses of the rows as they are returned; else in fp64 and without z lse^2."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    t, kept, valid = _targets(target, row, rows, n, ignore_index)
    begin = _place(row, size_b, size_c, x_a, x_b, x_c)
    own = x + begin[:, None, None]
    top = tl.full([ROWS, LANES], -float("inf"), tl.float32)
    total = tl.zeros([ROWS, LANES], tl.float32)
    gap = tl.zeros([ROWS, LANES], tl.float32)  # sum of w (maximum - x)
    seen = tl.zeros([ROWS, LANES], tl.float32)  # sum of w
    first = (tl.arange(0, PARTS)[:, None] * LANES + tl.arange(0, LANES)[None, :])[None, :, :]
    for done in range(0, tl.max(valid.to(tl.int32), 0) * n, PARTS * LANES):
        column = done + first
        inside = (column < n) & valid[:, None, None]
        z = tl.load(own + column.to(tl.int64) * x_n, mask=inside, other=-float("inf"))
        z = z.to(tl.float32)
        new = tl.maximum(top, tl.max(z, 1))
        # A lane that has seen nothing, or only -inf, adds nothing; a NaN makes its lane NaN.
        shift = tl.where(new == -float("inf"), 0.0, new)
        d = z - shift[:, None, :]
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(d), 1)
        if SMOOTH:
            w = inside.to(tl.float32)
            if weight is not None:
                w = tl.load(weight + column, mask=inside, other=0.0)
            gap += seen * (shift - tl.where(top == -float("inf"), 0.0, top))
            gap -= tl.sum(tl.where(inside, w * d, 0.0), 1)
            seen += tl.sum(w, 1)
        top = new
    row_top = tl.max(top, 1)
    shift = tl.where(row_top == -float("inf"), 0.0, row_top)[:, None]
    total *= tl.where(top == -float("inf"), 1.0, tl.exp(top - shift))
    log_sum = tl.log(tl.sum(total, 1).to(tl.float64))
    row_lse = row_top.to(tl.float64) + log_sum
    x_t = tl.load(x + begin + t * x_n, mask=valid, other=0.0).to(tl.float32)
    loss = (row_top.to(tl.float64) - x_t.to(tl.float64)) + log_sum
    loss *= _weight_of(weight, t, valid).to(tl.float64)
    if SMOOTH:
        gap += seen * (shift - tl.where(top == -float("inf"), 0.0, top))
        spread = tl.sum(gap, 1).to(tl.float64) + tl.sum(seen, 1).to(tl.float64) * log_sum
        loss = (1.0 - _fp64(smoothing)) * loss + _fp64(uniform) * spread
    loss = tl.where(valid, loss, float("nan"))
    row_lse = tl.where(valid, row_lse, float("nan"))
    if ROWWISE:
        loss = (loss + _fp64(z_loss) * row_lse * row_lse).to(tl.float32)
    loss = tl.where(kept, loss, 0.0)
    tl.store(losses + row, loss.to(losses.dtype.element_ty), mask=row < rows)
    tl.store(lse + row, tl.where(kept, row_lse, 0.0), mask=row < rows)


@triton.jit
def cross_entropy_reduce_kernel(
    losses, lse, target, weight, loss, rows, n, ignore_index, z_loss: tl.float64,
    MEAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: the sum or the mean of the rows' losses, and z times that of lse^2."""
    first = tl.arange(0, BLOCK).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float64)
    squares = tl.zeros([BLOCK], tl.float64)
    weights = tl.zeros([BLOCK], tl.float64)
    count = tl.zeros([BLOCK], tl.float64)
    for begin in range(0, rows, BLOCK):
        row = begin + first
        total += tl.load(losses + row, mask=row < rows, other=0.0)
        log_sum = tl.load(lse + row, mask=row < rows, other=0.0)
        squares += log_sum * log_sum
        if MEAN:
            t, _, valid = _targets(target, row, rows, n, ignore_index)
            weights += _weight_of(weight, t, valid).to(tl.float64)
            count += valid.to(tl.float64)
    result = tl.sum(total, 0)
    square = tl.sum(squares, 0)
    if MEAN:
        result = result / tl.sum(weights, 0)
        square = square / tl.sum(count, 0)
    result = (result + _fp64(z_loss) * square).to(tl.float32)
    tl.store(loss, result.to(loss.dtype.element_ty))


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
            t, _, valid = _targets(target, begin + first, rows, n, ignore_index)
            weights += _weight_of(weight, t, valid).to(tl.float64)
            count += valid.to(tl.float64)
        per_weight = 1.0 / tl.sum(weights, 0)
        per_row = 1.0 / tl.sum(count, 0)
    every = tl.zeros([BLOCK], tl.float64)
    for begin in range(0, n, BLOCK):
        every += _weight_of(weight, begin + first, begin + first < n).to(tl.float64)
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
    column = (program % blocks * BLOCK + tl.arange(0, BLOCK))[None, :]
    t, kept, valid = _targets(target, row, rows, n, ignore_index)
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
    own = _weight_of(weight, t, valid).to(tl.float64)
    rest = 2.0 * _fp64(z_loss) * per_row * exact  # the gradient that comes through lse alone
    if grad_lse is not None:
        rest += tl.load(grad_lse + row, mask=valid, other=0.0)
    b = per_loss * (1.0 - _fp64(smoothing)) * own
    a = b + rest
    c = per_loss * _fp64(uniform)
    if SMOOTH:
        spread = per_loss * _fp64(smoothing)  # c times the sum of all weights
        if weight is not None:
            spread = c * tl.load(scales + 2)
        a += spread
        rest += spread - c * own
    scale = (a * (1.0 - low.to(tl.float64))).to(tl.float32)
    a = a.to(tl.float32)
    b = b.to(tl.float32)
    c = c.to(tl.float32)
    rest = rest.to(tl.float32)
    inside = (row < rows) & (column < n)
    begin = _place(row, size_b, size_c, x_a, x_b, x_c)
    z = tl.load(x + begin + column * x_n, mask=inside & valid, other=0.0).to(tl.float32)
    d = z - high
    value = scale * tl.exp(d)
    if SMOOTH:
        if weight is None:
            value -= c
        else:
            value -= c * tl.load(weight + column, mask=column < n, other=0.0)
    # a e - b - c w = a (e - 1) + rest: where the model is sure, e is 1 but for its rounding.
    at_target = tl.where(d > -0.5, a * _expm1(d - low) + rest, value - b)
    value = tl.where(column == t, at_target, value)
    value = tl.where(kept, tl.where(valid, value, float("nan")), 0.0)
    tl.store(dx + row * n + column, value.to(dx.dtype.element_ty), mask=inside)


# ---- launchers -----------------------------------------------------------------------------------

# Elements of a program with 16 of them in a thread, and the rows a reduction takes at a time.
TILE = 4096
REDUCED = 4096


def _table(n: int) -> _config.Config:
    """Not measured yet; from ahead-of-time inspection."""
    block = _rows.power_of_2(n)
    if block > TILE:  # lanes are a 16-byte load of 16-bit logits for each of 256 threads
        return {"ROWS": 1, "PARTS": 4, "LANES": 2048, "num_warps": 8}
    rows = min(TILE // block, 16)
    return {"ROWS": rows, "PARTS": 1, "LANES": block, "num_warps": max(rows * block // 512, 1)}


def _table_bwd(n: int) -> _config.Config:
    block = min(_rows.power_of_2(n), TILE)
    rows = min(TILE // block, 16)
    return {"ROWS": rows, "BLOCK": block, "num_warps": max(rows * block // 512, 1)}


def _uniform(label_smoothing: float, n: int) -> float:
    return label_smoothing / n if n else 0.0


def cross_entropy(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """x [..., C], target [...], weight fp32 [C]: the loss, [...] or a scalar, in `dtype`, and the
    rows' log-sum-exp in fp64, 0 where the target is ignored."""
    n, rows, rowwise = x.shape[-1], target.numel(), reduction == NONE
    loss = torch.empty(target.shape if rowwise else (), dtype=dtype, device=x.device)
    lse = torch.empty(target.shape, dtype=torch.float64, device=x.device)
    losses = loss if rowwise else torch.empty_like(lse)
    ids = target.contiguous()
    source, where, last = _rows.broadcast(x, x.shape)
    config = _config.choose("cross_entropy", (_rows.power_of_2(n), x.dtype), _table(n))
    launch(
        cross_entropy_fwd_kernel, (triton.cdiv(rows, config["ROWS"]),),
        source, ids, weight, losses, lse, rows, n, *where, last, ignore_index,
        label_smoothing, _uniform(label_smoothing, n), z_loss,
        SMOOTH=label_smoothing > 0, ROWWISE=rowwise, **config,
    )  # fmt: skip
    if not rowwise:
        launch(
            cross_entropy_reduce_kernel, (1,),
            losses, lse, ids, weight, loss, rows, n, ignore_index, z_loss,
            MEAN=reduction == MEAN, BLOCK=REDUCED, num_warps=16,
        )  # fmt: skip
    return loss, lse


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
        (triton.cdiv(rows, config["ROWS"]) * triton.cdiv(n, config["BLOCK"]),),
        grad.contiguous(), None if grad_lse is None else grad_lse.contiguous(), source, ids,
        weight, lse.contiguous(), scales, dx, rows, n, *where, last, ignore_index,
        label_smoothing, _uniform(label_smoothing, n), z_loss,
        SMOOTH=smooth, ROWWISE=reduction == NONE, **config,
    )  # fmt: skip
