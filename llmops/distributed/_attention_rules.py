"""Sharding rules of positions and attention; `_rules.py` has the others and says what they share.

Attention splits over batch and heads, and over queries where no position is looked at. Where it
cannot stay split by tokens, DTensor moves it from tokens to heads and back by itself.

Source: Shoeybi et al., "Megatron-LM", 2019 (heads); Jacobs et al., "DeepSpeed Ulysses", 2023 (from
tokens to heads).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llmops.distributed._sharding import SUM, Place, Ways


def _table_places(x: Any, cos: Any, position_ids: Any, dim: int) -> dict[str, Place] | None:
    """Where cos, sin and position_ids are split when x [B, H, T, D] is along `dim`; None where it
    cannot be, since row t of the tables is position t."""
    table: Place = None
    ids: Place = None
    if dim == 0:
        table = 0 if cos.ndim == 3 and cos.shape[0] == x.shape[0] else None
        if position_ids is not None and position_ids.ndim == 2:
            ids = 0 if position_ids.shape[0] == x.shape[0] else None
    elif dim == 2:
        if position_ids is not None:
            ids = position_ids.ndim - 1
        elif cos.ndim == 3:
            table = 1
        elif cos.shape[0] == x.shape[2]:  # as many rows as tokens: each rank takes its own
            table = 0
        else:
            return None
    return {"cos": table, "sin": table, "position_ids": ids}


def rope(x: Any, cos: Any, position_ids: Any, **_: Any) -> Ways:
    for dim in range(3):
        tables = _table_places(x, cos, position_ids, dim)
        if tables is not None:
            yield (dim,), {"x": dim, **tables}


def rope_qk(q: Any, cos: Any, position_ids: Any, **_: Any) -> Ways:
    for dim in range(3):
        tables = _table_places(q, cos, position_ids, dim)
        if tables is not None:
            yield (dim, dim), {"q": dim, "k": dim, **tables}
    yield (1, None), {"q": 1}
    yield (None, 1), {"k": 1}


def rope_qk_(**given: Any) -> Ways:
    for _, inputs in rope_qk(**given):
        yield (), inputs


def _refuse_dropout(dropout_p: float) -> None:
    if dropout_p > 0:
        raise NotImplementedError(
            "llmops.attention: dropout of a DTensor is not supported, since each rank would drop "
            "by its own numbers and its own place; pass dropout_p=0.0, or attend to the local "
            "tensors (q.to_local())"
        )


def _split_heads(prefix: str, q: Any, k: Any, dim: int, **modifiers: Any) -> Iterator[Any]:
    """(keys and values, inputs) of the ways to split heads, along `dim` of q, k and v."""
    slopes = modifiers.get("alibi_slopes")
    named = {"alibi_slopes": None if slopes is None else slopes.ndim - 1, "sinks": 0}
    cache = {f"k{prefix}": dim, f"v{prefix}": dim}
    yield dim, {"q": dim, **cache, **named}
    if k.shape[dim] == 1:  # multi-query: every query head reads the one
        yield SUM, {"q": dim, **named}


def _attention_ways(
    q: Any, k: Any, causal: bool, window_left: int, window_right: int, mask: Any,
    alibi_slopes: Any, **_: Any,
) -> Iterator[tuple[int, Place, dict[str, Place]]]:  # fmt: skip
    """(dimension of q, place of dk and dv, inputs)."""
    slopes = 0 if alibi_slopes is not None and alibi_slopes.ndim == 2 else None
    ways: list[tuple[int, Place, dict[str, Place]]]
    ways = [(0, 0, {"q": 0, "k": 0, "v": 0, "alibi_slopes": slopes})]
    ways += [(1, kv, names) for kv, names in _split_heads("", q, k, 1, alibi_slopes=alibi_slopes)]
    if not causal and window_left < 0 and window_right < 0 and alibi_slopes is None:
        ways.append((2, SUM, {"q": 2}))
    for dim, kv, names in ways:
        own = None if mask is None else dim - (4 - mask.ndim)
        split = own is not None and own >= 0 and mask.shape[own] == q.shape[dim]
        yield dim, kv, {**names, "mask": own if split else None}


def attention(q: Any, dropout_p: float, **given: Any) -> Ways:
    _refuse_dropout(dropout_p)
    for dim, _, names in _attention_ways(q, **given):
        yield (dim, dim), names


def attention_bwd(q: Any, need_mask_grad: bool, sinks: Any, dropout_p: float, **given: Any) -> Ways:
    _refuse_dropout(dropout_p)
    for dim, kv, names in _attention_ways(q, **given):
        dmask = names["mask"] if names["mask"] is not None else SUM
        dsinks = None if sinks is None else names.get("sinks", SUM)
        rows = dict.fromkeys(("grad_out", "grad_lse", "out", "lse"), dim)
        yield (dim, kv, kv, dmask if need_mask_grad else None, dsinks), {**names, **rows}


def attention_varlen(q: Any, k: Any, dropout_p: float, **given: Any) -> Ways:
    _refuse_dropout(dropout_p)
    for _, names in _split_heads("", q, k, 1, **given):
        yield (1, 0), names  # lse is [Hq, total_q]


def attention_varlen_bwd(q: Any, k: Any, sinks: Any, dropout_p: float, **given: Any) -> Ways:
    _refuse_dropout(dropout_p)
    for kv, names in _split_heads("", q, k, 1, **given):
        rows = {"grad_out": 1, "grad_lse": 0, "out": 1, "lse": 0}
        yield (1, kv, kv, None if sinks is None else 0), {**names, **rows}


def _cache_ways(
    q: Any, k_cache: Any, block_table: Any, alibi_slopes: Any = None, **_: Any
) -> Iterator[tuple[int, Place, dict[str, Place]]]:
    each: dict[str, Place] = dict.fromkeys(
        ("q", "cache_seqlens", "cache_leftpad", "block_table"), 0
    )
    each["alibi_slopes"] = 0 if alibi_slopes is not None and alibi_slopes.ndim == 2 else None
    if block_table is None:
        yield 0, 0, {**each, "k_cache": 0, "v_cache": 0}
    else:  # the pages are everybody's
        yield 0, SUM, each
    for kv, names in _split_heads("_cache", q, k_cache, 1, alibi_slopes=alibi_slopes):
        yield 1, kv, names


def attention_kvcache(**given: Any) -> Ways:
    for dim, _, names in _cache_ways(**given):
        yield (dim, dim), names


def attention_kvcache_bwd(sinks: Any, **given: Any) -> Ways:
    for dim, kv, names in _cache_ways(**given):
        rows = {"grad_out": dim, "grad_lse": dim}
        dsinks = None if sinks is None else names.get("sinks", SUM)
        yield (dim, kv, kv, dsinks), {**names, **rows}


def kv_cache_append_(block_table: Any, **_: Any) -> Ways:
    rows = ("k_cache", "v_cache", "k", "v")
    yield (), dict.fromkeys(rows, 1)
    if block_table is None:
        yield (), dict.fromkeys((*rows, "cache_seqlens"), 0)


def merge_attention(out_a: Any, **_: Any) -> Ways:
    rows = ("out_a", "lse_a", "out_b", "lse_b")
    for dim in range(out_a.ndim - 1):
        yield (dim, dim), dict.fromkeys(rows, dim)
    last = out_a.ndim - 1
    yield (last, None), {"out_a": last, "out_b": last}


def merge_attention_bwd(out_a: Any, **_: Any) -> Ways:
    rows = ("grad_out", "grad_lse", "out_a", "lse_a", "out_b", "lse_b")
    for dim in range(out_a.ndim - 1):
        yield (dim,) * 4, dict.fromkeys(rows, dim)
