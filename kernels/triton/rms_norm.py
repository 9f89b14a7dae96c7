"""RMS norm, with the residual addition before it, and the gradient of both: `_norm.py`'s kernels
without centering. Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from llmops.kernels.triton import _config, _norm, _norm_bwd
from torch import Tensor


def entries(op: str, dtype: torch.dtype) -> Iterator[tuple[_config.Key, _config.Config]]:
    return (_norm_bwd if op.endswith("_bwd") else _norm).entries(op, dtype)


def candidates(op: str, key: tuple[int, torch.dtype]) -> Iterator[_config.Config]:
    return (_norm_bwd if op.endswith("_bwd") else _norm).candidates(op, key)


def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, dims: int = 1, weight_offset: float = 0.0
) -> Tensor:
    """x [..., *weight.shape], normalized over its last `dims` dimensions; y is contiguous."""
    return _norm.forward("rms_norm", x, None, weight, None, eps, dims, weight_offset, False)[0]


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, dims: int = 1,
    weight_offset: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y, x + residual), both contiguous."""
    return _norm.forward("rms_norm", x, residual, weight, None, eps, dims, weight_offset, False)


def rms_norm_bwd(
    dy: Tensor, h: Tensor, dh: Tensor | None, weight: Tensor | None, eps: float, dims: int = 1,
    weight_offset: float = 0.0, need_h: bool = True, need_x: bool = False,
    need_weight: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradient of h (dh added), the same in dy's dtype, and the weight's."""
    need = (need_h, need_x, need_weight)
    return _norm_bwd.backward(
        "rms_norm_bwd", dy, h, dh, weight, None, eps, dims, weight_offset, False, *need
    )[:3]
