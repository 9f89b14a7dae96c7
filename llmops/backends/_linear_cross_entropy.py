"""linear_cross_entropy for any backend that has cross_entropy: a few logits at a time.

The matrix products are torch's own, or those that a backend has for fp32; the loss and its gradient
are the backend's kernels, the gradient in place over the logits it came from. Two ways to take the
logits:

- `sums`: some rows, all their classes. For devices that are slow to start and fast to finish, which
  are not waited for either: `sums_of_all`.
- `sums_by_class`: some rows, and of these some classes after the other, as dense matrices of their
  own, merged by their log-sum-exps. For CPUs: a product with 2048 classes keeps its operands and
  its result in the last-level cache, and one into rows of 50257 classes runs at two thirds of its
  rate. In fp32 throughout: 16-bit operands are widened, some classes at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Logits of a chunk: large enough that the products run at their full rate and that reading and
# writing dweight once per chunk is small beside computing it, small beside the logits of a batch.
CHUNK = 32 << 20
# And at most half of the rows, but not fewer rows than a matrix product needs: 512 rows of 768 and
# 50257 classes with gradients take 2.2 s in chunks of 256 rows and 2.6 s in chunks of 128.
CHUNKS, FEWEST_ROWS = 2, 256
_NO_REDUCTION = 0
# sums_by_class: classes per product, and rows where only the loss is wanted. 4 MiB of logits per
# 512 rows, and 6 MiB of weights at a width of 768.
CLASSES, MOST_ROWS = 2048, 2048


class Sums(NamedTuple):
    """Losses of the rows, fp32, and gradients of sum_i row_grad_i loss_i: None where not wanted."""

    losses: Tensor  # [N]
    dinput: Tensor | None  # [N, D], input's dtype
    # [V, D], fp32; or, in input's dtype, [N * V], what `weight_gradient` makes it from.
    dweight: Tensor | None
    dbias: Tensor | None  # [V], fp32


class Call(NamedTuple):
    """input [N, D], linear_weight [V, D], target [N], linear_bias [V], weight fp32 [V]; row_grad
    fp32 [N], all ones where None; wanted: gradients of input, linear_weight and linear_bias; keep:
    the logits' gradient in place of linear_weight's, where `keeps_logits` says so, of so many rows
    (all that were given, whichever count)."""

    input: Tensor
    linear_weight: Tensor
    target: Tensor
    linear_bias: Tensor | None
    weight: Tensor | None
    ignore_index: int
    label_smoothing: float
    row_grad: Tensor | None
    wanted: tuple[bool, bool, bool]
    keep: int = 0


def keeps_logits(rows: int, width: int, classes: int, itemsize: int = 4) -> bool:
    """Whether the logits' gradient is held until the backward, and linear_weight's made there.

    In fp32, by class, where rows are so few that it is the smaller of the two, and one chunk as any
    other call has; scaling it is free. 32 rows of 2304 and 256000 classes: a copy of the 2.4 GB of
    linear_weight's gradient for an incoming gradient that is not 1 would take as long as all else.
    In 16 bits, where it is smaller than linear_weight's in fp32. Adding chunks of that up took as
    long as the products of AMX: 512 rows of 768 and 50257 classes 0.55 s, now 0.27 (PyTorch 0.32).
    """
    if classes <= CLASSES or rows <= 0:
        return False
    if itemsize == 2:
        return rows <= 2 * width
    return rows <= min(width, chunk_rows(rows, classes))


def chunk_rows(rows: int, classes: int) -> int:
    """Rows per chunk: by shape alone, so that results do not depend on the machine."""
    fit = max(16, CHUNK // max(1, classes))
    fit = min(fit, max(FEWEST_ROWS, -(-rows // CHUNKS)))
    return _equal(rows, fit)


def _equal(rows: int, most: int) -> int:
    """The size of equal chunks of rows, of at most so many."""
    return -(-rows // max(1, -(-rows // most)))


def product_into(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """out = a b, or out + a b: torch's own, under autocast too, which leaves these alone."""
    if add:
        out.addmm_(a, b)
    else:
        torch.mm(a, b, out=out)


def sums(
    losses_of: Callable[..., Any],
    gradient_of_: Callable[..., None],
    call: Call,
    into: Callable[..., None] = product_into,
    wide: bool = False,
) -> Sums:
    """wide: `into` adds products of 16 bits to fp32."""
    return _of_counted(call, lambda some: _sums(losses_of, gradient_of_, some, into, wide))


def sums_of_all(
    losses_of: Callable[..., Any], gradient_of_: Callable[..., None], call: Call
) -> Sums:
    """The logits of ignored rows too: to count the others a GPU would have to be waited for, which
    a CUDA graph cannot hold. As of zeros: what such a row holds, NaN too, must reach no sum."""
    kept = (call.target != call.ignore_index)[:, None]
    whole = call._replace(input=torch.where(kept, call.input, 0.0))
    return _sums(losses_of, gradient_of_, whole, product_into, wide=False)


