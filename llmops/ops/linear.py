"""linear: x W^T + b, by our kernel where torch's own product is weak, else by torch's."""

from __future__ import annotations

import math
from bisect import bisect_left
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmops import reference
from llmops.backends import get
from llmops.dispatch import requested, resolve
from llmops.ops import _autocast, _check
from llmops.ops._op import Op, is_plain, is_tracing, shortcut

ROWS = get("cpu").LINEAR_ROWS  # of x, that the measured table tells apart
MANY = "many rows"


def at_most(rows: int) -> str:
    return f"at most {rows} rows"


_is_compiling = torch.compiler.is_compiling
_fp32_parts = get("cpu").fp32_parts


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """y[..., n] = sum_k x[..., k] weight[n, k] + bias[n].

    Args:
        x: [..., K], fp32/bf16/fp16 (any dtype on torch's own product), any strides.
        weight: [N, K], x's dtype; dense in its last dimension, or the product of few rows of x is
            torch's own.
        bias: [N], x's dtype.
        backend: "cpu" is our kernel whatever the shape; "reference" is torch's own product;
            None and "auto" take the faster one, by a measured table of instruction set, dtype and
            number of rows (`llmops.explain("linear", x, weight)` names it and the reason).

    Returns:
        Tensor [..., N] in x's dtype, contiguous.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        NotImplementedError: a named backend cannot serve the call.

    Numerics: fp32 accumulation, the bias added in fp32, one rounding. The kernel gives the same
    bits for any number of threads; where bf16 pairs are multiplied by the processor (AVX-512-BF16),
    subnormal products flush to zero. fp32 on AMX, 13 to 32 rows and 49 and more: three bf16 parts
    of each value, as exact as fp32 down to 1e-33; smaller values lose digits, and below 1e-38 they
    are zero. There, from 33 rows on, torch.set_float32_matmul_precision counts: "high" is two
    parts, 16 bits of each value (relative errors below 2^-13 of a product, 2^-17 on average),
    "medium" is one, that is bf16. fp16 on AMX: two parts, which are all of each value.
    Gradients are matrix products of the same kind, or torch's.
    Under autocast computed in autocast's dtype, as F.linear is.
    """
    if backend is None and not is_tracing() and _is_usual(x, weight, bias):
        size = bisect_left(ROWS, x.numel() / max(weight.shape[1], 1))
        # Few rows are multiplied by FMAs at any precision, so that nobody need ask for it.
        whole = size == 0 or x.dtype != torch.float32 or _fp32_parts() == 3
        raw = _raw[size](x, weight, bias) if whole else None
        if raw is not None:
            try:
                y: Tensor = raw(x, weight) if bias is None else raw(x, weight, bias)
                return y
            except RuntimeError:
                pass  # the checks below say what is wrong
    autocast = torch.get_autocast_dtype(x.device.type) if _autocast.enabled(x) else None
    _check_arguments(x, weight, bias, autocast)
    dtype = _cast_to(weight.dtype, autocast)
    features: tuple[str, ...] = (_rows_of(x),)
    if weight.dtype != dtype:
        features += ("autocast weight",)
    if weight.shape[1] > 1 and weight.stride(1) != 1:
        transposed = weight.stride(0) == 1
        features += ("transposed weight" if transposed else "weight dense in no dimension",)
    name = resolve("linear", x.device, dtype, features, backend)
    if name == "reference" and not (_has_own_gradient(x, weight) and requested(backend) == "auto"):
        return reference.linear(x, weight, bias)
    if autocast is not None:
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    return _linear(x, weight, bias, name)  # type: ignore[no-any-return]


def _rows_of(x: Tensor) -> str:
    """How many rows x has, as the table tells them apart; in a graph for any number of rows, many:
    a question that its symbol cannot answer would be another graph for each answer."""
    rows = math.prod(x.shape[:-1])
    if _is_compiling():
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        return next((at_most(n) for n in ROWS if statically_known_true(rows <= n)), MANY)
    return next((at_most(n) for n in ROWS if rows <= n), MANY)


