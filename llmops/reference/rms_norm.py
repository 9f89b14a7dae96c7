"""rms_norm in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmops.reference._common import _wide
from llmops.reference._norm import _add, _dims, _norm_bwd


def rms_norm_eps(dtype: torch.dtype) -> float:
    """What F.rms_norm takes where eps is None: the epsilon of the dtype it computes in."""
    return torch.finfo(dtype if dtype == torch.float64 else torch.float32).eps


def rms_norm(
    x: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    weight_offset: float = 0.0,
) -> Tensor:
    dims, wide = _dims(normalized_shape), _wide(x)
    eps = rms_norm_eps(x.dtype) if eps is None else eps
    y = wide * torch.rsqrt(wide.square().mean(dims, keepdim=True) + eps)
    if weight is not None:
        y = y * (weight.to(wide.dtype) + weight_offset)
    return y.to(x.dtype)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    weight_offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    eps = rms_norm_eps(x.dtype) if eps is None else eps
    total = _add(x, residual)
    normed = rms_norm(total, normalized_shape, weight, eps, weight_offset=weight_offset)
    return normed.to(x.dtype), total


def rms_norm_bwd(
    dy: Tensor,
    h: Tensor,
    dh: Tensor | None,
    weight: Tensor | None,
    eps: float,
    dims: int,
    weight_offset: float,
    need_h: bool,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    need = (need_h, need_x, need_weight)
    return _norm_bwd(dy, h, dh, weight, None, eps, dims, weight_offset, False, need)[:3]
