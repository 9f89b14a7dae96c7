"""merge_attention in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llmops.reference._common import _wide


def merge_attention(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    # Not logaddexp: where both are -inf its gradient is NaN.
    top = torch.maximum(lse_a, lse_b).detach()
    top = top.masked_fill(top == -math.inf, 0.0)
    weight_a, weight_b = torch.exp(lse_a - top), torch.exp(lse_b - top)
    total = weight_a + weight_b
    empty = total == 0
    safe = total.masked_fill(empty, 1.0)
    lse = (top + torch.log(safe)).masked_fill(empty, -math.inf)
    out = _wide(out_a) * (weight_a / safe)[..., None] + _wide(out_b) * (weight_b / safe)[..., None]
    return out.to(out_a.dtype), lse


def merge_attention_bwd(
    grad_out: Tensor,
    grad_lse: Tensor,
    out_a: Tensor,
    lse_a: Tensor,
    out_b: Tensor,
    lse_b: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """w = softmax over the two; dout_x = w_x dout, dlse_x = w_x (dlse + dout . (out_x - out))."""
    top = torch.maximum(lse_a, lse_b).detach()
    top = top.masked_fill(top == -math.inf, 0.0)
    weight_a, weight_b = torch.exp(lse_a - top), torch.exp(lse_b - top)
    total = weight_a + weight_b
    safe = total.masked_fill(total == 0, 1.0)
    weight_a, weight_b = weight_a / safe, weight_b / safe
    grad = _wide(grad_out)
    both = weight_a * weight_b * (grad * (_wide(out_a) - _wide(out_b))).sum(-1)
    return (
        (grad * weight_a[..., None]).to(out_a.dtype),
        both + weight_a * grad_lse,
        (grad * weight_b[..., None]).to(out_b.dtype),
        weight_b * grad_lse - both,
    )
