"""cross_entropy in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from llmops.reference._common import _wide


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    dtype: torch.dtype | None = None,
) -> Tensor:
    x = input.movedim(1, -1) if input.dim() > 2 else input
    out_dtype = dtype or input.dtype
    if out_dtype == torch.float64:
        x = x.double()
    how = (ignore_index, label_smoothing, z_loss, reduction, out_dtype)
    if target.shape != input.shape:
        return cross_entropy_fwd(x, target, weight, *how)[0]
    x = _wide(x)
    probabilities = (target.movedim(1, -1) if input.dim() > 2 else target).to(x.dtype)
    classes = x.shape[-1]
    if label_smoothing > 0:
        probabilities = probabilities * (1 - label_smoothing) + label_smoothing / classes
    terms = -torch.log_softmax(x, -1) * probabilities
    losses = (terms if weight is None else terms * weight.to(x.dtype)).sum(-1)
    if z_loss:
        losses = losses + z_loss * torch.logsumexp(x, -1).square()
    if reduction == "none":
        return losses.to(out_dtype)
    return (losses.mean() if reduction == "mean" else losses.sum()).to(out_dtype)


def cross_entropy_fwd(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Class indices target [...] for logits x [..., C]: the loss, and the rows' log-sum-exp in
    fp64, 0 where the target is ignored. Ignored rows are not read."""
    ignored = target == ignore_index
    x = _wide(x).masked_fill(ignored[..., None], 0.0)
    classes = x.shape[-1]
    at = target.long().masked_fill(ignored, 0)
    weights = x.new_ones(classes) if weight is None else weight.to(x.dtype)
    own = weights[at] if classes else x.new_ones(at.shape)
    minus_log = -torch.log_softmax(x, -1)
    picked = minus_log.gather(-1, at[..., None])[..., 0] if classes else minus_log.sum(-1)
    losses = own * picked
    if label_smoothing > 0:
        spread = minus_log if weight is None else minus_log * weights
        losses = (1 - label_smoothing) * losses + label_smoothing / classes * spread.sum(-1)
    losses = losses.masked_fill(ignored, 0.0)
    lse = torch.logsumexp(x, -1).masked_fill(ignored, 0.0)
    squares = z_loss * lse.square() if z_loss else torch.zeros_like(lse)
    if reduction == "none":
        return (losses + squares).to(dtype), lse.double()
    total, extra = losses.sum(), squares.sum()
    if reduction == "mean":
        kept = (~ignored).to(x.dtype)
        total, extra = total / (own * kept).sum(), extra / kept.sum()
    return (total + extra if z_loss else total).to(dtype), lse.double()


def cross_entropy_bwd(
    grad: Tensor,
    grad_lse: Tensor | None,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
) -> Tensor:
    """dx of cross_entropy_fwd. The log-sum-exp is taken from x again, so that this may itself be
    differentiated."""
    ignored = target == ignore_index
    z = _wide(x).masked_fill(ignored[..., None], 0.0)
    classes = z.shape[-1]
    kept = (~ignored).to(z.dtype)
    at = target.long().masked_fill(ignored, 0)
    weights = z.new_ones(classes) if weight is None else weight.to(z.dtype)
    own = weights[at] * kept if classes else kept
    per_loss = per_row = kept * _wide(grad).to(z.dtype)
    if reduction == "mean":
        per_loss, per_row = per_loss / own.sum(), per_row / kept.sum()
    toward = per_loss * own * (1 - label_smoothing)
    spread = per_loss * (label_smoothing / max(classes, 1))
    scale = toward
    if label_smoothing > 0:
        scale = scale + spread * weights.sum()
    if z_loss:
        scale = scale + 2 * z_loss * per_row * torch.logsumexp(z, -1)
    if grad_lse is not None:
        scale = scale + grad_lse.to(z.dtype) * kept
    dx = torch.softmax(z, -1) * scale[..., None] - spread[..., None] * weights
    if classes:
        dx = dx.scatter_add(-1, at[..., None], -toward[..., None])
    return dx.masked_fill(ignored[..., None], 0.0).to(x.dtype)
