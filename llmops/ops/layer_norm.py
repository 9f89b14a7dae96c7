"""layer_norm and add_layer_norm: layer norm, and with the residual addition before it."""

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


def layer_norm(
    x: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> Tensor:
    """Layer norm over the last dimensions.

    y = (x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps) * weight + bias

    Args:
        x: [..., *normalized_shape], fp32/bf16/fp16 (fp64 on the reference), any strides.
        normalized_shape: x's last dimension, or several last ones; the means run over all of them.
        weight, bias: [*normalized_shape], any of these dtypes, whatever x has; None is one, zero.
        eps: added to the variance.
        backend: "cpu", "triton", "cuda", "reference" or "auto"; None follows use_backend.

    Returns:
        Tensor of x's shape and dtype, contiguous.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        NotImplementedError: a named backend cannot serve the call.

    Numerics: fp32 throughout, rounded once; the variance is that of x less a value near its mean,
    so that a mean of 25,000 beside a deviation of 1 costs nothing. A NaN stays in its row. The
    parameters' gradients are summed in chunks of rows that depend on the shape alone: the same bits
    with any number of threads. The backward keeps x alone, and takes the statistics again.

    Source: Ba, Kiros and Hinton, "Layer Normalization", 2016.
    """
    raw = None
    if backend is None and not is_tracing():
        raw = (_layer_norm_plain_raw if eps == 1e-5 else _layer_norm_raw)(x, weight, bias)
    if raw is not None and is_last(x, weight, normalized_shape):
        try:
            return raw(x, weight, bias) if eps == 1e-5 else raw(x, weight, bias, eps)
        except RuntimeError:
            pass  # the checks below say what is wrong
    if _autocast.wants_fp32(x):
        x = x.float()
    dims, dtype = _norm.check("layer_norm", x, normalized_shape, weight, bias)
    name = resolve("layer_norm", x.device, dtype, size_of("layer_norm", x), backend)
    if name == "reference":
        return reference.layer_norm(x, normalized_shape, weight, bias, eps)
    return _layer_norm(x, weight, bias, eps, dims, name)


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`layer_norm(x + residual)`, and the sum, in one pass over memory.

    h = x + residual;  y = (h - mean(h)) / sqrt(var(h) + eps) * weight + bias

    Args:
        x: as in `layer_norm`.
        residual: x's shape, any of its dtypes; fp32 beside a 16-bit x keeps the residual stream of
            a deep model exact.
        Others as in `layer_norm`.

    Returns:
        (y, h). y has x's dtype. h has the dtype that torch gives x + residual, so an fp32 residual
        makes an fp32 h. The statistics are those of h as rounded to its dtype, what `layer_norm(h)`
        would see.

    Raises, numerics: as `layer_norm`. Gradients of y and of h are taken together in one pass; x and
    the residual receive the same gradient.
    """
    raw = None
    if backend is None and not is_tracing():
        raw = _add_layer_norm_raw(x, residual, weight, bias)
    if raw is not None and is_last(x, weight, normalized_shape):
        try:
            if eps == 1e-5:
                return raw(x, residual, weight, bias)  # type: ignore[no-any-return]
            return raw(x, residual, weight, bias, eps)  # type: ignore[no-any-return]
        except RuntimeError:
            pass  # the checks below say what is wrong
    dims, dtype = _norm.check("add_layer_norm", x, normalized_shape, weight, bias)
    _norm.check_residual("add_layer_norm", x, residual)
    if _autocast.wants_fp32(x):  # as torch: the sum in its own dtype, the norm in fp32
        h = x + residual
        return layer_norm(h.float(), normalized_shape, weight, bias, eps, backend=backend), h
    if residual.dtype == torch.float64:
        dtype = torch.float64
    name = resolve("add_layer_norm", x.device, dtype, size_of("add_layer_norm", x), backend)
    if name == "reference":
        return reference.add_layer_norm(x, residual, normalized_shape, weight, bias, eps)
    residual = _norm.kernel_residual(x, residual)
    return _add_layer_norm(x, residual, weight, bias, eps, dims, name)  # type: ignore[no-any-return]


# ---- the operators -------------------------------------------------------------------------------

_layer_norm_raw, _add_layer_norm_raw = shortcut("layer_norm"), shortcut("add_layer_norm")
_layer_norm_plain_raw = shortcut("layer_norm_plain")
_layer_norm_bwd_raw = shortcut("layer_norm_bwd")


def _forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dims: int, backend: str
) -> Tensor:
    if backend != "cpu":
        backend = resolve("layer_norm", x.device, x.dtype, (), backend)
    if backend == "reference":
        return reference.layer_norm(x, x.shape[x.dim() - dims :], weight, bias, eps).contiguous()
    raw = get(backend).layer_norm
    # Fewer arguments to convert: at decode sizes that shows.
    return raw(x, weight, bias, eps) if dims == 1 else raw(x, weight, bias, eps, dims)


def _fake(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dims: int, backend: str
) -> Tensor:
    return _norm.empty(x)


def _gradients(
    dy: Tensor, h: Tensor, dh: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    eps: float, dims: int, need_h: bool, need_x: bool, need_params: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """_layer_norm_bwd; the usual case, the raw operator's defaults, by the short way. Code that a
    pass over the rows has driven out of the cache is slow: at 512 x 768, where torch takes 290 us,
    the long way costs 10."""
    usual = backend == "cpu" and dims == 1 and need_h and not need_x and need_params
    if usual and not is_tracing():
        raw = _layer_norm_bwd_raw(dy, h, dh, weight, bias)
        if raw is not None:
            return raw(dy, h, dh, weight, bias, eps)  # type: ignore[no-any-return]
    return _layer_norm_bwd(  # type: ignore[no-any-return]
        dy, h, dh, weight, bias, eps, dims, need_h, need_x, need_params, backend
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, *ctx.rest = inputs
    # The bias's values are not needed; its dtype is that of its gradient.
    ctx.save_for_backward(x, weight, bias)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight, bias = ctx.saved_tensors
    need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
    eps, dims, backend = ctx.rest
    dx, _, dweight, dbias = _gradients(
        grad, x, None, weight, bias, eps, dims, need_x, False, need_weight or need_bias, backend
    )
    return (
        dx if need_x else None,
        dweight if need_weight else None,
        dbias if need_bias else None,
        None,
        None,
        None,
    )


def _forward_add(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float,
    dims: int, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if backend != "cpu":
        backend = resolve("add_layer_norm", x.device, x.dtype, (), backend)
    if backend == "reference":
        shape = x.shape[x.dim() - dims :]
        y, h = reference.add_layer_norm(x, residual, shape, weight, bias, eps)
        return y.contiguous(), h.contiguous()
    raw = get(backend).add_layer_norm
    if dims == 1:
        return raw(x, residual, weight, bias, eps)
    return raw(x, residual, weight, bias, eps, dims)


def _fake_add(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float,
    dims: int, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _norm.empty(x), _norm.empty(x, torch.promote_types(x.dtype, residual.dtype))


def _setup_add(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, residual, weight, bias, *ctx.rest = inputs
    ctx.save_for_backward(output[1], weight, bias)
    ctx.dtypes = x.dtype, residual.dtype
    ctx.set_materialize_grads(False)


def _backward_add(ctx: Any, dy: Tensor | None, dh: Tensor | None) -> tuple[Any, ...]:
    h, weight, bias = ctx.saved_tensors
    need_x, need_residual, need_weight, need_bias = ctx.needs_input_grad[:4]
    eps, dims, backend = ctx.rest
    x_dtype, residual_dtype = ctx.dtypes
    nothing = (None,) * 3
    if dy is None:
        if dh is None:
            return None, None, None, None, *nothing
        dx = dh.to(x_dtype) if need_x else None
        return dx, dh.to(residual_dtype) if need_residual else None, None, None, *nothing
    # x's own copy of the gradient is needed only where its dtype is not the sum's.
    apart = need_x and x_dtype != h.dtype
    total, dx, dweight, dbias = _gradients(
        dy, h, dh, weight, bias, eps, dims, need_x or need_residual, apart,
        need_weight or need_bias, backend,
    )  # fmt: skip
    return (
        (dx if apart else total) if need_x else None,
        total if need_residual else None,
        dweight if need_weight else None,
        dbias if need_bias else None,
        *nothing,
    )


def _forward_bwd(
    dy: Tensor, h: Tensor, dh: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    eps: float, dims: int, need_h: bool, need_x: bool, need_params: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if backend != "cpu":
        backend = resolve("layer_norm_bwd", h.device, h.dtype, (), backend)
    if backend == "reference":
        return reference.layer_norm_bwd(
            dy, h, dh, weight, bias, eps, dims, need_h, need_x, need_params
        )
    return get(backend).layer_norm_bwd(
        dy, h, dh, weight, bias, eps, dims, need_h, need_x, need_params
    )


def _fake_bwd(
    dy: Tensor, h: Tensor, dh: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    eps: float, dims: int, need_h: bool, need_x: bool, need_params: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        _norm.gradient(h, need_h),
        _norm.gradient(dy, need_x),
        _norm.parameter_gradient(h, weight, dims, need_params),
        _norm.parameter_gradient(h, bias, dims, need_params),
    )


# Gives the gradient of h (dh, that of the output h, added), the same in dy's dtype (x's), and the
# parameters'; of no elements where not needed.
_layer_norm_bwd = Op(
    "layer_norm_bwd(Tensor dy, Tensor h, Tensor? dh, Tensor? weight, Tensor? bias, float eps, "
    "int dims, bool need_h, bool need_x, bool need_params, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    forward=_forward_bwd,
    fake=_fake_bwd,
    reference=reference.layer_norm_bwd,
)
_layer_norm = Op(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps, int dims, str backend)"
    " -> Tensor",
    forward=_forward,
    fake=_fake,
    setup=_setup,
    backward=_backward,
)
_add_layer_norm = Op(
    "add_layer_norm(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps, int dims, "
    "str backend) -> (Tensor, Tensor)",
    forward=_forward_add,
    fake=_fake_add,
    setup=_setup_add,
    backward=_backward_add,
)
