"""rope in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from llmops.reference._common import _wide


def rope(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    *,
    interleaved: bool = False,
    inverse: bool = False,
) -> Tensor:
    if cos.dim() == 3:  # already gathered: [B, T, R/2]
        c, s = cos[:, None], sin[:, None]
    elif position_ids is None:
        c, s = cos[None, None, : x.shape[-2]], sin[None, None, : x.shape[-2]]
    elif position_ids.dim() == 1:
        c, s = cos[position_ids][None, None], sin[position_ids][None, None]
    else:
        c, s = cos[position_ids][:, None], sin[position_ids][:, None]
    rotated = 2 * cos.shape[-1]
    wide = _wide(x)
    c, s = c.to(wide.dtype), s.to(wide.dtype)
    s = -s if inverse else s
    turn, rest = wide[..., :rotated], wide[..., rotated:]
    if interleaved:
        a, b = turn[..., 0::2], turn[..., 1::2]
        turned = torch.stack([a * c - b * s, b * c + a * s], -1).flatten(-2)
    else:
        a, b = turn.chunk(2, -1)
        turned = torch.cat([a * c - b * s, b * c + a * s], -1)
    return torch.cat([turned, rest], -1).to(x.dtype)


def rope_qk(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    *,
    interleaved: bool = False,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    return (
        rope(q, cos, sin, position_ids, interleaved=interleaved, inverse=inverse),
        rope(k, cos, sin, position_ids, interleaved=interleaved, inverse=inverse),
    )


def rope_qk_(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    *,
    interleaved: bool = False,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    turned = rope_qk(q, k, cos, sin, position_ids, interleaved=interleaved, inverse=inverse)
    return q.copy_(turned[0]), k.copy_(turned[1])
