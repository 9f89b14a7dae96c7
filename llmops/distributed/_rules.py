"""Along which dimensions each operator may be split over devices: the sharding rules of all ops.

`_sharding.py` says what a rule is. In one sentence each: rows are independent (norms, softmax,
losses); a parameter that all rows share is replicated and its gradient is a sum over ranks;
attention splits over batch and heads, and over queries where no position is looked at; what is
elementwise splits anywhere.

Source: Shoeybi et al., "Megatron-LM", 2019 (columns, then rows, of each pair of projections);
Korthikanti et al., 2022 (sequence parallel norms); Jacobs et al., "DeepSpeed Ulysses", 2023 (from
tokens to heads around attention, which DTensor finds by itself).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed.tensor._ops._embedding_ops import _MaskPartial  # type: ignore[attr-defined]

from llmops.distributed._sharding import SUM, Place, Rule, register

Ways = Iterator[tuple[tuple[Place, ...], dict[str, Place]]]


def _beside(tensor: Any, like: Any, dim: int) -> Place:
    """The dimension of `tensor`, broadcast to `like`, that goes with like's `dim`; None where it
    has none of its own."""
    if tensor is None:
        return None
    own = dim - (like.ndim - tensor.ndim)
    return own if own >= 0 and tensor.shape[own] == like.shape[dim] else None


# ---- rows and elements ---------------------------------------------------------------------------


def _softmax(x: Any, mask: Any, causal: bool, **_: Any) -> Ways:
    for dim in range(x.ndim - (2 if causal else 1)):  # the causal limit counts rows
        yield (dim,), {"x": dim, "mask": _beside(mask, x, dim)}


def _softmax_bwd(y: Any, **_: Any) -> Ways:
    for dim in range(y.ndim - 1):
        yield (dim,), {"grad": dim, "y": dim}


def _norm(x: Any, dims: int, residual: Any = None, **_: Any) -> Ways:
    for dim in range(x.ndim - dims):
        yield (dim,) * (1 if residual is None else 2), {"x": dim, "residual": dim}


def _norm_bwd(
    h: Any, dims: int, need_h: bool, need_x: bool, need_weight: bool, parameters: int
) -> Ways:
    for dim in range(h.ndim - dims):
        grads = (dim if need_h else None, dim if need_x else None)
        sums = (SUM if need_weight else None,) * parameters
        yield (*grads, *sums), {"dy": dim, "h": dim, "dh": dim}


def _rms_norm_bwd(
    h: Any, dims: int, need_h: bool, need_x: bool, need_weight: bool, **_: Any
) -> Ways:
    return _norm_bwd(h, dims, need_h, need_x, need_weight, 1)


def _layer_norm_bwd(
    h: Any, dims: int, need_h: bool, need_x: bool, need_params: bool, **_: Any
) -> Ways:
    return _norm_bwd(h, dims, need_h, need_x, need_params, 2)


def _gelu(x: Any, **_: Any) -> Ways:
    for dim in range(x.ndim):
        yield (dim,), {"x": dim, "grad": dim}


def _glu(gate: Any, up: Any, **_: Any) -> Ways:
    # A fused projection has the gate in its first half: split, a rank would hold no whole pair.
    for dim in range(gate.ndim - (1 if up is None else 0)):
        yield (dim,), {"gate": dim, "up": dim}


def _glu_bwd(gate: Any, **_: Any) -> Ways:
    for dim in range(gate.ndim):
        yield (dim, dim), {"grad": dim, "gate": dim, "up": dim}


def _glu_bwd_fused(x: Any, **_: Any) -> Ways:
    for dim in range(x.ndim - 1):
        yield (dim,), {"grad": dim, "x": dim}


def _linear(x: Any, bias: Any, **_: Any) -> Ways:
    last = x.ndim - 1
    for dim in range(last):
        yield (dim,), {"x": dim}
    yield (last,), {"weight": 0, "bias": 0}  # columns
    yield (SUM,), {"x": last, "weight": 1, "bias": SUM}  # rows; one rank adds the bias


def _sample(**_: Any) -> Ways:
    yield (0,), {"logits": 0, "uniform": 0}


# ---- embedding and losses ------------------------------------------------------------------------


def _embedding(tokens: Any, weight: Any, **_: Any) -> Ways:
    for dim in range(tokens.ndim):
        yield (dim,), {"tokens": dim, "positions": dim}
    yield (tokens.ndim,), {"weight": 1, "position_weight": 1}
    # Part of the vocabulary: a rank looks up the tokens it has; the rest is masked out of the sum,
    # row 0 read in its place, which every rank must have.
    rows, most = weight.shape[0], max(weight.mesh.shape)
    if (most - 1) * -(-rows // most) >= rows:
        return
    shape = torch.Size(int(size) for size in weight.shape)
    masked = _MaskPartial(offset_shape=shape, offset_dim=0)
    yield (masked,), {"tokens": masked, "weight": 0}


def _embedding_bwd(grad: Any, ids: Any, **_: Any) -> Ways:
    for dim in range(ids.ndim):
        yield (SUM,), {"grad": dim, "ids": dim}
    yield (1,), {"grad": grad.ndim - 1}
    yield (SUM,), {"grad": SUM}


# A mean divides by a count that no rank knows: llmops.cross_entropy divides the sum instead.


def _cross_entropy(x: Any, reduction: str, **_: Any) -> Ways:
    for dim in range(x.ndim - 1) if reduction != "mean" else ():
        yield (SUM if reduction == "sum" else dim, dim), {"x": dim, "target": dim}


def _cross_entropy_bwd(x: Any, reduction: str, **_: Any) -> Ways:
    for dim in range(x.ndim - 1) if reduction != "mean" else ():
        grad = dim if reduction == "none" else None
        yield (dim,), {"grad": grad, "grad_lse": dim, "x": dim, "target": dim, "lse": dim}


def _linear_cross_entropy(
    reduction: str, want_input: bool, want_weight: bool, want_bias: bool, backend: str, **_: Any
) -> Ways:
    if reduction == "mean":
        return
    # The reference makes no gradient ahead: those results are empty.
    row, *sums = (want and backend != "reference" for want in (want_input, want_weight, want_bias))
    yield (
        (SUM if reduction == "sum" else 0, 0 if row else None, *(SUM if w else None for w in sums)),
        {"input": 0, "target": 0},
    )


def _linear_cross_entropy_bwd(
    input: Any, dinput: Any, dweight: Any, dbias: Any, reduction: str, want_input: bool,
    want_weight: bool, want_bias: bool, **_: Any,
) -> Ways:  # fmt: skip
    if reduction == "mean":
        return
    outputs = (0 if want_input else None, *(SUM if w else None for w in (want_weight, want_bias)))
    yield (
        outputs,
        {
            "grad": 0 if reduction == "none" else None,
            "input": 0,
            "target": 0,
            "dinput": 0 if dinput.ndim > 1 else None,
            "dweight": SUM if dweight.ndim > 1 else None,
            "dbias": SUM if dbias.shape[0] else None,
        },
    )


# ---- positions and attention ---------------------------------------------------------------------


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


def _rope(x: Any, cos: Any, position_ids: Any, **_: Any) -> Ways:
    for dim in range(3):
        tables = _table_places(x, cos, position_ids, dim)
        if tables is not None:
            yield (dim,), {"x": dim, **tables}


def _rope_qk(q: Any, cos: Any, position_ids: Any, **_: Any) -> Ways:
    for dim in range(3):
        tables = _table_places(q, cos, position_ids, dim)
        if tables is not None:
            yield (dim, dim), {"q": dim, "k": dim, **tables}
    yield (1, None), {"q": 1}
    yield (None, 1), {"k": 1}


def _rope_qk_(**given: Any) -> Ways:
    for _, inputs in _rope_qk(**given):
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


def _attention(q: Any, dropout_p: float, **given: Any) -> Ways:
    _refuse_dropout(dropout_p)
    for dim, _, names in _attention_ways(q, **given):
        yield (dim, dim), names


def _attention_bwd(
    q: Any, need_mask_grad: bool, sinks: Any, dropout_p: float, **given: Any
) -> Ways:
    _refuse_dropout(dropout_p)
    for dim, kv, names in _attention_ways(q, **given):
        dmask = names["mask"] if names["mask"] is not None else SUM
        dsinks = None if sinks is None else names.get("sinks", SUM)
        rows = dict.fromkeys(("grad_out", "grad_lse", "out", "lse"), dim)
        yield (dim, kv, kv, dmask if need_mask_grad else None, dsinks), {**names, **rows}


def _attention_varlen(q: Any, k: Any, dropout_p: float, **given: Any) -> Ways:
    _refuse_dropout(dropout_p)
    for _, names in _split_heads("", q, k, 1, **given):
        yield (1, 0), names  # lse is [Hq, total_q]


def _attention_varlen_bwd(q: Any, k: Any, sinks: Any, dropout_p: float, **given: Any) -> Ways:
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


def _attention_kvcache(**given: Any) -> Ways:
    for dim, _, names in _cache_ways(**given):
        yield (dim, dim), names


def _attention_kvcache_bwd(sinks: Any, **given: Any) -> Ways:
    for dim, kv, names in _cache_ways(**given):
        rows = {"grad_out": dim, "grad_lse": dim}
        dsinks = None if sinks is None else names.get("sinks", SUM)
        yield (dim, kv, kv, dsinks), {**names, **rows}


def _kv_cache_append_(block_table: Any, **_: Any) -> Ways:
    rows = ("k_cache", "v_cache", "k", "v")
    yield (), dict.fromkeys(rows, 1)
    if block_table is None:
        yield (), dict.fromkeys((*rows, "cache_seqlens"), 0)


def _merge_attention(out_a: Any, **_: Any) -> Ways:
    rows = ("out_a", "lse_a", "out_b", "lse_b")
    for dim in range(out_a.ndim - 1):
        yield (dim, dim), dict.fromkeys(rows, dim)
    last = out_a.ndim - 1
    yield (last, None), {"out_a": last, "out_b": last}


def _merge_attention_bwd(out_a: Any, **_: Any) -> Ways:
    rows = ("grad_out", "grad_lse", "out_a", "lse_a", "out_b", "lse_b")
    for dim in range(out_a.ndim - 1):
        yield (dim,) * 4, dict.fromkeys(rows, dim)


RULES: dict[str, Rule] = {
    "add_layer_norm": _norm,
    "add_rms_norm": _norm,
    "attention": _attention,
    "attention_bwd": _attention_bwd,
    "attention_kvcache": _attention_kvcache,
    "attention_kvcache_bwd": _attention_kvcache_bwd,
    "attention_varlen": _attention_varlen,
    "attention_varlen_bwd": _attention_varlen_bwd,
    "cross_entropy": _cross_entropy,
    "cross_entropy_bwd": _cross_entropy_bwd,
    "embedding": _embedding,
    "embedding_bwd": _embedding_bwd,
    "geglu": _glu,
    "gelu": _gelu,
    "gelu_bwd": _gelu,
    "glu_bwd": _glu_bwd,
    "glu_bwd_fused": _glu_bwd_fused,
    "kv_cache_append_": _kv_cache_append_,
    "layer_norm": _norm,
    "layer_norm_bwd": _layer_norm_bwd,
    "linear": _linear,
    "linear_cross_entropy": _linear_cross_entropy,
    "linear_cross_entropy_bwd": _linear_cross_entropy_bwd,
    "merge_attention": _merge_attention,
    "merge_attention_bwd": _merge_attention_bwd,
    "rms_norm": _norm,
    "rms_norm_bwd": _rms_norm_bwd,
    "rope": _rope,
    "rope_qk": _rope_qk,
    "rope_qk_": _rope_qk_,
    "sample": _sample,
    "softmax": _softmax,
    "softmax_bwd": _softmax_bwd,
    "swiglu": _glu,
}
_CACHED = ("attention_kvcache", "attention_kvcache_bwd")


def register_all() -> None:
    for op, rule in RULES.items():
        grouped = None
        if op.startswith("attention"):
            grouped = ("q", "k_cache" if op in _CACHED else "k")
        register(op, rule, grouped=grouped)
