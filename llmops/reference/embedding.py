"""embedding in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llmops.reference._common import _wide


def embedding(
    tokens: Tensor,
    weight: Tensor,
    *,
    padding_idx: int | None = None,
    positions: Tensor | None = None,
    position_weight: Tensor | None = None,
) -> Tensor:
    out = F.embedding(tokens, weight, padding_idx=padding_idx)
    if position_weight is None:
        return out
    if positions is None:
        positions = torch.arange(tokens.shape[-1], device=tokens.device)
    return (_wide(out) + _wide(F.embedding(positions, position_weight))).to(weight.dtype)


def embedding_bwd(grad: Tensor, ids: Tensor, rows: int, padding_idx: int) -> Tensor:
    """[rows, D]: row v is the sum of grad where ids is v; zero for padding_idx (-1: none)."""
    wide = _wide(grad).reshape(-1, grad.shape[-1])
    flat = ids.reshape(-1).long()
    if padding_idx >= 0:
        wide = wide.masked_fill((flat == padding_idx)[:, None], 0.0)
    zeros = torch.zeros(rows, grad.shape[-1], dtype=wide.dtype, device=grad.device)
    return zeros.index_add(0, flat, wide).to(grad.dtype)
