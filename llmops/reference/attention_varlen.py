"""attention_varlen in plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmops.reference._common import _wide
from llmops.reference.attention import attention, attention_bwd


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    return_lse: bool = False,
    alibi_slopes: Tensor | None = None,
    **modifiers: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` of one sequence after the other."""
    # An empty piece of each input: it gives the result its type where there is no sequence at all.
    outs = [q[:0, :, :1] * v[:0].sum() + q.new_zeros(0, q.shape[1], v.shape[2])]
    lses = [_wide(q[:0].sum(-1)).t()]
    q_at, k_at = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for b in range(len(q_at) - 1):
        each = slice(q_at[b], q_at[b + 1]), slice(k_at[b], k_at[b + 1]), slice(k_at[b], k_at[b + 1])
        heads_first = (x[s].transpose(0, 1)[None] for x, s in zip((q, k, v), each, strict=True))
        per_batch = alibi_slopes is not None and alibi_slopes.dim() == 2
        slopes = alibi_slopes[b : b + 1] if per_batch and alibi_slopes is not None else alibi_slopes
        out, lse = attention(
            *heads_first, alibi_slopes=slopes, first_batch=b, return_lse=True, **modifiers
        )
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    out = torch.cat(outs)
    return (out, torch.cat(lses, 1)) if return_lse else out


def attention_varlen_bwd(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    causal: bool,
    scale: float,
    window_left: int = -1,
    window_right: int = -1,
    alibi_slopes: Tensor | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """`attention_bwd` of one sequence after the other: dq, dk, dv and dsinks."""
    grads: list[list[Tensor]] = [[q[:0]], [k[:0]], [v[:0]]]
    dsinks = None if sinks is None else torch.zeros_like(sinks, dtype=lse.dtype)
    q_at, k_at = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()

    def heads_first(x: Tensor, at: list[int], b: int) -> Tensor:
        return x[at[b] : at[b + 1]].transpose(0, 1)[None]

    for b in range(len(q_at) - 1):
        per_batch = alibi_slopes is not None and alibi_slopes.dim() == 2
        slopes = alibi_slopes[b : b + 1] if per_batch and alibi_slopes is not None else alibi_slopes
        rows = slice(q_at[b], q_at[b + 1])
        *found, _, dsink = attention_bwd(
            heads_first(grad_out, q_at, b),
            None if grad_lse is None else grad_lse[None, :, rows],
            heads_first(q, q_at, b),
            heads_first(k, k_at, b),
            heads_first(v, k_at, b),
            None,
            heads_first(out, q_at, b),
            lse[None, :, rows],
            causal,
            scale,
            False,
            window_left,
            window_right,
            slopes,
            softcap,
            sinks,
            dropout_p,
            seed,
            b,
        )
        for each, grad in zip(grads, found, strict=True):
            each.append(grad[0].transpose(0, 1))
        if dsinks is not None and dsink is not None:
            dsinks = dsinks + dsink
    dq, dk, dv = (torch.cat(each) for each in grads)
    return dq, dk, dv, dsinks
