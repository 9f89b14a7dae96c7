"""flash_attn_varlen_func and its packed forms: sequences of different lengths, one after another.
The package's docstring has the arguments that all functions share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmops.integrations.flash_attn import _arguments
from llmops.integrations.flash_attn._arguments import Window
from llmops.integrations.flash_attn.attention import (
    Result,
    dropout_state,
    probabilities,
    signed_by_dropout,
)
from llmops.ops import _check
from llmops.ops.attention_varlen import attention_varlen


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Result:
    """flash_attn_func of every sequence by itself.

    Args:
        q: [total_q, Hq, D].
        k, v: [total_k, Hkv, D], or with block_table a paged cache [P, page, Hkv, D].
        cu_seqlens_q, cu_seqlens_k: [B + 1], int32 or int64: where each sequence starts, and the
            total. With block_table only the lengths that cu_seqlens_k gives count.
        max_seqlen_q, max_seqlen_k: no sequence is longer.
        block_table: [B, pages], int32 or int64: the pages that hold a sequence's keys, in order.
            Pages beyond a sequence's length are never read; the others are copied.
        Others: as in the package's docstring.

    Returns:
        out [total_q, Hq, D]; with return_attn_probs (out, softmax_lse [Hq, total_q], S_dmask
        [B, Hq, max_seqlen_q, max_seqlen_k], zero beyond a sequence's lengths).

    Raises:
        TypeError, ValueError, IndexError (a page that is not there): naming the argument.
    """
    op = "flash_attn_varlen_func"
    mods = _arguments.modifiers(op, softmax_scale, causal, window_size, softcap, alibi_slopes)
    boundaries = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return _varlen(op, (q, k, v), boundaries, dropout_p, mods, return_attn_probs, block_table)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """flash_attn_varlen_func with keys and values in one tensor, kv [total_k, 2, Hkv, D]."""
    op = "flash_attn_varlen_kvpacked_func"
    mods = _arguments.modifiers(op, softmax_scale, causal, window_size, softcap, alibi_slopes)
    _arguments.packed(op, "kv", kv, "[total_k, 2, Hkv, D]", 2)
    boundaries = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return _varlen(op, (q, *kv.unbind(1)), boundaries, dropout_p, mods, return_attn_probs)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """flash_attn_varlen_func of a fused projection, qkv [total, 3, H, D]; so is its gradient."""
    op = "flash_attn_varlen_qkvpacked_func"
    mods = _arguments.modifiers(op, softmax_scale, causal, window_size, softcap, alibi_slopes)
    _arguments.packed(op, "qkv", qkv, "[total, 3, H, D]", 3)
    boundaries = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    return _varlen(op, qkv.unbind(1), boundaries, dropout_p, mods, return_attn_probs)


def _varlen(
    op: str,
    qkv: tuple[Tensor, ...],
    boundaries: tuple[Tensor, Tensor, int, int],
    dropout_p: float,
    mods: dict[str, Any],
    return_attn_probs: bool,
    block_table: Tensor | None = None,
) -> Result:
    q, k, v = qkv
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k = boundaries
    _arguments.heads(op, "[total_q, Hq, D]", q=q)
    if block_table is not None:
        _arguments.heads(op, "[P, page, Hkv, D] with block_table", k=k, v=v)
        k, v = _from_pages(op, k, v, cu_seqlens_k, block_table)
    _arguments.heads(op, "[total_k, Hkv, D]", k=k, v=v)
    _arguments.same_keys(op, q, k, v)
    before = dropout_state(q.device, dropout_p) if return_attn_probs else None
    out, lse = attention_varlen(q, k, v, *boundaries, dropout_p=dropout_p, **mods, return_lse=True)
    if not return_attn_probs:
        return out
    if before is None:
        return out, lse, out.new_empty(0)
    counts_q, counts_k = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    weights = out.new_zeros(len(counts_q), q.shape[1], max_seqlen_q, max_seqlen_k)
    slopes = mods["alibi_slopes"]
    for b, (qb, kb) in enumerate(zip(q.split(counts_q), k.split(counts_k), strict=True)):
        own = slopes[b] if slopes is not None and slopes.dim() == 2 else slopes
        weights[b, :, : len(qb), : len(kb)] = probabilities(
            qb[None].transpose(1, 2), kb[None].transpose(1, 2), {**mods, "alibi_slopes": own}
        )
    return out, lse, signed_by_dropout(weights, dropout_p, before)


def _from_pages(
    op: str, k: Tensor, v: Tensor, cu_seqlens_k: Tensor, block_table: Tensor
) -> tuple[Tensor, Tensor]:
    """The keys and values that the sequences hold, copied from [P, page, Hkv, D] into
    [total_k, Hkv, D]."""
    batch, page = len(cu_seqlens_k) - 1, k.shape[1]
    _check.integers(op, "cu_seqlens_k", cu_seqlens_k)
    _check.integers(op, "block_table", block_table)
    if block_table.dim() != 2 or block_table.shape[0] != batch or page == 0:
        raise ValueError(
            f"llmops.{op}: block_table must be [B, pages] with B {batch} and pages not empty; got "
            f"shape {tuple(block_table.shape)} and pages of {page}"
        )
    counts = cu_seqlens_k.diff()
    capacity = page * block_table.shape[1]
    if batch and not 0 <= int(counts.min()) <= int(counts.max()) <= capacity:
        raise ValueError(
            f"llmops.{op}: block_table has {block_table.shape[1]} pages of {page} per sequence, so "
            f"cu_seqlens_k must hold lengths from 0 to {capacity}; got {counts.tolist()}"
        )
    sequence = torch.arange(batch, device=k.device).repeat_interleave(counts)
    position = torch.arange(len(sequence), device=k.device) - cu_seqlens_k[sequence]
    block = block_table[sequence, position // page]
    _check.within(op, "block_table", block, len(k), "the cache has")
    return k[block, position % page], v[block, position % page]
