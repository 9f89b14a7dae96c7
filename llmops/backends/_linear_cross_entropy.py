"""linear_cross_entropy for any backend that has cross_entropy: logits a few rows at a time.

The matrix products are torch's own; the loss and its gradient are the backend's kernels, the
gradient in place over the logits it came from. Where torch has no 16-bit product worth the name
(CPUs before AVX-512), `wide` says so: operands are then widened to fp32, some classes at a time.

On a CPU the rows that count are gathered first. How many there are a GPU would have to be asked and
waited for, which a CUDA graph cannot hold: there logits of all rows are computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

# A chunk of logits: large enough that the products run at their full rate and that reading and
# writing dweight once per chunk is small beside computing it, small beside the logits of a batch.
CHUNK_BYTES = 64 << 20
# And at most a quarter of the rows, but not fewer rows than a matrix product needs: the product for
# the logits runs at 0.9 of its rate with 128 rows and at 0.7 with 64, beside 256.
CHUNKS, FEWEST_ROWS = 4, 128
_NO_REDUCTION = 0
# Classes whose weights are widened at once: their fp32 copy stays in the cache beside its products.
WIDE_CLASSES = 2048


class Sums(NamedTuple):
    """Losses of the rows, fp32, and gradients of sum_i row_grad_i loss_i: None where not wanted."""

    losses: Tensor  # [N]
    dinput: Tensor | None  # [N, D], input's dtype
    dweight: Tensor | None  # [V, D], fp32
    dbias: Tensor | None  # [V], fp32


def chunk_rows(rows: int, classes: int, itemsize: int) -> int:
    """Rows per chunk: by shape and dtype alone, so that results do not depend on the machine."""
    fit = max(16, CHUNK_BYTES // max(1, classes * itemsize))
    fit = min(fit, max(FEWEST_ROWS, -(-rows // CHUNKS)))
    return -(-rows // max(1, -(-rows // fit)))  # chunks of equal size


def sums(
    losses_of: Callable[..., tuple[Tensor, Tensor]],
    gradient_of_: Callable[..., None],
    gathers: bool,
    wide: bool,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    row_grad: Tensor | None,
    wanted: tuple[bool, bool, bool],
) -> Sums:
    """input [N, D], linear_weight [V, D], target [N], linear_bias [V], weight fp32 [V]; row_grad
    fp32 [N], all ones where None; wanted: gradients of input, linear_weight and linear_bias;
    gathers: ignored rows may be left out; wide: 16-bit products are to be done in fp32."""
    counted = target != ignore_index
    if gathers and not bool(counted.all()):
        return _without_ignored(
            counted.nonzero()[:, 0], losses_of, gradient_of_, wide, input, linear_weight, target,
            linear_bias, weight, ignore_index, label_smoothing, row_grad, wanted,
        )  # fmt: skip
    (rows, _), classes = input.shape, linear_weight.shape[0]
    losses = input.new_empty(rows, dtype=torch.float32)
    if row_grad is None:
        row_grad = torch.ones_like(losses)
    dinput = torch.empty_like(input, memory_format=torch.contiguous_format) if wanted[0] else None
    dweight = dbias = part = None
    if wanted[1]:
        dweight = torch.zeros_like(
            linear_weight, dtype=torch.float32, memory_format=torch.contiguous_format
        )
        if input.dtype != torch.float32 and not wide:
            part = torch.empty_like(dweight, dtype=input.dtype)
    if wanted[2]:
        dbias = input.new_zeros(classes, dtype=torch.float32)
    step = chunk_rows(rows, classes, input.element_size())
    buffer = input.new_empty(step, classes)
    for begin in range(0, rows, max(step, 1)):
        here = slice(begin, begin + step)
        x, t = input[here], target[here]
        if not gathers:  # what an ignored row holds, NaN too, reaches no sum: 0 * NaN is NaN
            x = torch.where(counted[here, None], x, 0.0)
        logits = buffer[: len(x)]
        if wide:
            x = x.float()
            _wide_logits(x, linear_weight, linear_bias, logits)
        elif linear_bias is None:
            torch.mm(x, linear_weight.t(), out=logits)
        else:
            torch.addmm(linear_bias, x, linear_weight.t(), out=logits)
        how: tuple[Any, ...] = (ignore_index, label_smoothing, 0.0, _NO_REDUCTION)
        losses[here], lse = losses_of(logits, t, weight, *how, torch.float32)
        if not any(wanted):
            continue
        gradient_of_(row_grad[here], logits, t, weight, lse, *how)
        if wide:
            _wide_gradients(
                x, linear_weight, logits, None if dinput is None else dinput[here], dweight
            )
        elif dinput is not None:
            torch.mm(logits, linear_weight, out=dinput[here])
        if part is not None and dweight is not None:
            dweight += torch.mm(logits.t(), x, out=part)
        elif dweight is not None and not wide:
            dweight.addmm_(logits.t(), x)
        if dbias is not None:
            dbias += logits.sum(0, dtype=torch.float32)
    return Sums(losses, dinput, dweight, dbias)


def _wide_logits(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out [n, V] = x weight^T + bias, in fp32 (x is), rounded once to out's dtype."""
    for begin in range(0, len(weight), WIDE_CLASSES):
        here = slice(begin, begin + WIDE_CLASSES)
        logits = x @ weight[here].float().t()
        out[:, here] = logits if bias is None else logits.add_(bias[here])


def _wide_gradients(
    x: Tensor, weight: Tensor, grad: Tensor, dinput: Tensor | None, dweight: Tensor | None
) -> None:
    """dinput [n, D] = grad weight, rounded once; dweight [V, D] += grad^T x, which is fp32."""
    total = x.new_zeros(x.shape)
    for begin in range(0, len(weight), WIDE_CLASSES):
        here = slice(begin, begin + WIDE_CLASSES)
        g = grad[:, here].float()
        if dinput is not None:
            total.addmm_(g, weight[here].float())
        if dweight is not None:
            dweight[here].addmm_(g.t(), x)
    if dinput is not None:
        dinput.copy_(total)


def _without_ignored(
    kept: Tensor, losses_of: Any, gradient_of_: Any, wide: bool, input: Tensor,
    linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None, weight: Tensor | None,
    ignore_index: int, label_smoothing: float, row_grad: Tensor | None,
    wanted: tuple[bool, bool, bool],
) -> Sums:  # fmt: skip
    """The same over the rows that count: of prompts and padding no logits are computed at all."""
    some = sums(
        losses_of, gradient_of_, True, wide, input[kept], linear_weight, target[kept], linear_bias,
        weight, ignore_index, label_smoothing, None if row_grad is None else row_grad[kept], wanted,
    )  # fmt: skip
    losses = some.losses.new_zeros(input.shape[0]).index_copy_(0, kept, some.losses)
    dinput = some.dinput
    if dinput is not None:
        dinput = input.new_zeros(input.shape).index_copy_(0, kept, dinput)
    return Sums(losses, dinput, some.dweight, some.dbias)