def sums_by_class(
    losses_of: Callable[..., Any],
    gradient_of_: Callable[..., None],
    call: Call,
    into: Callable[..., None] = product_into,
) -> Sums:
    if len(call.linear_weight) > CLASSES:
        return _of_counted(call, lambda some: _sums_by_class(losses_of, gradient_of_, some, into))
    bias = call.linear_bias
    wide = call._replace(
        input=call.input.float(),
        linear_weight=call.linear_weight.float(),
        linear_bias=None if bias is None else bias.float(),
    )
    found = sums(losses_of, gradient_of_, wide)
    dinput = found.dinput
    return found._replace(dinput=None if dinput is None else dinput.to(call.input.dtype))


def _of_counted(call: Call, run: Callable[[Call], Sums]) -> Sums:
    """run(call) over the rows that count: of prompts and padding no logits are computed at all."""
    counted = call.target != call.ignore_index
    if bool(counted.all()):
        return run(call)
    kept, row_grad = counted.nonzero()[:, 0], call.row_grad
    some = run(
        call._replace(
            input=call.input[kept],
            target=call.target[kept],
            row_grad=None if row_grad is None else row_grad[kept],
        )
    )
    losses = some.losses.new_zeros(call.target.shape).index_copy_(0, kept, some.losses)
    dinput, dweight = some.dinput, some.dweight
    if dinput is not None:
        dinput = dinput.new_zeros(call.input.shape).index_copy_(0, kept, dinput)
    return Sums(losses, dinput, dweight, some.dbias)


def _sums(
    losses_of: Callable[..., Any],
    gradient_of_: Callable[..., None],
    call: Call,
    into: Callable[..., None],
    wide: bool,
) -> Sums:
    input, linear_weight, target, linear_bias, weight, ignore_index, smoothing, row_grad, wanted = (
        call[:9]
    )
    (rows, _), classes = input.shape, linear_weight.shape[0]
    losses = input.new_empty(rows, dtype=torch.float32)
    if row_grad is None:
        row_grad = torch.ones_like(losses)
    dinput = torch.empty_like(input, memory_format=torch.contiguous_format) if wanted[0] else None
    dweight = dbias = part = None
    if wanted[1] and not call.keep:
        fresh = torch.empty_like if rows else torch.zeros_like
        dweight = fresh(linear_weight, dtype=torch.float32, memory_format=torch.contiguous_format)
        if input.dtype != torch.float32 and not wide:
            part = torch.empty_like(dweight, dtype=input.dtype)
    if wanted[2]:
        dbias = input.new_zeros(classes, dtype=torch.float32)
    step = chunk_rows(rows, classes)
    buffer = input.new_empty(call.keep or step, classes)
    how = (ignore_index, smoothing, 0.0, _NO_REDUCTION)
    for begin in range(0, rows, max(step, 1)):
        here = slice(begin, begin + step)
        x, t = input[here], target[here]
        logits = buffer[here] if call.keep else buffer[: len(x)]
        if linear_bias is None:
            into(x, linear_weight.t(), logits)
        else:
            torch.addmm(linear_bias, x, linear_weight.t(), out=logits)
        losses[here], lse = losses_of(logits, t, weight, *how, torch.float32)
        if not any(wanted):
            continue
        gradient_of_(row_grad[here], logits, t, weight, lse, *how)
        if dinput is not None:
            into(logits, linear_weight, dinput[here])
        if dweight is not None:
            into(logits.t(), x, dweight if part is None else part, part is None and begin > 0)
        if dweight is not None and part is not None:
            dweight.copy_(part) if begin == 0 else dweight.add_(part)
        if dbias is not None:
            dbias += logits.sum(0, dtype=torch.float32)
    return Sums(losses, dinput, buffer.view(-1) if call.keep else dweight, dbias)


# ---- by class ------------------------------------------------------------------------------------


class _Run(NamedTuple):
    """Consecutive classes, and of a chunk of rows their logits, fp32 and dense."""

    classes: slice
    logits: Tensor  # [n, classes]; then the gradient
    inside: Tensor  # [n], the target is one of them
    local: Tensor  # [n], which of them; 0 elsewhere


