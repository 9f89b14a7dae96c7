"""softmax in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llmops.reference._common import _wide


def _causal_keep(queries: int, keys: int, device: torch.device) -> Tensor:
    """[Tq, Tk] bool, True keeps; bottom-right aligned: the last query sees every key."""
    rows = torch.arange(queries, device=device)[:, None] + (keys - queries)
    return torch.arange(keys, device=device)[None, :] <= rows


def _softmax_or_zero(logits: Tensor) -> Tensor:
    """Softmax over the last dim; a row of -inf only gives zeros, and zero gradients."""
    empty = (logits == -math.inf).all(-1, keepdim=True)
    return torch.softmax(logits.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)


def softmax(
    x: Tensor,
    dim: int = -1,
    *,
    scale: float = 1.0,
    mask: Tensor | None = None,
    causal: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    out_dtype = dtype or x.dtype
    logits = _wide(x) * scale
    if out_dtype == torch.float64:
        logits = logits.double()
    if mask is not None:
        boolean = mask.dtype == torch.bool
        logits = logits.masked_fill(~mask, -math.inf) if boolean else logits + mask.to(logits.dtype)
    if causal:
        keep = _causal_keep(x.shape[-2], x.shape[-1], x.device)
        logits = logits.masked_fill(~keep, -math.inf)
    zero_rows = mask is not None or causal
    if zero_rows and dim % x.dim() == x.dim() - 1:
        return _softmax_or_zero(logits).to(out_dtype)
    if zero_rows:
        return _softmax_or_zero(logits.transpose(dim, -1)).transpose(dim, -1).to(out_dtype)
    return torch.softmax(logits, dim).to(out_dtype)


def softmax_bwd(grad: Tensor, y: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """dx over the last dim from the forward's result: scale * y * (grad - sum(grad * y))."""
    g, p = _wide(grad), _wide(y)
    return (scale * p * (g - (g * p).sum(-1, keepdim=True))).to(dtype)
