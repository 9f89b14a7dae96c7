"""cross_entropy: the loss of logits against class indices, in one pass over the logits each way."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from llmops import reference
from llmops.backends import get
from llmops.backends._measured import size_of
from llmops.dispatch import resolve
from llmops.ops import _check, _dtensor
from llmops.ops._op import Op, is_tracing, shortcut

REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
_is_compiling = torch.compiler.is_compiling


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """Cross-entropy of logits and target classes, as torch.nn.functional.cross_entropy.

    With lse = log sum_j exp(x_j), w the class weights (1 where none) and s the label smoothing:

    loss = (1 - s) w_t (lse - x_t) + (s / C) sum_j w_j (lse - x_j) + z_loss lse^2

    Args:
        input: logits [C], [N, C] or [N, C, d1, ...], fp32/bf16/fp16 (fp64 on the reference), any
            strides: [B, T, V].transpose(1, 2) costs nothing.
        target: class indices, int64 or int32, of input's shape without C, each in [0, C) or
            ignore_index. Or class probabilities, floating point, of input's shape: these run on the
            reference, in plain PyTorch, differentiable in both.
        weight: [C], floating point: of each class. No gradient.
        ignore_index: rows of this target have no loss and no gradient, and their logits are not
            read. With probabilities it must stay negative, as in torch.
        label_smoothing: in [0, 1]: this share of the target is spread over all classes.
        z_loss: weight of lse^2 (PaLM's auxiliary loss; 1e-4 there), which keeps the normalizer near
            1. It speaks of the row, not of the class: class weights do not touch it, and under
            "mean" it is averaged over the rows that are not ignored.
        reduction: "none", "sum" or "mean". The mean divides by the sum of the targets' weights, or
            for probabilities by the number of rows; nothing to average gives NaN.
        dtype: of the loss; input's when None. bf16 logits can so give an fp32 loss with no fp32
            copy of them.
        backend: "cpu", "triton", "cuda", "reference" or "auto"; None follows use_backend.

    Returns:
        Tensor of target's shape ("none"; for probabilities input's without C), else a scalar.

    Raises:
        IndexError: a target outside [0, C) that is not ignore_index, naming it.
        TypeError, ValueError: naming the argument, what was expected and what came.
        NotImplementedError: a named backend cannot serve the call, or weight requires a gradient.

    Numerics: fp32 per vector, fp64 across a row and in the reduction, which one thread does in the
    order of the rows: the same bits for any number of threads. Rounded once. The forward keeps
    logits, target and one number per row (lse; in fp64, since half an fp32 ulp of it would be an
    error of 1e-6 in every softmax - target); the backward writes the gradient and nothing else of
    its size. Under autocast the loss is fp32, as torch's.

    DTensors: input may be split by rows or by classes; then nothing of its size travels. The mean
    is that over the rows of all ranks.

    Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018; Szegedy et
    al., 2016 (label smoothing); Chowdhery et al., "PaLM", 2022 (z-loss).
    """
    usual = weight is None and label_smoothing == 0.0 and z_loss == 0.0 and reduction in REDUCTIONS
    if usual and backend is None and not is_tracing():
        raw = _cross_entropy_raw(input, target)
        if raw is not None and input.dim() == 2:
            how: tuple[Any, ...] = ()  # the raw operator's defaults, which cost less
            if ignore_index != -100 or reduction != "mean" or dtype is not None:
                how = (None, ignore_index, 0.0, 0.0, REDUCTIONS[reduction], dtype)
            try:
                return raw(input, target, *how)[0]  # type: ignore[no-any-return]
            except RuntimeError:
                pass  # the checks below say what is wrong
    if isinstance(input, Tensor) and input.dim() == 1 and isinstance(target, Tensor):
        if target.shape == (1,) != input.shape:  # torch takes one target in a list, too
            target = target[0]
    probabilities = _check_arguments("cross_entropy", input, target, weight, ignore_index)
    check_numbers("cross_entropy", label_smoothing, reduction)
    if not 0.0 <= z_loss < math.inf:
        raise ValueError(f"llmops.cross_entropy: z_loss must be finite, 0 or more; got {z_loss!r}")
    dtype = loss_dtype("cross_entropy", input, dtype)
    features = ("probability targets",) if probabilities else size_of("cross_entropy", input)
    widest = torch.float64 if dtype == torch.float64 else input.dtype
    name = resolve("cross_entropy", input.device, widest, features, backend)
    if name == "reference":
        if not probabilities and not _is_compiling():
            check_range("cross_entropy", target, input.shape[min(input.dim() - 1, 1)], ignore_index)
        return reference.cross_entropy(
            input,
            target,
            weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            reduction=reduction,
            dtype=dtype,
        )
    x = input.movedim(1, -1) if input.dim() > 2 else input
    arguments = (x, target, weight, ignore_index, label_smoothing, z_loss, reduction, dtype, name)
    if _dtensor.is_distributed(x, target):
        from llmops.distributed import _losses

        return _losses.cross_entropy(*arguments)
    return _cross_entropy(*arguments)[0]


def _check_arguments(
    op: str, input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int
) -> bool:
    """Checks the tensors; True when target holds probabilities."""
    _check.floating(op, "input", input)
    if input.dim() == 0:
        raise ValueError(f"llmops.{op}: input must be [C], [N, C] or [N, C, ...]; got a scalar")
    classes = input.shape[min(input.dim() - 1, 1)]
    rows = input.shape[:1] + input.shape[2:] if input.dim() > 1 else ()
    return check_target(op, target, rows, tuple(input.shape), classes, input, weight, ignore_index)


def check_target(
    op: str, target: Tensor, rows: tuple[int, ...], logits: tuple[int, ...], classes: int,
    input: Tensor, weight: Tensor | None, ignore_index: int,
) -> bool:  # fmt: skip
    """Checks target and weight for logits of a shape; True when target holds probabilities."""
    if not isinstance(target, Tensor):
        _check.fail_type(op, "target", "a Tensor of class indices or probabilities", target)
    _check.same_device(op, "input", input, "target", target)
    probabilities = tuple(target.shape) == logits
    if probabilities:
        if target.dtype not in _check.FLOATS:
            raise TypeError(
                f"llmops.{op}: target of the logits' shape {logits} means class probabilities, "
                f"floating point; got {_check.dtype_name(target.dtype)}; class indices have the "
                f"shape {tuple(rows)}"
            )
        if ignore_index >= 0:
            raise ValueError(
                f"llmops.{op}: ignore_index is for class indices, and target holds probabilities; "
                f"got {ignore_index}; drop it, and zero the rows' weights instead"
            )
    else:
        if tuple(target.shape) != tuple(rows):
            raise ValueError(
                f"llmops.{op}: target must be class indices of shape {tuple(rows)}, or "
                f"probabilities of shape {logits}; got shape {tuple(target.shape)}"
            )
        _check.integers(op, "target", target)
    if weight is not None:
        _check.floating(op, "weight", weight)
        _check.same_device(op, "input", input, "weight", weight)
        if tuple(weight.shape) != (classes,):
            raise ValueError(
                f"llmops.{op}: weight must be [{classes}], one per class; got shape "
                f"{tuple(weight.shape)}"
            )
        if weight.requires_grad and torch.is_grad_enabled():
            _refuse_weight_gradient(op)
    return probabilities


def _refuse_weight_gradient(op: str) -> None:
    raise NotImplementedError(
        f"llmops.{op}: weight takes no gradient (nor does it in torch); pass weight.detach()"
    )


def check_numbers(op: str, label_smoothing: float, reduction: str) -> None:
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"llmops.{op}: label_smoothing must be in [0, 1]; got {label_smoothing!r}")
    if reduction not in REDUCTIONS:
        raise ValueError(
            f'llmops.{op}: reduction must be "none", "mean" or "sum"; got {reduction!r}'
        )


def check_range(
    op: str, target: Tensor, classes: int, ignore_index: int, what: str = "input"
) -> None:
    """IndexError where an index has no class: for the reference. Kernels check by themselves."""
    if target.is_meta:
        return
    outside = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if bool(outside.any()):
        valid = f" (0 to {classes - 1})" if classes else ""
        raise IndexError(
            f"llmops.{op}: target holds {int(target[outside][0])}, but {what} has {classes} classes"
            f"{valid}; ignore_index is {ignore_index}"
        )


def loss_dtype(op: str, input: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The loss's dtype: the one named, else input's; fp32 for 16 bits under autocast."""
    if dtype is not None:
        if dtype not in _check.FLOATS:
            raise TypeError(
                f"llmops.{op}: dtype must be a floating-point dtype; got {_check.dtype_name(dtype)}"
            )
        return dtype
    if input.dtype in (torch.bfloat16, torch.float16):
        if torch.is_autocast_enabled(input.device.type):
            return torch.float32
    return input.dtype


