"""flash_attn_func and its packed forms, on llmops.attention. The package's docstring has the
arguments that all of them share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmops import reference
from llmops.integrations.flash_attn import _arguments
from llmops.integrations.flash_attn._arguments import Window
from llmops.ops.attention import attention

Result = Tensor | tuple[Tensor, Tensor, Tensor]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """Attention of q [B, Tq, Hq, D] over k and v [B, Tk, Hkv, D].

    Arguments and results as in the package's docstring.

    Returns:
        out [B, Tq, Hq, D]; with return_attn_probs (out, softmax_lse, S_dmask).
    """
    op = "flash_attn_func"
    mods = _arguments.modifiers(op, softmax_scale, causal, window_size, softcap, alibi_slopes)
    return _dense(op, (q, k, v), dropout_p, mods, return_attn_probs)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """flash_attn_func of q [B, Tq, Hq, D] with keys and values in one tensor.

    kv is [B, Tk, 2, Hkv, D]; its gradient is one tensor, too. Arguments and results as in the
    package's docstring.
    """
    op = "flash_attn_kvpacked_func"
    mods = _arguments.modifiers(op, softmax_scale, causal, window_size, softcap, alibi_slopes)
    _arguments.packed(op, "kv", kv, "[B, Tk, 2, Hkv, D]", 2)
    return _dense(op, (q, *kv.unbind(2)), dropout_p, mods, return_attn_probs)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """flash_attn_func of a fused projection, qkv [B, T, 3, H, D]; its gradient is one tensor.

    Arguments and results as in the package's docstring.
    """
    op = "flash_attn_qkvpacked_func"
    mods = _arguments.modifiers(op, softmax_scale, causal, window_size, softcap, alibi_slopes)
    _arguments.packed(op, "qkv", qkv, "[B, T, 3, H, D]", 3)
    return _dense(op, qkv.unbind(2), dropout_p, mods, return_attn_probs)


def _dense(
    op: str,
    qkv: tuple[Tensor, ...],
    dropout_p: float,
    mods: dict[str, Any],
    return_attn_probs: bool,
) -> Result:
    q, k, v = qkv
    _arguments.heads(op, "[B, T, H, D]", q=q, k=k, v=v)
    _arguments.same_keys(op, q, k, v)
    if q.shape[0] != k.shape[0]:
        raise ValueError(
            f"llmops.{op}: q and k must have one batch size; got {q.shape[0]} and {k.shape[0]}"
        )
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    before = dropout_state(q.device, dropout_p) if return_attn_probs else None
    out, lse = attention(q, k, v, dropout_p=dropout_p, **mods, return_lse=True)
    out = out.transpose(1, 2)
    if not return_attn_probs:
        return out
    if before is None:
        return out, lse, out.new_empty(0)
    return out, lse, signed_by_dropout(probabilities(q, k, mods), dropout_p, before)


# ---- S_dmask, for tests: holds all scores --------------------------------------------------------


def dropout_state(device: torch.device, dropout_p: float) -> torch.Generator | None:
    """The default generator as it is before a call with dropout."""
    if dropout_p == 0.0:
        return None
    if device.type == "cpu":
        return torch.default_generator.clone_state()
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.cuda.default_generators[index].clone_state()


@torch.no_grad()
def probabilities(q: Tensor, k: Tensor, mods: dict[str, Any]) -> Tensor:
    """The weights [B, H, Tq, Tk]: attention's result where key j has the value e_j."""
    unit = torch.eye(k.shape[2], dtype=q.dtype, device=q.device).expand(*k.shape[:2], -1, -1)
    weights = attention(q, k, unit, **mods, backend="reference")
    assert isinstance(weights, Tensor)
    return weights


def signed_by_dropout(weights: Tensor, dropout_p: float, before: torch.Generator) -> Tensor:
    """`weights`, negative where the call that started from the state `before` dropped them."""
    seed = reference.dropout_seed(weights.device, before)
    kept = reference.dropout_weights(weights.shape, dropout_p, seed) > 0
    return torch.where(kept, weights, -weights)
