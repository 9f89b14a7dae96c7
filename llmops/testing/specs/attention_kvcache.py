"""Samples of attention_kvcache: contiguous and paged, decode and chunks, lengths and left pads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import llmops
from llmops import reference
from llmops.testing._core import Make, OpSpec, Sample
from llmops.testing.specs import _attention_floors
from llmops.testing.specs.attention import torch_attention


def _cache(
    make: Make, heads: tuple[int, int], queries: int, lengths: tuple[int, ...], *dims: int
) -> tuple[Any, ...]:
    """q, k_cache, v_cache, cache_seqlens for a contiguous cache as long as the longest."""
    batch, longest = len(lengths), max(lengths, default=5)
    return (
        make(batch, heads[0], queries, dims[0], grad=False),
        make(batch, heads[1], longest, dims[0], grad=False),
        make(batch, heads[1], longest, dims[-1], grad=False),
        torch.tensor(lengths, dtype=torch.int64, device=make.device),
    )


def _paged(
    make: Make,
    heads: tuple[int, int],
    queries: int,
    lengths: tuple[int, ...],
    page: int,
    *dims: int,
) -> tuple[tuple[Any, ...], Tensor]:
    """The same in pages, shuffled; and the block table, -1 where nothing is held."""
    width = -(-max(lengths) // page)
    table = torch.full((len(lengths), width), -1, dtype=torch.int32)
    blocks = torch.randperm(len(lengths) * width + 1, generator=make.generator)
    used = 0
    for b, length in enumerate(lengths):
        held = -(-length // page)
        table[b, :held] = blocks[used : used + held]
        used += held
    q, _, _, cache_seqlens = _cache(make, heads, queries, lengths, *dims)
    shape = (len(blocks), heads[1], page)
    k_cache, v_cache = (make(*shape, d, grad=False) for d in (dims[0], dims[-1]))
    return (q, k_cache, v_cache, cache_seqlens.int()), table.to(make.device)


def samples(make: Make) -> Iterator[Sample]:
    causal, lse = {"causal": True}, {"return_lse": True}
    uneven = (25, 0, 130, 61)
    leftpad = torch.tensor((3, 0, 50, 61), dtype=torch.int32, device=make.device)
    few, table = _paged(make, (4, 2), 3, uneven, 16, 8, 6)
    yield Sample("paged16-chunk3", few, {"block_table": table, **causal, **lse})
    yield Sample("chunk5", _cache(make, (4, 2), 5, uneven, 8, 6), {**causal, **lse})
    yield Sample("leftpad-decode", _cache(make, (2, 1), 1, uneven, 16), {
        "cache_leftpad": leftpad,
        **lse,
    })  # fmt: skip

    yield Sample("chunk70", _cache(make, (2, 2), 70, uneven, 33, 20), {**causal, **lse})
    yield Sample("split-decode", _cache(make, (2, 2), 1, (1300, 7, 600), 20), lse)
    for page in (7, 16, 64, 256):
        # A chunk of tiles and a decode step, both against keys of many pages.
        for queries, heads in ((20, (6, 2)), (1, (3, 1))):
            arguments, table = _paged(make, heads, queries, (90, 33, 1300), page, 24, 17)
            kwargs = {"block_table": table, **causal, **lse}
            yield Sample(f"paged{page}-{queries}", arguments, kwargs)
    arguments, table = _paged(make, (4, 2), 2, uneven, 5, 12)
    yield Sample("paged5-modifiers", arguments, {
        "block_table": table,
        "cache_leftpad": leftpad,
        "window": (40, 0),
        "alibi_slopes": make(4, 4, grad=False, dtype=torch.float32).abs() * 0.1,
        "softcap": 3.0,
        "sinks": make(4, grad=False, dtype=torch.float32),
        **causal,
        **lse,
    })  # fmt: skip
    yield Sample("no-queries", _cache(make, (2, 2), 0, uneven, 8), lse)
    yield Sample("no-sequence", _cache(make, (2, 2), 3, (), 8), lse)


def torch_attention_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    block_table: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    return_lse: bool = False,
    **kwargs: Any,
) -> Any:
    """PyTorch's own attention, one sequence after the other."""
    outs = [q.new_zeros(0, *q.shape[1:3], v_cache.shape[3])]
    lses = [q.new_zeros(0, *q.shape[1:3], dtype=torch.float32)]
    for b, end in enumerate(cache_seqlens.tolist()):
        begin = 0 if cache_leftpad is None else int(cache_leftpad[b])
        keys, values = (
            reference.cached_rows(cache, block_table, b, begin, end)[None]
            for cache in (k_cache, v_cache)
        )
        if alibi_slopes is not None:
            kwargs["alibi_slopes"] = alibi_slopes[b]
        # torch's own refuses some empty tensors.
        empty = end == begin or q.shape[2] == 0
        attend: Any = reference.attention if empty else torch_attention
        out, lse = attend(q[b : b + 1], keys, values, return_lse=True, **kwargs)
        outs.append(out)
        lses.append(lse.float())
    # The empty ones are not torch's: under autocast they take the dtype of those that are.
    kind = q.device.type
    lowered = torch.is_autocast_enabled(kind) and q.dtype != torch.float64
    dtype = torch.get_autocast_dtype(kind) if lowered else q.dtype
    out = torch.cat([o.to(dtype) for o in outs])
    return (out, torch.cat(lses)) if return_lse else out


def schemas(make: Make) -> dict[str, tuple[Any, ...]]:
    (q, k, v, lengths), table = _paged(make, (4, 2), 3, (9, 20), 4, 8, 6)
    modifiers = (4, -1, None, 3.0, make(4, grad=False, dtype=torch.float32))
    taking = (x.requires_grad_() for x in (q, k, v))
    return {
        "attention_kvcache": (*taking, lengths, table, None, True, 0.3, *modifiers, "cpu"),
    }


SPEC = OpSpec(
    name="attention_kvcache",
    fn=llmops.attention_kvcache,
    reference=reference.attention_kvcache,
    torch_fn=torch_attention_kvcache,
    samples=samples,
    schemas=schemas,
    rows=True,
    result_floor=_attention_floors.results(reference.attention_kvcache),
)