# ---- the operators -------------------------------------------------------------------------------

# Autocast makes the loss fp32.
_cross_entropy_raw = shortcut("cross_entropy", autocast=True)


def _wide_weight(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.detach().float().contiguous()


def _forward(
    x: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, label_smoothing: float,
    z_loss: float, reduction: str, dtype: torch.dtype, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if backend != "cpu":
        backend = resolve("cross_entropy", x.device, x.dtype, (), backend)
    how = (ignore_index, label_smoothing, z_loss)
    if backend == "reference":
        return reference.cross_entropy_fwd(x, target, weight, *how, reduction, dtype)
    return get(backend).cross_entropy(
        x, target, _wide_weight(weight), *how, REDUCTIONS[reduction], dtype
    )


def _fake(
    x: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, label_smoothing: float,
    z_loss: float, reduction: str, dtype: torch.dtype, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    shape = target.shape if reduction == "none" else ()
    return x.new_empty(shape, dtype=dtype), x.new_empty(target.shape, dtype=torch.float64)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, target, weight, *how, ctx.backend = inputs
    ctx.how = how[:4]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, target, weight, output[1])


def _backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    x, target, weight, lse = ctx.saved_tensors
    if weight is not None and ctx.needs_input_grad[2]:
        _refuse_weight_gradient("cross_entropy")
    dx = None
    if ctx.needs_input_grad[0] and not (grad is None and grad_lse is None):
        if grad is None:
            grad = lse.new_zeros(lse.shape if ctx.how[3] == "none" else (), dtype=torch.float32)
        dx = _cross_entropy_bwd(grad, grad_lse, x, target, weight, lse, *ctx.how, ctx.backend)
    return dx, *(None,) * 8


def _forward_bwd(
    grad: Tensor, grad_lse: Tensor | None, x: Tensor, target: Tensor, weight: Tensor | None,
    lse: Tensor, ignore_index: int, label_smoothing: float, z_loss: float, reduction: str,
    backend: str,
) -> Tensor:  # fmt: skip
    if backend != "cpu":
        backend = resolve("cross_entropy_bwd", x.device, x.dtype, (), backend)
    how = (ignore_index, label_smoothing, z_loss)
    if backend == "reference":
        return reference.cross_entropy_bwd(grad, grad_lse, x, target, weight, lse, *how, reduction)
    return get(backend).cross_entropy_bwd(
        grad, grad_lse, x, target, _wide_weight(weight), lse, *how, REDUCTIONS[reduction]
    )


def _fake_bwd(
    grad: Tensor, grad_lse: Tensor | None, x: Tensor, target: Tensor, weight: Tensor | None,
    lse: Tensor, ignore_index: int, label_smoothing: float, z_loss: float, reduction: str,
    backend: str,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape)


_cross_entropy_bwd = Op(
    "cross_entropy_bwd(Tensor grad, Tensor? grad_lse, Tensor x, Tensor target, Tensor? weight, "
    "Tensor lse, int ignore_index, float label_smoothing, float z_loss, str reduction, str backend)"
    " -> Tensor",
    forward=_forward_bwd,
    fake=_fake_bwd,
    reference=reference.cross_entropy_bwd,
)
# x is [..., C]. The second result is the rows' log-sum-exp, fp64, 0 where the target is ignored.
_cross_entropy = Op(
    "cross_entropy(Tensor x, Tensor target, Tensor? weight, int ignore_index, "
    "float label_smoothing, float z_loss, str reduction, ScalarType dtype, str backend)"
    " -> (Tensor, Tensor)",
    forward=_forward,
    fake=_fake,
    setup=_setup,
    backward=_backward,
)
