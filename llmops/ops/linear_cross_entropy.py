"""linear_cross_entropy: the last projection and its loss, without ever holding all logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmops import reference
from llmops.backends import get
from llmops.backends._linear_cross_entropy import keeps_logits
from llmops.dispatch import resolve
from llmops.ops import _autocast, _check, _dtensor
from llmops.ops._op import Op, is_plain
from llmops.ops.cross_entropy import (
    _wide_weight,
    check_numbers,
    check_range,
    check_target,
    loss_dtype,
)

_is_compiling = torch.compiler.is_compiling


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """cross_entropy(input @ linear_weight.T + linear_bias, target), as torch.nn.functional's.

    The logits [N, V] are made and used a chunk of rows at a time (at most 32 million, and at most
    half of the rows where that leaves 256 or more): that chunk is all of them that ever exists.

    "mean" and "sum" compute the gradients in the forward pass, while a chunk's logits are there:
    three matrix products in all, as in a step that keeps its logits, where computing the logits
    again in the backward would make it four. That holds the gradients (linear_weight's in fp32)
    from forward to backward, and the backward only scales them by the incoming gradient. Of few
    fp32 rows on a CPU, at most D and 256 and in one chunk, it holds the logits' gradient instead,
    which is smaller than linear_weight's, and makes that one in the backward. Which gradients are
    computed follows from what requires one: a call under no_grad computes none. With "none", where
    each row has an incoming gradient of its own, the backward makes the logits again. torch's
    `options`, which choose among such strategies, have no counterpart here.

    Args:
        input: [N, D] or [D], fp32/bf16/fp16 (fp64 on the reference).
        linear_weight: [V, D], input's dtype. [V, d1, ..., D], a loss of several dimensions, runs on
            the reference.
        target: class indices [N] or [], int64 or int32, each in [0, V) or ignore_index; or
            probabilities [N, V] or [V], on the reference.
        linear_bias: [V], input's dtype (linear_weight's shape without D).
        weight: [V], floating point: of each class. No gradient.
        ignore_index: rows of this target have no loss and no gradient. On a CPU their logits are
            not even computed; on a GPU, which would have to be waited for to count them, they are:
            where most rows are ignored, pass input[kept] and target[kept]. None is -100.
        label_smoothing: in [0, 1], as in `llmops.cross_entropy`.
        reduction: "none", "sum" or "mean", as in `llmops.cross_entropy`.
        dtype: of the loss; input's when None (fp32 under autocast).
        backend: "cpu", "triton", "cuda", "reference" or "auto"; None follows use_backend.

    Returns:
        Tensor of target's shape ("none"), else a scalar.

    Raises:
        IndexError: a target outside [0, V) that is not ignore_index, naming it. A GPU, which is not
            waited for, gives a loss of NaN instead.
        TypeError, ValueError: naming the argument, what was expected and what came.
        NotImplementedError: a named backend cannot serve the call, or weight requires a gradient.

    Numerics: logits are rounded to input's dtype, as a matrix product does, or stay in fp32 where
    the product is done in it (CPUs without a 16-bit one), in fp32 as by `llmops.linear`; the loss
    as in `llmops.cross_entropy`.
    The gradients of linear_weight and linear_bias are added up in fp32 over the chunks; of 16-bit
    inputs the mean's division and a loss scale enter after that, with one rounding, so that fp16
    does not underflow.

    DTensors: input may be split by rows, linear_weight by classes; in the second case each rank
    holds its classes' logits, [N, V / ranks], at once.

    Source: Hsu et al., "Liger Kernel", 2024; Wijmans et al., "Cut Your Losses in Large-Vocabulary
    Language Models", 2024.
    """
    if ignore_index is None:
        ignore_index = -100
    if _autocast.enabled(input):
        dtype = loss_dtype("linear_cross_entropy", input, dtype or torch.float32)
        input, linear_weight, linear_bias = _autocast.lowered(input, linear_weight, linear_bias)
    features = _check_arguments(input, linear_weight, target, linear_bias, weight, ignore_index)
    check_numbers("linear_cross_entropy", label_smoothing, reduction)
    dtype = loss_dtype("linear_cross_entropy", input, dtype)
    widest = torch.float64 if dtype == torch.float64 else input.dtype
    name = resolve("linear_cross_entropy", input.device, widest, features, backend)
    if name == "reference":
        if "probability targets" not in features and not _is_compiling():
            _check_range(target, linear_weight, ignore_index)
        return reference.linear_cross_entropy(
            input,
            linear_weight,
            target,
            linear_bias=linear_bias,
            weight=weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction=reduction,
            dtype=dtype,
        )
    one = input.dim() == 1
    ahead = reduction != "none" and torch.is_grad_enabled()
    arguments = (
        input[None] if one else input,
        linear_weight,
        target[None] if one else target,
        linear_bias,
        weight,
        ignore_index,
        label_smoothing,
        reduction,
        dtype,
    )
    wanted = (
        ahead and input.requires_grad,
        ahead and linear_weight.requires_grad,
        ahead and linear_bias is not None and linear_bias.requires_grad,
    )
    if _dtensor.is_distributed(input, linear_weight):
        from llmops.distributed import _losses

        loss = _losses.linear_cross_entropy(*arguments, wanted, name)
    else:
        keep = name == "cpu" and wanted[1] and _holds_logits(input.dtype)
        classes, width = linear_weight.shape
        keep = keep and keeps_logits(len(arguments[0]), width, classes, input.dtype.itemsize)
        loss = _linear_cross_entropy(*arguments, *wanted, keep, name)[0]
    return loss[0] if one and reduction == "none" else loss


def _holds_logits(dtype: torch.dtype) -> bool:
    return bool(get("cpu").holds_logits(dtype))


# As in dispatch.py: a compiler need not trace how the processor was asked. torch's own mark, of
# which mypy knows nothing.
_holds_logits._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _check_arguments(
    input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None,
    weight: Tensor | None, ignore_index: int,
) -> tuple[str, ...]:  # fmt: skip
    """Checks the tensors; returns the features that need the reference."""
    op = "linear_cross_entropy"
    _check.floating(op, "input", input)
    _check.floating(op, "linear_weight", linear_weight)
    if input.dim() not in (1, 2):
        raise ValueError(
            f"llmops.{op}: input must be [N, D] or [D]; got shape {tuple(input.shape)}; "
            "for [B, T, D] use input.flatten(0, 1) and target.flatten()"
        )
    if linear_weight.dim() < 2 or linear_weight.shape[-1] != input.shape[-1]:
        raise ValueError(
            f"llmops.{op}: linear_weight must be [V, {input.shape[-1]}], as input's last dimension "
            f"is; got shape {tuple(linear_weight.shape)}"
        )
    classes, *several = linear_weight.shape[:-1]
    if several and input.dim() == 1:
        raise ValueError(
            f"llmops.{op}: linear_weight of shape {tuple(linear_weight.shape)} needs input [N, D]; "
            f"got shape {tuple(input.shape)}; use input[None]"
        )
    others = [("linear_weight", linear_weight)]
    if linear_bias is not None:
        _check.floating(op, "linear_bias", linear_bias)
        if linear_bias.shape != linear_weight.shape[:-1]:
            raise ValueError(
                f"llmops.{op}: linear_bias must be {list(linear_weight.shape[:-1])}, as "
                f"linear_weight is without D; got shape {tuple(linear_bias.shape)}"
            )
        others.append(("linear_bias", linear_bias))
    for name, other in others:
        _check.same_device(op, "input", input, name, other)
        if other.dtype != input.dtype:
            raise TypeError(
                f"llmops.{op}: {name} must be {_check.dtype_name(input.dtype)}, as input is; got "
                f"{_check.dtype_name(other.dtype)}; convert one, e.g. {name}.to(input.dtype)"
            )
    rows = (*input.shape[:-1], *several)
    logits = (*input.shape[:-1], classes, *several)
    if check_target(op, target, rows, logits, classes, input, weight, ignore_index):
        return ("probability targets",)
    return ("multi-dimensional linear_weight",) if several else ()


def _check_range(target: Tensor, linear_weight: Tensor, ignore_index: int) -> None:
    classes = linear_weight.shape[0]
    check_range("linear_cross_entropy", target, classes, ignore_index, "linear_weight")


# ---- the operators -------------------------------------------------------------------------------


def _sums(
    input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None,
    weight: Tensor | None, ignore_index: int, label_smoothing: float, row_grad: Tensor | None,
    wanted: tuple[bool, bool, bool], backend: str, keep: bool = False,
) -> Any:  # fmt: skip
    return get(backend).linear_cross_entropy(
        input, linear_weight, target, linear_bias, _wide_weight(weight), ignore_index,
        label_smoothing, row_grad, wanted, len(input) if keep else 0,
    )  # fmt: skip


def _divisor(
    target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str, backend: str
) -> tuple[Tensor, Tensor]:
    """What the reduction divides by, fp64, and whether any row counts; nothing is waited for."""
    kept = target != ignore_index
    some = kept.any()
    if reduction != "mean":
        return torch.ones((), dtype=torch.float64, device=target.device), some
    if weight is None:
        return kept.sum(dtype=torch.float64), some
    kept = kept & (target >= 0) & (target < len(weight))
    wide = torch.cat((weight.double(), weight.new_zeros(1, dtype=torch.float64)))
    return _ordered_sum(wide[torch.where(kept, target, len(weight))], backend), some


def _divides_ahead(input: Tensor, reduction: str) -> bool:
    """Whether the gradients made in the forward are the mean's. fp16's might underflow."""
    return reduction == "mean" and input.dtype != torch.float16


def _ordered_sum(values: Tensor, backend: str) -> Tensor:
    """In fp64; on a CPU in order: the same bits for any number of threads, which sum() does not
    promise there. On a GPU it is cumsum that does not."""
    if backend != "cpu":
        return values.sum(dtype=torch.float64)
    return torch.cat((values.new_zeros(1), values)).double().cumsum(0)[-1]


def _empty(like: Tensor) -> Tensor:
    """In the place of a gradient that no one wants."""
    return like.new_empty(0)


def _forward(
    input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None,
    weight: Tensor | None, ignore_index: int, label_smoothing: float, reduction: str,
    dtype: torch.dtype, want_input: bool, want_weight: bool, want_bias: bool, keep_logits: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if backend != "cpu":
        backend = resolve("linear_cross_entropy", input.device, input.dtype, (), backend)
    if backend == "reference":
        loss = reference.linear_cross_entropy(
            input, linear_weight, target, linear_bias=linear_bias, weight=weight,
            ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=reduction,
            dtype=dtype,
        )  # fmt: skip
        return loss, _empty(input), _empty(input), _empty(input)
    if backend == "cpu":
        _check_range(target, linear_weight, ignore_index)
    wanted, row_grad = (want_input, want_weight, want_bias), None
    divisor, some = _divisor(target, weight, ignore_index, reduction, backend)
    if any(wanted) and _divides_ahead(input, reduction):
        row_grad = torch.where(some, 1 / divisor, divisor).float().expand(target.shape)
    found = _sums(
        input, linear_weight, target, linear_bias, weight, ignore_index, label_smoothing, row_grad,
        wanted, backend, keep_logits,
    )  # fmt: skip
    if reduction == "none":
        loss = found.losses.to(dtype, copy=True)
    else:
        loss = (_ordered_sum(found.losses, backend) / divisor).to(dtype)
    dinput, dweight, dbias = (_empty(input) if g is None else g for g in found[1:])
    return loss, dinput, dweight, dbias


def _fake(
    input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None,
    weight: Tensor | None, ignore_index: int, label_smoothing: float, reduction: str,
    dtype: torch.dtype, want_input: bool, want_weight: bool, want_bias: bool, keep_logits: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    def wide(shape: Any, wanted: bool, dtype: torch.dtype = torch.float32) -> Tensor:
        if not wanted or backend == "reference":
            return _empty(input)
        return input.new_empty(shape, dtype=dtype)

    kept = (len(input) * len(linear_weight),)
    return (
        input.new_empty(target.shape if reduction == "none" else (), dtype=dtype),
        input.new_empty(input.shape) if want_input and backend != "reference" else _empty(input),
        wide(kept, want_weight, input.dtype)
        if keep_logits
        else wide(linear_weight.shape, want_weight),
        wide(linear_weight.shape[:1], want_bias),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    input, linear_weight, target, linear_bias, weight, *how = inputs[:8]
    ctx.how, ctx.backend = how, inputs[-1]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(input, linear_weight, target, linear_bias, weight, *output[1:])


def _backward(ctx: Any, grad: Tensor | None, *_unused: Any) -> tuple[Any, ...]:
    needs = ctx.needs_input_grad
    if needs[4]:
        raise NotImplementedError(
            "llmops.linear_cross_entropy: weight takes no gradient; pass weight.detach()"
        )
    wanted = (needs[0], needs[1], needs[3])
    if grad is None or not any(wanted):
        return (None,) * 14
    saved = ctx.saved_tensors  # once: a hook may bring them from far away
    held = _held(ctx, grad, saved, wanted)
    if held is not None:
        return held[0], held[1], None, held[2], *(None,) * 10
    found = _linear_cross_entropy_bwd(grad, *saved, *ctx.how, *wanted, ctx.backend)
    dinput, dweight, dbias = (g if want else None for g, want in zip(found, wanted, strict=True))
    return dinput, dweight, None, dbias, *(None,) * 10


def _held(
    ctx: Any, grad: Tensor, saved: tuple[Tensor, ...], wanted: tuple[bool, ...]
) -> tuple[Tensor | None, ...] | None:
    """The gradients of the forward themselves where they are the answer, as under loss.backward():
    of 50257 x 768 a scaled copy takes 0.13 s beside 1.9 s for all else. Whoever writes into one and
    then goes backward again is told so by its version."""
    input, linear_weight, _, linear_bias, _, *made = saved
    if input.dtype != torch.float32 or torch.is_grad_enabled() or not is_plain(grad):
        return None
    if ctx.how[2] not in ("mean", "sum") or ctx.backend != "cpu" or float(grad) != 1.0:
        return None
    pairs = list(zip(made, (input, linear_weight, linear_bias), wanted, strict=True))
    if any(want and (x is None or g.shape != x.shape) for g, x, want in pairs):
        return None
    return tuple(g if want else None for g, _, want in pairs)


def _forward_bwd(
    grad: Tensor, input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None,
    weight: Tensor | None, dinput: Tensor, dweight: Tensor, dbias: Tensor, ignore_index: int,
    label_smoothing: float, reduction: str, want_input: bool, want_weight: bool, want_bias: bool,
    backend: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    if backend != "cpu":
        backend = resolve("linear_cross_entropy", input.device, input.dtype, (), backend)
    wanted = (want_input, want_weight, want_bias)
    likes = (input, linear_weight, linear_bias)
    if backend == "reference":
        return reference.linear_cross_entropy_bwd(
            grad, input, linear_weight, target, linear_bias, weight, dinput, dweight, dbias,
            ignore_index, label_smoothing, reduction, *wanted,
        )  # fmt: skip
    pairs = list(zip((dinput, dweight, dbias), likes, wanted, strict=True))
    kept = want_weight and dweight.numel() > 0 and dweight.dim() == 1
    made = all(
        x is None or g.shape == x.shape or (kept and x is linear_weight)
        for g, x, want in pairs
        if want
    )
    factor = grad.float()
    if not (made and _divides_ahead(input, reduction)):
        divisor, some = _divisor(target, weight, ignore_index, reduction, backend)
        # Where no row counts, the mean divides 0 by 0; the gradient is zero all the same.
        factor = torch.where(some, grad.double() / divisor, 0.0).float()
    if made:
        # torch.mul rounds once, to the gradient's dtype.
        dx, dw, db = (
            torch.mul(g, factor, out=torch.empty(x.shape, dtype=x.dtype, device=x.device))
            if want and x is not None and g.shape == x.shape
            else _empty(input)
            for g, x, want in pairs
        )
        if want_input:
            # 0 without a loss: where the weights that count add up to 0 or grad is inf, too.
            dx.masked_fill_((target == ignore_index)[:, None], 0.0)
        if kept:
            dw = get(backend).linear_cross_entropy_weight_gradient(
                dweight, input, target, ignore_index, factor, len(linear_weight)
            )
        return dx, dw, db
    # Not made in the forward: each row has a gradient of its own, or no one had asked for them.
    found = _sums(
        input, linear_weight, target, linear_bias, weight, ignore_index, label_smoothing,
        factor.expand(target.shape).contiguous(), wanted, backend,
    )  # fmt: skip
    return tuple(
        _empty(input) if g is None or x is None else g.to(x.dtype)
        for g, x in zip(found[1:], likes, strict=True)
    )


def _fake_bwd(
    grad: Tensor, input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None,
    weight: Tensor | None, dinput: Tensor, dweight: Tensor, dbias: Tensor, ignore_index: int,
    label_smoothing: float, reduction: str, want_input: bool, want_weight: bool, want_bias: bool,
    backend: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    return tuple(
        x.new_empty(x.shape) if want and x is not None else _empty(input)
        for want, x in (
            (want_input, input),
            (want_weight, linear_weight),
            (want_bias, linear_bias),
        )
    )


_linear_cross_entropy_bwd = Op(
    "linear_cross_entropy_bwd(Tensor grad, Tensor input, Tensor linear_weight, Tensor target, "
    "Tensor? linear_bias, Tensor? weight, Tensor dinput, Tensor dweight, Tensor dbias, "
    "int ignore_index, float label_smoothing, str reduction, bool want_input, bool want_weight, "
    "bool want_bias, str backend) -> (Tensor, Tensor, Tensor)",
    forward=_forward_bwd,
    fake=_fake_bwd,
    reference=reference.linear_cross_entropy_bwd,
)
# Results beside the loss: gradients of the sum of the rows' losses with respect to input [N, D],
# linear_weight and linear_bias (fp32), empty where not wanted. They take no gradient themselves.
# keep_logits: in linear_weight's place that of the logits of the rows that count, [N * V].
_linear_cross_entropy = Op(
    "linear_cross_entropy(Tensor input, Tensor linear_weight, Tensor target, Tensor? linear_bias, "
    "Tensor? weight, int ignore_index, float label_smoothing, str reduction, ScalarType dtype, "
    "bool want_input, bool want_weight, bool want_bias, bool keep_logits, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    forward=_forward,
    fake=_fake,
    setup=_setup,
    backward=_backward,
)