def _sums_by_class(
    losses_of: Callable[..., Any],
    gradient_of_: Callable[..., None],
    call: Call,
    into: Callable[..., None],
) -> Sums:
    input, linear_weight, target, weight, wanted = (
        call.input, call.linear_weight, call.target, call.weight, call.wanted,
    )  # fmt: skip
    (rows, _), classes, smoothing = input.shape, linear_weight.shape[0], call.label_smoothing
    losses = input.new_empty(rows, dtype=torch.float32)
    dinput = input.new_empty(input.shape) if wanted[0] else None
    fresh = losses.new_empty if rows else losses.new_zeros
    dweight = fresh(linear_weight.shape) if wanted[1] and not call.keep else None
    dbias = losses.new_zeros(classes) if wanted[2] else None
    whole = any(wanted)
    step = chunk_rows(rows, classes) if whole else _equal(rows, MOST_ROWS)
    # What is kept is one chunk, of a size that may not depend on the targets.
    buffer = losses.new_empty((call.keep or step) * (classes if whole else CLASSES))
    even = smoothing / classes
    for begin in range(0, rows, max(step, 1)):
        here = slice(begin, begin + step)
        x, own = input[here].float(), 1.0 if weight is None else weight[target[here]].double()
        runs, lse, picked, level = _logits(losses_of, call, x, target[here], buffer, whole, into)
        loss = (lse - picked) * own
        total: Any = classes if weight is None else weight.sum(dtype=torch.float64)
        if smoothing > 0:
            loss = (1 - smoothing) * loss + even * (total * lse - level)
        losses[here] = loss
        if not whole:
            continue
        # loss_i's gradient: toward (softmax - onehot) + rest softmax - even weight.
        grad = losses.new_ones(len(x)) if call.row_grad is None else call.row_grad[here]
        toward, spread = grad.double() * own * (1 - smoothing), grad.double() * even
        dx = None if dinput is None else torch.empty_like(x)
        for run in runs:
            w, g = linear_weight[run.classes].float(), run.logits
            near = torch.where(run.inside, toward, 0.0).float()
            far = toward + spread * total - near
            gradient_of_(near, g, run.local, None, lse, -1, 0.0, 0.0, _NO_REDUCTION, far)
            if smoothing > 0:
                g -= spread.float()[:, None] * (1.0 if weight is None else weight[run.classes])
            if dx is not None:
                into(g, w, dx, run.classes.start > 0)
            if dweight is not None:
                into(g.t(), x, dweight[run.classes], begin > 0)
            if dbias is not None:
                dbias[run.classes] += g.sum(0)
        if dinput is not None and dx is not None:
            dinput[here] = dx
    return Sums(losses, dinput, buffer if call.keep else dweight, dbias)


def weight_gradient(
    kept: Tensor,
    input: Tensor,
    target: Tensor,
    ignore_index: int,
    factor: Tensor,
    classes: int,
    into: Callable[..., None] = product_into,
) -> Tensor:
    """factor times linear_weight's gradient [V, D], of the logits' [N * V] that a call kept: by
    class in fp32, in rows in 16 bits. The factor goes to x, which is the smaller: of [128256, 2048]
    it took 0.24 s of 0.87. But fp16's x might underflow."""
    x = input[target != ignore_index]
    half = input.dtype == torch.float16
    if not half:
        x = x * factor
    if input.dtype != torch.float32:
        grads = kept[: len(x) * classes].view(len(x), classes)
        dweight = x.new_empty(classes, x.shape[1])
        into(grads.t(), x, dweight)
        return dweight.mul_(factor) if half else dweight
    dweight = x.new_empty(classes, x.shape[1]) if len(x) else x.new_zeros(classes, x.shape[1])
    for here, logits in _runs(kept, len(x), classes) if len(x) else ():
        into(logits.t(), x, dweight[here])
    return dweight


def _runs(
    buffer: Tensor, rows: int, classes: int, keep: bool = True
) -> Iterator[tuple[slice, Tensor]]:
    """Consecutive classes and the place of their logits: one run behind the other, or over it."""
    for begin in range(0, classes, CLASSES):
        end = min(begin + CLASSES, classes)
        at = rows * begin if keep else 0
        yield slice(begin, end), buffer[at : at + rows * (end - begin)].view(rows, end - begin)


def _logits(
    losses_of: Callable[..., Any],
    call: Call,
    x: Tensor,
    target: Tensor,
    buffer: Tensor,
    keep: bool,
    into: Callable[..., None],
) -> tuple[list[_Run], Tensor, Tensor, Tensor]:
    """The runs of classes, whose logits are kept or overwritten one by the other; and of each row,
    fp64: the log-sum-exp, the target's logit, the sum of all logits times their class's weight (for
    label smoothing)."""
    n, classes, smooth = len(x), len(call.linear_weight), call.label_smoothing > 0
    runs, lses = [], []
    picked, level = x.new_zeros((2, n), dtype=torch.float64)
    for here, logits in _runs(buffer, n, classes, keep):
        into(x, call.linear_weight[here].float().t(), logits)
        if call.linear_bias is not None:
            logits += call.linear_bias[here]
        inside = (target >= here.start) & (target < here.stop)
        # A row whose target is elsewhere takes class 0 in its place: only its lse counts.
        local = torch.where(inside, target - here.start, 0)
        lses.append(losses_of(logits, local, None, -1, 0.0, 0.0, _NO_REDUCTION, torch.float32)[1])
        of_target = logits.gather(1, local[:, None].long())[:, 0]
        picked += torch.where(inside, of_target, 0.0)
        if smooth:
            own = call.weight
            level += logits.sum(1) if own is None else _product(logits, own[here, None])[:, 0]
        runs.append(_Run(here, logits, inside, local))
    return runs, torch.stack(lses).logsumexp(0), picked, level


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in fp32 under autocast, too, which lets a product with `out` alone."""
    return torch.mm(a, b, out=a.new_empty(len(a), b.shape[1]))
