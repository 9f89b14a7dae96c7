"""rms_norm and add_rms_norm: root-mean-square norm, and with the residual addition before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llmops import reference
from llmops.backends import get
from llmops.backends._measured import size_of
from llmops.dispatch import resolve
from llmops.ops import _autocast, _norm
from llmops.ops._op import Op, is_last, is_tracing, shortcut


def rms_norm(
    x: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    weight_offset: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Root-mean-square norm over the last dimensions.

    y = x / sqrt(mean(x^2) + eps) * (weight + weight_offset)

    Args:
        x: [..., *normalized_shape], fp32/bf16/fp16 (fp64 on the reference), any strides.
        normalized_shape: x's last dimension, or several last ones; the mean runs over all of them.
        weight: [*normalized_shape], any of these dtypes, whatever x has; None multiplies by one.
        eps: added to the mean square; None is fp32's machine epsilon (fp64's for fp64), which is
            what F.rms_norm takes, for 16-bit x as well.
        weight_offset: 1.0 is Gemma's form, whose weights are stored less one.
        backend: "cpu", "triton", "cuda", "reference" or "auto"; None follows use_backend.

    Returns:
        Tensor of x's shape and dtype, contiguous.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        NotImplementedError: a named backend cannot serve the call.

    Numerics: fp32 throughout, rounded once. A NaN stays in its row. The weight's gradient is summed
    in chunks of rows that depend on the shape alone: the same bits with any number of threads. The
    backward keeps x alone, and takes the statistics again.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
    """
    raw = _rms_norm_raw(x, weight) if backend is None and not is_tracing() else None
    if raw is not None and weight_offset == 0.0 and is_last(x, weight, normalized_shape):
        try:
            return raw(x, weight, _EPS if eps is None else eps)
        except RuntimeError:
            pass  # the checks below say what is wrong
    if _autocast.RMS_NORM_IN_FP32 and _autocast.wants_fp32(x):
        x = x.float()
    dims, dtype = _norm.check("rms_norm", x, normalized_shape, weight)
    if eps is None:
        eps = reference.rms_norm_eps(x.dtype)
    name = resolve("rms_norm", x.device, dtype, size_of("rms_norm", x), backend)
    if name == "reference":
        return reference.rms_norm(x, normalized_shape, weight, eps, weight_offset=weight_offset)
    return _rms_norm(x, weight, eps, dims, weight_offset, name)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    weight_offset: float = 0.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`rms_norm(x + residual)`, and the sum, in one pass over memory.

    h = x + residual;  y = h / sqrt(mean(h^2) + eps) * (weight + weight_offset)

    Args:
        x: as in `rms_norm`.
        residual: x's shape, any of its dtypes; fp32 beside a 16-bit x keeps the residual stream of
            a deep model exact.
        Others as in `rms_norm`.

    Returns:
        (y, h). y has x's dtype. h has the dtype that torch gives x + residual, so an fp32 residual
        makes an fp32 h. The statistics are those of h as rounded to its dtype, what `rms_norm(h)`
        would see.

    Raises, numerics: as `rms_norm`. Gradients of y and of h are taken together in one pass; x and
    the residual receive the same gradient.
    """
    raw = _add_rms_norm_raw(x, residual, weight) if backend is None and not is_tracing() else None
    if raw is not None and weight_offset == 0.0 and is_last(x, weight, normalized_shape):
        try:
            return raw(x, residual, weight, _EPS if eps is None else eps)  # type: ignore[no-any-return]
        except RuntimeError:
            pass  # the checks below say what is wrong
    dims, dtype = _norm.check("add_rms_norm", x, normalized_shape, weight)
    _norm.check_residual("add_rms_norm", x, residual)
    # As torch: the sum in its own dtype, the norm in fp32.
    if _autocast.RMS_NORM_IN_FP32 and _autocast.wants_fp32(x):
        h = x + residual
        return rms_norm(
            h.float(), normalized_shape, weight, eps, weight_offset=weight_offset, backend=backend
        ), h
    if residual.dtype == torch.float64:
        dtype = torch.float64
    if eps is None:
        eps = reference.rms_norm_eps(x.dtype)
    name = resolve("add_rms_norm", x.device, dtype, size_of("add_rms_norm", x), backend)
    if name == "reference":
        return reference.add_rms_norm(
            x, residual, normalized_shape, weight, eps, weight_offset=weight_offset
        )
    residual = _norm.kernel_residual(x, residual)
    return _add_rms_norm(x, residual, weight, eps, dims, weight_offset, name)  # type: ignore[no-any-return]


# ---- the operators -------------------------------------------------------------------------------

_rms_norm_raw, _add_rms_norm_raw = shortcut("rms_norm"), shortcut("add_rms_norm")
# Of every dtype that has kernels.
_EPS = reference.rms_norm_eps(torch.float32)


def _forward(
    x: Tensor, weight: Tensor | None, eps: float, dims: int, weight_offset: float, backend: str
) -> Tensor:
    if backend != "cpu":
        backend = resolve("rms_norm", x.device, x.dtype, (), backend)
    if backend == "reference":
        shape = x.shape[x.dim() - dims :]
        y = reference.rms_norm(x, shape, weight, eps, weight_offset=weight_offset)
        return y.contiguous()
    raw = get(backend).rms_norm
    # Fewer arguments to convert: at decode sizes that shows.
    if dims == 1 and weight_offset == 0.0:
        return raw(x, weight, eps)
    return raw(x, weight, eps, dims, weight_offset)


def _fake(
    x: Tensor, weight: Tensor | None, eps: float, dims: int, weight_offset: float, backend: str
) -> Tensor:
    return _norm.empty(x)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, *ctx.rest = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight = ctx.saved_tensors
    need_x, need_weight = ctx.needs_input_grad[:2]
    *rest, backend = ctx.rest
    dx, _, dweight = _rms_norm_bwd(
        grad, x, None, weight, *rest, need_x, False, need_weight, backend
    )
    return dx if need_x else None, dweight if need_weight else None, None, None, None, None


def _forward_add(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, dims: int,
    weight_offset: float, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if backend != "cpu":
        backend = resolve("add_rms_norm", x.device, x.dtype, (), backend)
    if backend == "reference":
        shape = x.shape[x.dim() - dims :]
        y, h = reference.add_rms_norm(x, residual, shape, weight, eps, weight_offset=weight_offset)
        return y.contiguous(), h.contiguous()
    raw = get(backend).add_rms_norm
    if dims == 1 and weight_offset == 0.0:
        return raw(x, residual, weight, eps)
    return raw(x, residual, weight, eps, dims, weight_offset)


def _fake_add(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, dims: int,
    weight_offset: float, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _norm.empty(x), _norm.empty(x, torch.promote_types(x.dtype, residual.dtype))


def _setup_add(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, residual, weight, *ctx.rest = inputs
    ctx.save_for_backward(output[1], weight)
    ctx.dtypes = x.dtype, residual.dtype
    ctx.set_materialize_grads(False)


def _backward_add(ctx: Any, dy: Tensor | None, dh: Tensor | None) -> tuple[Any, ...]:
    h, weight = ctx.saved_tensors
    need_x, need_residual, need_weight = ctx.needs_input_grad[:3]
    *rest, backend = ctx.rest
    x_dtype, residual_dtype = ctx.dtypes
    nothing = (None,) * 4
    if dy is None:
        if dh is None:
            return None, None, None, *nothing
        dx = dh.to(x_dtype) if need_x else None
        return dx, dh.to(residual_dtype) if need_residual else None, None, *nothing
    # x's own copy of the gradient is needed only where its dtype is not the sum's.
    apart = need_x and x_dtype != h.dtype
    total, dx, dweight = _rms_norm_bwd(
        dy, h, dh, weight, *rest, need_x or need_residual, apart, need_weight, backend
    )
    return (
        (dx if apart else total) if need_x else None,
        total if need_residual else None,
        dweight if need_weight else None,
        *nothing,
    )


def _forward_bwd(
    dy: Tensor, h: Tensor, dh: Tensor | None, weight: Tensor | None, eps: float, dims: int,
    weight_offset: float, need_h: bool, need_x: bool, need_weight: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if backend != "cpu":
        backend = resolve("rms_norm_bwd", h.device, h.dtype, (), backend)
    if backend == "reference":
        return reference.rms_norm_bwd(
            dy, h, dh, weight, eps, dims, weight_offset, need_h, need_x, need_weight
        )
    compute = get(backend).rms_norm_bwd
    # The usual case is the raw operator's defaults: at decode sizes converting them shows.
    usual = dims == 1 and weight_offset == 0.0 and need_h and not need_x and need_weight
    if backend == "cpu" and usual:
        return compute(dy, h, dh, weight, eps)
    return compute(dy, h, dh, weight, eps, dims, weight_offset, need_h, need_x, need_weight)


def _fake_bwd(
    dy: Tensor, h: Tensor, dh: Tensor | None, weight: Tensor | None, eps: float, dims: int,
    weight_offset: float, need_h: bool, need_x: bool, need_weight: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        _norm.gradient(h, need_h),
        _norm.gradient(dy, need_x),
        _norm.parameter_gradient(h, weight, dims, need_weight),
    )


# Gives the gradient of h (dh, that of the output h, added), the same in dy's dtype (x's), and the
# weight's; of no elements where not needed.
_rms_norm_bwd = Op(
    "rms_norm_bwd(Tensor dy, Tensor h, Tensor? dh, Tensor? weight, float eps, int dims, "
    "float weight_offset, bool need_h, bool need_x, bool need_weight, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    forward=_forward_bwd,
    fake=_fake_bwd,
    reference=reference.rms_norm_bwd,
)
_rms_norm = Op(
    "rms_norm(Tensor x, Tensor? weight, float eps, int dims, float weight_offset, str backend)"
    " -> Tensor",
    forward=_forward,
    fake=_fake,
    setup=_setup,
    backward=_backward,
)
_add_rms_norm = Op(
    "add_rms_norm(Tensor x, Tensor residual, Tensor? weight, float eps, int dims, "
    "float weight_offset, str backend) -> (Tensor, Tensor)",
    forward=_forward_add,
    fake=_fake_add,
    setup=_setup_add,
    backward=_backward_add,
)
