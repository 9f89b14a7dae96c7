"""Layer norm, with the residual addition before it, and the gradient of both: `_norm.py`'s kernels
with centering. Ba, Kiros and Hinton, "Layer Normalization", 2016.
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


def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5,
    dims: int = 1,
) -> Tensor:  # fmt: skip
    """x [..., *weight.shape], normalized over its last `dims` dimensions; y is contiguous."""
    return _norm.forward("layer_norm", x, None, weight, bias, eps, dims, 0.0, True)[0]


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float,
    dims: int = 1,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y, x + residual), both contiguous."""
    return _norm.forward("layer_norm", x, residual, weight, bias, eps, dims, 0.0, True)


def layer_norm_bwd(
    dy: Tensor, h: Tensor, dh: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    eps: float, dims: int = 1, need_h: bool = True, need_x: bool = False, need_params: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradient of h (dh added), the same in dy's dtype, and the parameters'."""
    need = (need_h, need_x, need_params)
    return _norm_bwd.backward(
        "layer_norm_bwd", dy, h, dh, weight, bias, eps, dims, 0.0, True, *need
    )
