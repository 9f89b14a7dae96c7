"""What the front doors of rms_norm and layer_norm share: checks, and the form of their outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llmops.ops import _check

_FLOATS = _check.FLOATS


def check(
    op: str,
    x: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None = None,
) -> tuple[int, torch.dtype]:
    """Checks the arguments; the number of normalized dimensions, and the dtype that decides who can
    serve: fp64 where any tensor has it, else x's."""
    if not isinstance(x, Tensor) or x.dtype not in _FLOATS:
        _check.floating(op, "x", x)
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    dims, dtype = len(shape), x.dtype
    if dims == 0 or x.shape[-dims:] != shape:
        if isinstance(normalized_shape, Tensor):
            raise TypeError(
                f"llmops.{op}: normalized_shape must be an int or a sequence of ints, got a Tensor "
                f"of shape {tuple(normalized_shape.shape)}; as in torch, the weight comes after it"
            )
        raise ValueError(
            f"llmops.{op}: normalized_shape must be x's last dimensions, at least one; got "
            f"{normalized_shape} for x of shape {tuple(x.shape)}"
        )
    for parameter in (weight, bias):
        if parameter is None:
            continue
        if (
            not isinstance(parameter, Tensor)
            or parameter.shape != shape
            or parameter.device != x.device
            or (parameter.dtype != dtype and parameter.dtype not in _FLOATS)
        ):
            _refuse(op, "weight" if parameter is weight else "bias", x, shape, parameter)
        if parameter.dtype == torch.float64:
            dtype = torch.float64
    return dims, dtype


def _refuse(op: str, name: str, x: Tensor, shape: tuple[int, ...], parameter: Any) -> None:
    _check.floating(op, name, parameter)
    if parameter.shape != shape:
        raise ValueError(
            f"llmops.{op}: {name} must have normalized_shape {shape}; got {tuple(parameter.shape)}"
        )
    _check.same_device(op, "x", x, name, parameter)


def check_residual(op: str, x: Tensor, residual: Tensor) -> None:
    _check.floating(op, "residual", residual)
    if residual.shape != x.shape:
        raise ValueError(
            f"llmops.{op}: residual must have x's shape {tuple(x.shape)}; got "
            f"{tuple(residual.shape)}; expand it, e.g. residual.expand_as(x)"
        )
    if residual.device != x.device:
        _check.same_device(op, "x", x, "residual", residual)


def kernel_residual(x: Tensor, residual: Tensor) -> Tensor:
    """The residual in x's dtype or fp32, as the kernels take it; the sum's dtype stays."""
    if residual.dtype in (x.dtype, torch.float32):
        return residual
    return residual.float()


def empty(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Shape of x, contiguous, whatever x's strides."""
    return x.new_empty(x.shape, dtype=dtype)


def gradient(like: Tensor, needed: bool, dtype: torch.dtype | None = None) -> Tensor:
    """The fake of a gradient: like's shape, or no elements where it is not needed."""
    return like.new_empty(like.shape if needed else (0,), dtype=dtype)


def parameter_gradient(h: Tensor, parameter: Tensor | None, dims: int, needed: bool) -> Tensor:
    dtype = torch.float32 if parameter is None else parameter.dtype
    return h.new_empty(h.shape[h.dim() - dims :] if needed else (0,), dtype=dtype)
