"""Samples of attention_varlen: lengths that reach decode, packed and split tasks in one call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import llmops
from llmops import reference
from llmops.testing._core import Make, OpSpec, Sample
from llmops.testing.specs import _attention_floors
from llmops.testing.specs.attention import torch_attention


def _packed(
    make: Make,
    heads: tuple[int, int],
    q_lengths: Sequence[int],
    k_lengths: Sequence[int],
    *dims: int,
    dtype: torch.dtype = torch.int32,
) -> tuple[Any, ...]:
    """q, k, v and the four arguments of their lengths."""
    total_q, total_k = sum(q_lengths), sum(k_lengths)
    bounds = [
        torch.tensor([0, *lengths]).cumsum(0).to(make.device, dtype)
        for lengths in (q_lengths, k_lengths)
    ]
    return (
        make(total_q, heads[0], dims[0]),
        make(total_k, heads[1], dims[0]),
        make(total_k, heads[1], dims[-1]),
        *bounds,
        max(q_lengths, default=0),
        max(k_lengths, default=0),
    )


def samples(make: Make) -> Iterator[Sample]:
    causal, lse = {"causal": True}, {"return_lse": True}
    few = _packed(make, (4, 2), (5, 9, 3), (23, 21, 30), 8, 6)
    yield Sample("gqa-causal-lse", few, {**causal, **lse})
    # Many heads: the yardstick's error in four sums alone may be nothing by luck.
    many = _packed(make, (16, 2), (5, 9, 3), (23, 21, 30), 8, 6)
    sinks = make(16, dtype=torch.float32)
    yield Sample("sinks-window", many, {"sinks": sinks, "window": (12, 5), **lse})
    long = _packed(make, (2, 1), (70, 24), (95, 90), 16, dtype=torch.int64)
    yield Sample("int64-softcap", long, {"softcap": 4.0, **causal})

    # Decode, tiles, packed heads, empty on either side and on both; Tq > Tk.
    uneven = ((1, 0, 70, 2, 130, 4, 0), (25, 30, 95, 0, 160, 1100, 0))
    yield Sample("uneven-mha", _packed(make, (2, 2), *uneven, 33, 20), {**causal, **lse})
    yield Sample("uneven-gqa", _packed(make, (6, 2), *uneven, 16), {**lse})
    slopes = make(7, 2, grad=False, dtype=torch.float32).abs() * 0.01
    yield Sample("uneven-alibi", _packed(make, (2, 1), *uneven, 24), {
        "alibi_slopes": slopes,
        **causal,
    })  # fmt: skip
    yield Sample("window-long", _packed(make, (1, 1), (3, 20), (1500, 40), 8), {
        "window": (300, 0),
        **causal,
        **lse,
    })  # fmt: skip
    # Few sequences: the backward sums dk and dv in parts.
    yield Sample("parts-530", _packed(make, (1, 1), (530, 40), (540, 30), 8), causal)
    yield Sample("no-rows", _packed(make, (2, 2), (0, 0), (0, 3), 8), lse)
    yield Sample("no-sequence", _packed(make, (2, 1), (), (), 8), lse)


def torch_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    **kwargs: Any,
) -> Any:
    """PyTorch's own attention, one sequence after the other."""
    if not q.numel():
        return reference.attention_varlen(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **kwargs
        )
    return_lse, slopes = kwargs.pop("return_lse", False), kwargs.pop("alibi_slopes", None)
    outs, lses = [], []
    q_at, k_at = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for b in range(len(q_at) - 1):
        rows, keys = slice(q_at[b], q_at[b + 1]), slice(k_at[b], k_at[b + 1])
        one = [x.transpose(0, 1)[None] for x in (q[rows], k[keys], v[keys])]
        if slopes is not None:
            kwargs["alibi_slopes"] = slopes[b]
        # torch's own refuses some empty tensors.
        empty = one[0].shape[2] == 0 or one[1].shape[2] == 0
        attend: Any = reference.attention if empty else torch_attention
        out, lse = attend(*one, return_lse=True, **kwargs)
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0].float())
    out = torch.cat(outs)
    return (out, torch.cat(lses, 1)) if return_lse else out


def schemas(make: Make) -> dict[str, tuple[Any, ...]]:
    q, k, v, *lengths = _packed(make, (4, 2), (6, 3), (9, 8), 8, 5)
    sinks = make(4, dtype=torch.float32)
    modifiers = (4, -1, None, 3.0, sinks, 0.0, None)
    with torch.no_grad():
        out, lse = reference.attention_varlen(
            q, k, v, *lengths, causal=True, scale=0.3, window=(4, -1), softcap=3.0, sinks=sinks,
            return_lse=True,
        )  # fmt: skip
    results = (out.requires_grad_(), lse.requires_grad_())
    return {
        "attention_varlen": (q, k, v, *lengths, True, 0.3, *modifiers, "cpu"),
        "attention_varlen_bwd": (
            make(9, 4, 5), make(4, 9), q, k, v, *results, *lengths, True, 0.3, *modifiers, "cpu",
        ),
    }  # fmt: skip


SPEC = OpSpec(
    name="attention_varlen",
    fn=llmops.attention_varlen,
    reference=reference.attention_varlen,
    torch_fn=torch_attention_varlen,
    samples=samples,
    schemas=schemas,
    rows=True,
    result_floor=_attention_floors.results(reference.attention_varlen),
    gradient_floor=_attention_floors.gradients(reference.attention_varlen),
)
