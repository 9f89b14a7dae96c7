"""Cross-entropy of logits and class indices. Its gradient: `cross_entropy_bwd.py`.

    lse = log sum_j exp(x_j)
    loss = (1 - s) w_t (lse - x_t) + (s / C) sum_j w_j (lse - x_j) + z lse^2

A row in blocks of PARTS times LANES elements, the logits read once. A lane keeps a maximum
and a sum of its own and meets PARTS elements at a time, their maximum first: 1 + 1 / PARTS
exponentials per element and no word between threads before the end of the row. Short rows: several
in one program. Reductions over rows are one program's, in fp64 and in a fixed order: the same bits
each run.

fp32 in the lanes, fp64 for what is one number per row, rounded once. Ignored rows are not read. A
target outside [0, C), which a GPU cannot report, reads nothing; its row's loss is NaN.
1 access per element.

Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from llmops.kernels.triton import _config, _rows
from llmops.kernels.triton._launch import all_registers, cdiv, launch
from llmops.kernels.triton._rows import begin_of
from torch import Tensor

NONE, MEAN, SUM = 0, 1, 2


@triton.jit
def fp64(number):
    """A kernel's number in fp64; a Python float (the interpreter's) would be narrowed to fp32."""
    return tl.full([], number, tl.float64)


@triton.jit
def targets(target, row, rows, n, ignore_index):
    """The targets of the rows, which of them count, and which of those have a class."""
    t = tl.load(target + row, mask=row < rows, other=0).to(tl.int64)
    kept = (row < rows) & (t != ignore_index)
    return t, kept, kept & (t >= 0) & (t < n)


@triton.jit
def weight_of(weight, t, valid):
    """w_t in fp32: 0 where there is none."""
    if weight is None:
        return valid.to(tl.float32)
    else:
        return tl.load(weight + t, mask=valid, other=0.0)


@triton.jit
def cross_entropy_fwd_kernel(
    x, target, weight, losses, lse, rows, n, size_b, size_c, x_a, x_b, x_c, x_n, ignore_index,
    smoothing: tl.float64, uniform: tl.float64, z_loss: tl.float64, SMOOTH: tl.constexpr,
    ROWWISE: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """ROWWISE: losses of the rows as they are returned; else in fp64 and without z lse^2."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    t, kept, valid = targets(target, row, rows, n, ignore_index)
    begin = begin_of(row, size_b, size_c, x_a, x_b, x_c)
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
    loss *= weight_of(weight, t, valid).to(tl.float64)
    if SMOOTH:
        gap += seen * (shift - tl.where(top == -float("inf"), 0.0, top))
        spread = tl.sum(gap, 1).to(tl.float64) + tl.sum(seen, 1).to(tl.float64) * log_sum
        loss = (1.0 - fp64(smoothing)) * loss + fp64(uniform) * spread
    loss = tl.where(valid, loss, float("nan"))
    row_lse = tl.where(valid, row_lse, float("nan"))
    if ROWWISE:
        loss = (loss + fp64(z_loss) * row_lse * row_lse).to(tl.float32)
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
            t, _, valid = targets(target, row, rows, n, ignore_index)
            weights += weight_of(weight, t, valid).to(tl.float64)
            count += valid.to(tl.float64)
    result = tl.sum(total, 0)
    square = tl.sum(squares, 0)
    if MEAN:
        result = result / tl.sum(weights, 0)
        square = square / tl.sum(count, 0)
    result = (result + fp64(z_loss) * square).to(tl.float32)
    tl.store(loss, result.to(loss.dtype.element_ty))


# ---- launchers -----------------------------------------------------------------------------------

# Elements of a program with 16 of them in a thread, and the rows a reduction takes at a time.
TILE = 4096
REDUCED = 4096


def _table(n: int, heavy: bool) -> _config.Config:
    """Not measured yet; from ahead-of-time inspection. heavy: fp32 with label smoothing."""
    block = _rows.block(n)
    if block > TILE:  # lanes are a 16-byte load of 16-bit logits for each of 256 threads
        return {"ROWS": 1, "PARTS": 2 if heavy else 4, "LANES": 2048, "num_warps": 8}
    rows = min(TILE // block, 16)
    return {"ROWS": rows, "PARTS": 1, "LANES": block, "num_warps": max(rows * block // 512, 1)}


def entries(op: str, dtype: torch.dtype) -> Iterator[tuple[_config.Key, _config.Config]]:
    for n in _rows.lengths(TILE):
        for heavy in (False, True)[: 2 if dtype == torch.float32 else 1]:
            yield (n, dtype), _table(n, heavy)


def candidates(op: str, key: tuple[int, torch.dtype]) -> Iterator[_config.Config]:
    """What `llmops tune` tries beside the table."""
    if key[0] <= TILE:
        for config in _rows.tiles(key[0]):
            yield {**config, "PARTS": 1, "LANES": key[0]}
        return
    for parts in (1, 2, 4, 8):
        for lanes in (1024, 2048, 4096):
            for warps in (4, 8, 16):
                if 256 * warps <= parts * lanes <= 1024 * warps:
                    yield {"ROWS": 1, "PARTS": parts, "LANES": lanes, "num_warps": warps}


def share_of_each(label_smoothing: float, n: int) -> float:
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
    heavy = x.dtype == torch.float32 and label_smoothing > 0
    config = _config.choose("cross_entropy", (_rows.power_of_2(n), x.dtype), _table(n, heavy))
    # Told none of them, ptxas spills a few where a program has several rows.
    smooth = label_smoothing > 0
    bound = all_registers(config["num_warps"]) if config["PARTS"] == 1 else {}
    launch(
        cross_entropy_fwd_kernel, (cdiv(rows, config["ROWS"]),),
        source, ids, weight, losses, lse, rows, n, *where, last, ignore_index,
        label_smoothing, share_of_each(label_smoothing, n), z_loss,
        SMOOTH=smooth, ROWWISE=rowwise, **config, **bound,
    )  # fmt: skip
    if not rowwise:
        launch(
            cross_entropy_reduce_kernel, (1,),
            losses, lse, ids, weight, loss, rows, n, ignore_index, z_loss,
            MEAN=reduction == MEAN, BLOCK=REDUCED, num_warps=16,
        )  # fmt: skip
    return loss, lse
