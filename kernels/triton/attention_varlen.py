"""attention_varlen: the kernels of attention over packed sequences [total, H, D], told apart by
cu_seqlens inside the same tile loops. Lengths are not read back from the device: the bounds are
clamped to the tensors, and right values are the caller's to give."""

from __future__ import annotations

from typing import Any

from llmops.kernels.triton.attention import forward
from llmops.kernels.triton.attention_bwd import backward
from torch import Tensor


def _heads(x: Tensor) -> Tensor:
    """[total, H, D] as [1, H, total, D]."""
    return x.transpose(0, 1)[None]


def _packed(x: Tensor) -> Tensor:
    return x[0].transpose(0, 1)


def attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, causal: bool, scale: float, *modifiers: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out [total_q, Hq, Dv] laid out as q, lse [Hq, total_q] fp32."""
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    out, lse = forward(_heads(q), _heads(k), _heads(v), None, causal, scale, modifiers, lengths)
    return _packed(out), lse[0]


def attention_varlen_bwd(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor,
    lse: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    causal: bool, scale: float, *modifiers: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """dq, dk, dv laid out as q, k, v; dsinks fp32."""
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    dq, dk, dv, _, dsinks = backward(
        _heads(grad_out), None if grad_lse is None else grad_lse[None], _heads(q), _heads(k),
        _heads(v), None, _heads(out), lse[None], causal, scale, False, modifiers, lengths,
    )  # fmt: skip
    return _packed(dq), _packed(dk), _packed(dv), dsinks