def _is_usual(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the kernel reads this weight as it lies; torch's product takes other biases, too."""
    if not (isinstance(x, Tensor) and isinstance(weight, Tensor)):
        return False
    if weight.dim() != 2 or weight.stride(1) != 1:
        return False
    return bias is None or (isinstance(bias, Tensor) and bias.shape == weight.shape[:1])


def _has_own_gradient(x: Tensor, weight: Tensor) -> bool:
    """Whether torch's own product has a gradient of the weight that is better ours."""
    if not weight.requires_grad or weight.device.type != "cpu" or weight.dtype != x.dtype:
        return False
    if not (torch.is_grad_enabled() and is_plain(weight) and is_plain(x)) or _autocast.enabled(x):
        return False
    return get("cpu").own_weight_gradient(x.dtype, math.prod(x.shape[:-1]))


def _cast_to(dtype: torch.dtype, autocast: torch.dtype | None) -> torch.dtype:
    """What autocast makes of a tensor: float64 stays as it is."""
    return dtype if autocast is None or dtype == torch.float64 else autocast


def _check_arguments(
    x: Tensor, weight: Tensor, bias: Tensor | None, autocast: torch.dtype | None
) -> None:
    _check.floating("linear", "x", x)
    _check.floating("linear", "weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"llmops.linear: weight must be [N, K]; got shape {tuple(weight.shape)}")
    if x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"llmops.linear: x must be [..., {weight.shape[1]}] for weight [N, K] of shape "
            f"{tuple(weight.shape)}; got shape {tuple(x.shape)}"
        )
    others = [("weight", weight)]
    if bias is not None:
        _check.floating("linear", "bias", bias)
        if bias.dim() != 1 or bias.shape[0] != weight.shape[0]:
            raise ValueError(
                f"llmops.linear: bias must be [{weight.shape[0]}], weight's rows; got shape "
                f"{tuple(bias.shape)}"
            )
        others.append(("bias", bias))
    for name, other in others:
        if _cast_to(other.dtype, autocast) != _cast_to(x.dtype, autocast):
            raise TypeError(
                f"llmops.linear: {name} has dtype {_check.dtype_name(other.dtype)} and x "
                f"{_check.dtype_name(x.dtype)}; convert one, e.g. x.to({name}.dtype)"
            )
        if other.device != x.device:
            _check.same_device("linear", "x", x, name, other)


# ---- the operator --------------------------------------------------------------------------------


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    if backend != "cpu":
        backend = resolve("linear", x.device, x.dtype, (), backend)
    if backend == "reference":
        return reference.linear(x, weight, bias)
    raw, parts = get(backend).linear, _fp32_parts() if x.dtype == torch.float32 else 3
    if parts != 3:
        return raw(x, weight, bias, parts)  # type: ignore[no-any-return]
    return raw(x, weight) if bias is None else raw(x, weight, bias)  # type: ignore[no-any-return]


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _bias, ctx.backend = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """dx = dy W, dW = dy^T x, db = the sum of dy: by our products where they are ahead of torch's
    (on AMX; dW alone of bf16) or the CPU has no 16-bit one and torch's is 6 times slower than in
    fp32 (AVX2); else by torch's. By torch's, too, and in fp32, where the gradient is to be
    differentiated."""
    x, weight = ctx.saved_tensors
    dtype, rows = x.dtype, math.prod(x.shape[:-1])
    product: Any = torch.matmul
    product_of_weight = product
    if grad.device.type == "cpu" and get("cpu").available() is None:
        if not torch.is_grad_enabled() and is_plain(grad):
            product, product_of_weight = get("cpu").gradient_products(dtype, rows)
        elif get("cpu").widens_products(dtype):
            x, weight, grad = x.float(), weight.float(), grad.float()
    need_x, need_weight, need_bias, _ = ctx.needs_input_grad
    flat, flat_x = grad.reshape(rows, weight.shape[0]), x.reshape(rows, weight.shape[1])
    dx = product(flat, weight).view(x.shape) if need_x else None
    dweight = None
    if need_weight:  # laid out as weight is
        transposed = weight.stride(1) != 1 and weight.stride(0) == 1
        dweight = (
            product_of_weight(flat_x.t(), flat).t()
            if transposed
            else product_of_weight(flat.t(), flat_x)
        )
    dbias = flat.sum(0) if need_bias else None
    return *(None if g is None else g.to(dtype) for g in (dx, dweight, dbias)), None


# Past the caches that a product has emptied the long way costs 60 to 100 us, torch's product too.
_raw = tuple(
    shortcut("linear", (rows,), autocast=True, torchs=F.linear)
    for rows in (*(at_most(n) for n in ROWS), MANY)
)
_linear = Op(
    "linear(Tensor x, Tensor weight, Tensor? bias, str backend) -> Tensor",
    forward=_forward,
    fake=_fake,
    setup=_setup,
    backward=_backward,
)
