"""What the front doors of rms_norm and layer_norm share: checks, and the form of their outputs."""

from __future__ import annotations

from collections.abc import Sequence

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
) -> int:
    """Checks the arguments; the number of normalized dimensions."""
    if not isinstance(x, Tensor) or x.dtype not in _FLOATS:
        _check.floating(op, "x", x)
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    dims = len(shape)
    if dims == 0 or x.shape[-dims:] != shape:
        raise ValueError(
            f"llmops.{op}: normalized_shape must be x's last dimensions, at least one; got "
            f"{normalized_shape} for x of shape {tuple(x.shape)}"
        )
    if weight is not None:
        _check_parameter(op, "weight", x, shape, weight)
    if bias is not None:
        _check_parameter(op, "bias", x, shape, bias)
    return dims


def _check_parameter(
    op: str, name: str, x: Tensor, shape: tuple[int, ...], parameter: Tensor
) -> None:
    if not isinstance(parameter, Tensor) or parameter.dtype not in _FLOATS:
        _check.floating(op, name, parameter)
    if parameter.shape != shape:
        raise ValueError(
            f"llmops.{op}: {name} must have normalized_shape {shape}; got {tuple(parameter.shape)}"
        )
    if parameter.device != x.device:
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


def widest(*tensors: Tensor | None) -> torch.dtype:
    """The dtype that decides who can serve: fp64 where any tensor has it, else the first's."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype == torch.float64:
            return torch.float64
    assert tensors[0] is not None
    return tensors[0].dtype


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
