"""apply_rotary_emb of flash_attn/layers/rotary.py, on llmops.rope."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmops.integrations.flash_attn import _arguments
from llmops.ops import _sequences
from llmops.ops.rope import rope

OP = "apply_rotary_emb"


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Turns the first R elements of every head by the angles of its token's position.

    Args:
        x: [B, T, H, D], or packed sequences [total, H, D] with cu_seqlens; fp32/bf16/fp16.
        cos, sin: [N, R/2], R <= D, of any float dtype; they take no gradient on the kernels.
        interleaved: pairs of neighbours (GPT-J), not halves (GPT-NeoX).
        inplace: overwrite x, and return it. An x that requires a gradient and was computed keeps
            a right gradient; where x is a leaf, only the returned tensor leads to the rotation.
        seqlen_offsets: position of each sequence's first token; an int, or an integer tensor [B].
        cu_seqlens: [B + 1], int32 or int64: where each sequence starts, and the total.
        max_seqlen: needed with cu_seqlens: no sequence is longer.

    Returns:
        Tensor of x's shape and dtype.

    Raises:
        TypeError, ValueError, IndexError (a position outside the tables): naming the argument.
    """
    if cu_seqlens is None:
        if max_seqlen is not None and x.dim() == 4 and max_seqlen != x.shape[1]:
            raise ValueError(
                f"llmops.{OP}: max_seqlen={max_seqlen} without cu_seqlens must be None or x's "
                f"{x.shape[1]} tokens; pass cu_seqlens with packed sequences"
            )
        _arguments.heads(OP, "[B, T, H, D]", x=x)
        cos, sin, positions = _dense_positions(x, cos, sin, seqlen_offsets)
    else:
        _arguments.heads(OP, "[total, H, D] with cu_seqlens", x=x)
        positions = _packed_positions(x, seqlen_offsets, cu_seqlens, max_seqlen)
    if not inplace:
        return turn(x, cos, sin, positions, interleaved)
    if torch.is_grad_enabled() and x.requires_grad and x.is_leaf:
        return _InPlaceOfLeaf.apply(x, cos, sin, positions, interleaved)  # type: ignore[no-any-return]
    return x.copy_(turn(x, cos, sin, positions, interleaved))


def turn(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    interleaved: bool,
    inverse: bool = False,
) -> Tensor:
    """rope of [B, T, H, D], or of [total, H, D] as one sequence."""
    sequences = x if x.dim() == 4 else x[None]
    turned = rope(
        sequences.transpose(1, 2), cos, sin, positions, interleaved=interleaved, inverse=inverse
    ).transpose(1, 2)
    return turned if x.dim() == 4 else turned[0]


class _InPlaceOfLeaf(torch.autograd.Function):
    """Autograd lets no one write to a leaf; upstream writes past it, and so does this: the result
    then is an alias of the leaf whose gradient is the rotation's."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool
    ) -> Tensor:
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            raise NotImplementedError(
                f"llmops.{OP}: cos or sin requires a gradient, which inplace=True on a leaf does "
                "not compute; detach them, or pass inplace=False"
            )
        ctx.save_for_backward(cos, sin, positions)
        ctx.interleaved = interleaved
        return x.copy_(turn(x, cos, sin, positions, interleaved))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin, positions = ctx.saved_tensors
        turned = turn(grad, cos, sin, positions, ctx.interleaved, inverse=True)
        return turned, None, None, None, None


def _dense_positions(
    x: Tensor, cos: Tensor, sin: Tensor, offsets: int | Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    batch, tokens = x.shape[:2]
    if isinstance(offsets, Tensor):
        _sequences.integers(OP, "seqlen_offsets", offsets, (batch,), x)
        return cos, sin, offsets[:, None] + torch.arange(tokens, device=x.device)
    if offsets < 0 or offsets + tokens > cos.shape[0]:
        raise IndexError(
            f"llmops.{OP}: seqlen_offsets={offsets} puts {tokens} tokens at positions {offsets} to "
            f"{offsets + tokens - 1}, but cos and sin have {cos.shape[0]} rows"
        )
    return cos[offsets : offsets + tokens], sin[offsets : offsets + tokens], None


def _packed_positions(
    x: Tensor, offsets: int | Tensor, cu_seqlens: Tensor, max_seqlen: int | None
) -> Tensor:
    """[total]: every token's index in its sequence, plus the sequence's offset."""
    if max_seqlen is None:
        raise ValueError(f"llmops.{OP}: max_seqlen must be given with cu_seqlens")
    _sequences.integers(OP, "cu_seqlens", cu_seqlens, (None,), x)
    if len(cu_seqlens) < 2:
        raise ValueError(f"llmops.{OP}: cu_seqlens must be [B + 1]; got {cu_seqlens.tolist()}")
    counts = cu_seqlens.diff()
    shortest, longest = int(counts.min()), int(counts.max())
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if shortest < 0 or first != 0 or last != len(x):
        raise ValueError(
            f"llmops.{OP}: cu_seqlens must run from 0 to x's {len(x)} tokens and never fall; got "
            f"{cu_seqlens.tolist()}"
        )
    if longest > max_seqlen:
        raise ValueError(
            f"llmops.{OP}: max_seqlen is {max_seqlen}, but a sequence has {longest} tokens"
        )
    if isinstance(offsets, Tensor):
        _sequences.integers(OP, "seqlen_offsets", offsets, (len(counts),), x)
    starts = cu_seqlens[:-1] - offsets
    return torch.arange(len(x), device=x.device) - torch.repeat_interleave(starts, counts)
