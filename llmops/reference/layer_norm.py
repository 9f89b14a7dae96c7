"""layer_norm in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmops.reference._common import _wide
from llmops.reference._norm import _add, _dims, _norm_bwd


def layer_norm(
    x: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    dims, wide = _dims(normalized_shape), _wide(x)
    centered = wide - wide.mean(dims, keepdim=True)
    y = centered * torch.rsqrt(centered.square().mean(dims, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.to(wide.dtype)
    if bias is not None:
        y = y + bias.to(wide.dtype)
    return y.to(x.dtype)


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    total = _add(x, residual)
    return layer_norm(total, normalized_shape, weight, bias, eps).to(x.dtype), total


def layer_norm_bwd(
    dy: Tensor,
    h: Tensor,
    dh: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dims: int,
    need_h: bool,
    need_x: bool,
    need_params: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    need = (need_h, need_x, need_params)
    return _norm_bwd(dy, h, dh, weight, bias, eps, dims, 0.0, True, need)
