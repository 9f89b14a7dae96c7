"""softmax: scale, mask, causal limit and softmax in one pass over each row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmops import reference
from llmops.backends import get
from llmops.dispatch import resolve
from llmops.ops import _autocast, _check
from llmops.ops._op import Op, is_tracing, shortcut


def softmax(
    x: Tensor,
    dim: int = -1,
    *,
    scale: float = 1.0,
    mask: Tensor | None = None,
    causal: bool = False,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """Softmax of scaled, masked logits along one dimension.

    y_i = exp(z_i - max z) / sum_j exp(z_j - max z)  with  z = scale * x + mask

    Args:
        x: any shape, fp32/bf16/fp16 (fp64 on the reference), any strides.
        dim: the dimension that sums to one.
        scale: multiplies x; 1/temperature, or 1/sqrt(D) for attention scores.
        mask: broadcastable to x's shape. bool: True keeps, False drops. Float: added to scale * x
            and differentiable.
        causal: with x as [..., Tq, Tk] and dim=-1, query i sees keys up to i + Tk - Tq
            (bottom-right aligned: the last query sees all).
        dtype: of the result; x's when None. Read as x's dtype, computed in fp32, rounded once.
        backend: "cpu", "triton", "cuda", "reference" or "auto"; None follows use_backend.

    Returns:
        Tensor of x's shape. With a mask or causal, a row with nothing left is zeros; without
        either, a row of -inf is NaN, as in torch.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        NotImplementedError: a named backend cannot serve the call.

    Numerics: fp32 throughout, exp with relative error below 2 ulp. A NaN stays in its row.

    Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018 (the three
    sweeps are done on a cache-resident row here, which costs memory one read and one write).
    """
    if backend is None and dim == -1 and not is_tracing():
        plain = mask is None and not causal and dtype is None and scale == 1.0
        raw = _softmax_plain_raw(x) if plain else _softmax_raw(x, mask)
        if raw is not None:
            try:
                if plain:
                    return raw(x)  # type: ignore[no-any-return]
                if dtype is None or dtype == x.dtype:
                    return raw(x, scale, mask, causal)  # type: ignore[no-any-return]
                return raw(x, scale, mask, causal, dtype)  # type: ignore[no-any-return]
            except RuntimeError:
                pass  # a scalar, or what the checks below refuse
    last = _checked_dim(x, dim, mask, causal)
    if dtype is None and _autocast.wants_fp32(x):
        dtype = torch.float32
    out_dtype = x.dtype if dtype is None else dtype
    if out_dtype not in _check.FLOATS:
        raise TypeError(
            f"llmops.softmax: dtype must be a floating-point dtype; got "
            f"{_check.dtype_name(out_dtype)}"
        )
    # The less usual of the two dtypes decides who can serve.
    widest = torch.float64 if out_dtype == torch.float64 else x.dtype
    features: tuple[str, ...] = ()
    if mask is not None:
        features = ("mask",)
        if mask.dtype == torch.float64:
            widest = torch.float64
    if causal:
        features += ("causal",)
    if out_dtype != x.dtype:
        features += ("dtype",)
    name = resolve("softmax", x.device, widest, features, backend)
    if x.dim() == 0:
        y = softmax(x[None], scale=scale, mask=mask, dtype=dtype, backend=name)
        return y[0]
    if name == "reference":
        return reference.softmax(x, dim, scale=scale, mask=mask, causal=causal, dtype=dtype)
    if last:
        return _softmax(x, scale, mask, causal, out_dtype, name)
    # Another dimension: the same rows, seen through a transposed view.
    if mask is not None:
        mask = mask.expand(x.shape).transpose(dim, -1)
    y = _softmax(x.transpose(dim, -1), scale, mask, causal, out_dtype, name)
    return y.transpose(dim, -1)


def _checked_dim(x: Tensor, dim: int, mask: Tensor | None, causal: bool) -> bool:
    """Checks the arguments; True when `dim` is the last dimension."""
    _check.floating("softmax", "x", x)
    rank = x.dim()
    if not -max(rank, 1) <= dim < max(rank, 1):
        raise ValueError(
            f"llmops.softmax: dim must be in [{-max(rank, 1)}, {max(rank, 1) - 1}] for x of shape "
            f"{tuple(x.shape)}; got {dim}"
        )
    last = dim in (-1, rank - 1)
    if causal and (not last or rank < 2):
        raise ValueError(
            f"llmops.softmax: causal=True needs x as [..., Tq, Tk] and dim=-1; got shape "
            f"{tuple(x.shape)} and dim={dim}; transpose x, or pass a bool mask"
        )
    if mask is None:
        return last
    if not isinstance(mask, Tensor) or (
        mask.dtype != torch.bool and mask.dtype not in _check.FLOATS
    ):
        _check.fail_type("softmax", "mask", "a bool (True keeps) or floating-point Tensor", mask)
    _check.same_device("softmax", "x", x, "mask", mask)
    if mask.dim() > rank or any(
        m not in (1, n) for m, n in zip(reversed(mask.shape), reversed(x.shape), strict=False)
    ):
        raise ValueError(
            f"llmops.softmax: mask of shape {tuple(mask.shape)} does not broadcast to x of shape "
            f"{tuple(x.shape)}"
        )
    return last


# ---- the operators -------------------------------------------------------------------------------

_softmax_raw, _softmax_plain_raw = shortcut("softmax"), shortcut("softmax_plain")


def _forward(
    x: Tensor, scale: float, mask: Tensor | None, causal: bool, dtype: torch.dtype, backend: str
) -> Tensor:
    if backend == "cpu":
        raw = get("cpu").softmax
        if mask is None and dtype == x.dtype:
            return raw(x) if scale == 1.0 and not causal else raw(x, scale, None, causal)
        return raw(x, scale, mask, causal, dtype)
    features = (("mask",) if mask is not None else ()) + (("causal",) if causal else ())
    backend = resolve("softmax", x.device, x.dtype, features, backend)
    if backend == "reference":
        return reference.softmax(x, scale=scale, mask=mask, causal=causal, dtype=dtype)
    return get(backend).softmax(x, scale, mask, causal, dtype)


def _fake(
    x: Tensor, scale: float, mask: Tensor | None, causal: bool, dtype: torch.dtype, backend: str
) -> Tensor:
    return torch.empty(x.shape, dtype=dtype, device=x.device)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, mask, _causal, _dtype, backend = inputs
    ctx.save_for_backward(output)
    ctx.scale, ctx.x_dtype, ctx.backend = scale, x.dtype, backend
    ctx.mask_like = (mask.shape, mask.dtype) if mask is not None else None


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (y,) = ctx.saved_tensors
    dx = dmask = None
    if ctx.needs_input_grad[0]:
        dx = _softmax_bwd(grad, y, ctx.scale, ctx.x_dtype, ctx.backend)
    if ctx.mask_like is not None and ctx.needs_input_grad[2]:
        shape, dtype = ctx.mask_like
        dz = _softmax_bwd(grad, y, 1.0, torch.float32, ctx.backend)
        dmask = dz.sum_to_size(shape).to(dtype)
    return dx, None, dmask, None, None, None


def _forward_bwd(grad: Tensor, y: Tensor, scale: float, dtype: torch.dtype, backend: str) -> Tensor:
    if backend != "cpu":
        backend = resolve("softmax_bwd", y.device, y.dtype, (), backend)
    if backend == "reference":
        return reference.softmax_bwd(grad, y, scale, dtype)
    return get(backend).softmax_bwd(grad, y, scale, dtype)


def _fake_bwd(grad: Tensor, y: Tensor, scale: float, dtype: torch.dtype, backend: str) -> Tensor:
    return torch.empty(y.shape, dtype=dtype, device=y.device)


_softmax_bwd = Op(
    "softmax_bwd(Tensor grad, Tensor y, float scale, ScalarType dtype, str backend) -> Tensor",
    forward=_forward_bwd,
    fake=_fake_bwd,
    reference=reference.softmax_bwd,
)
_softmax = Op(
    "softmax(Tensor x, float scale, Tensor? mask, bool causal, ScalarType dtype, str backend)"
    " -> Tensor",
    forward=_forward,
    fake=_fake,
    setup=_setup,
    backward=_backward,
)
