"""Along which dimensions each operator may be split over devices: the sharding rules of all ops.

`_sharding.py` says what a rule is. In one sentence each: rows are independent (norms, softmax,
losses); a parameter that all rows share is replicated and its gradient is a sum over ranks; what is
elementwise splits anywhere. Attention and positions: `_attention_rules.py`.

Source: Shoeybi et al., "Megatron-LM", 2019 (columns, then rows, of each pair of projections);
Korthikanti et al., "Reducing Activation Recomputation", 2022 (norms split by tokens).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor._ops._embedding_ops import _MaskPartial  # type: ignore[attr-defined]

from llmops.distributed import _attention_rules as attention
from llmops.distributed._sharding import SUM, Place, Rule, Ways, register


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
    # row 0 read in its place, which every rank must have. As with torch's own, an id that no rank
    # has then gives zeros, and no error.
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


RULES: dict[str, Rule] = {
    "add_layer_norm": _norm,
    "add_rms_norm": _norm,
    "attention": attention.attention,
    "attention_bwd": attention.attention_bwd,
    "attention_kvcache": attention.attention_kvcache,
    "attention_kvcache_bwd": attention.attention_kvcache_bwd,
    "attention_varlen": attention.attention_varlen,
    "attention_varlen_bwd": attention.attention_varlen_bwd,
    "cross_entropy": _cross_entropy,
    "cross_entropy_bwd": _cross_entropy_bwd,
    "embedding": _embedding,
    "embedding_bwd": _embedding_bwd,
    "geglu": _glu,
    "gelu": _gelu,
    "gelu_bwd": _gelu,
    "glu_bwd": _glu_bwd,
    "glu_bwd_fused": _glu_bwd_fused,
    "kv_cache_append_": attention.kv_cache_append_,
    "layer_norm": _norm,
    "layer_norm_bwd": _layer_norm_bwd,
    "linear": _linear,
    "linear_cross_entropy": _linear_cross_entropy,
    "linear_cross_entropy_bwd": _linear_cross_entropy_bwd,
    "merge_attention": attention.merge_attention,
    "merge_attention_bwd": attention.merge_attention_bwd,
    "rms_norm": _norm,
    "rms_norm_bwd": _rms_norm_bwd,
    "rope": attention.rope,
    "rope_qk": attention.rope_qk,
    "rope_qk_": attention.rope_qk_,
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
