"""attention_varlen: attention of packed sequences of unequal lengths, forward and backward."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from llmops import reference
from llmops.backends import get
from llmops.dispatch import resolve
from llmops.ops import _autocast, _check, _sequences
from llmops.ops._op import Op, is_tracing, shortcut
from llmops.ops.attention import MODIFIERS, Modifiers, checked_modifiers

_OP = "attention_varlen"
_is_compiling = torch.compiler.is_compiling


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    generator: torch.Generator | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`llmops.attention` of each of B sequences that lie one after the other, without padding.

    Sequence b's queries are rows cu_seqlens_q[b] to cu_seqlens_q[b + 1] of q, its keys and values
    rows cu_seqlens_k[b] to cu_seqlens_k[b + 1] of k and v; no query sees another sequence. With
    Tq and Tk of its own sequence, each behaves as in `llmops.attention`: causal, window and ALiBi
    are aligned bottom-right per sequence (the last query is at the last key). Either length may
    be 0: queries without keys give zeros, lse -inf (the sink where there is one).

    Args:
        q: [total_q, Hq, D], fp32/bf16/fp16 (fp64 on the reference), any strides.
        k: [total_k, Hkv, D], q's dtype; Hq a multiple of Hkv.
        v: [total_k, Hkv, Dv].
        cu_seqlens_q, cu_seqlens_k: [B + 1], int64 or int32: from 0 to total_q and to total_k, not
            decreasing.
        max_seqlen_q, max_seqlen_k: at least the largest length. (The CPU kernels need no bound;
            one that is too small is an error all the same.) Triton kernels read no lengths back to
            check them: they stay within the tensors, and rows past these bounds are left undefined.
        causal, scale, window, softcap, sinks, dropout_p, generator: as `llmops.attention`.
            Dropout counts sequences as batch items, and tokens within them.
        alibi_slopes: [Hq] or [B, Hq], as `llmops.attention`.
        return_lse: also return lse.
        backend: "cpu", "triton", "cuda", "reference" or "auto"; None follows use_backend.

    Returns:
        out [total_q, Hq, Dv] in q's dtype; with return_lse also lse [Hq, total_q], fp32, natural
        log, differentiable: the heads come first, as in flash-attention.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        NotImplementedError: a named backend cannot serve the call.

    Numerics: as `llmops.attention`. How a sequence's keys are split among threads depends on the
    lengths of all, never on the number of threads.

    Source: Dao, "FlashAttention-2", 2023 (flash_attn_varlen_func).
    """
    modified = (
        window is not None
        or alibi_slopes is not None
        or softcap is not None
        or sinks is not None
        or dropout_p != 0.0
    )
    if scale is not None:
        _check.scale(_OP, scale)
    if backend is None and not modified and not is_tracing():
        raw = _attention_varlen_raw(q, k, v)
        if raw is not None:
            lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
            try:
                own = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
                out, lse = raw(q, k, v, *lengths, causal, own)
                return (out, lse) if return_lse else out
            except (RuntimeError, ValueError, IndexError, ZeroDivisionError):
                pass  # the checks below say what is wrong
    if _autocast.enabled(q):
        q, k, v = _autocast.lowered(q, k, v)
    _check_tensors(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    features: tuple[str, ...] = ("causal",) if causal else ()
    batch = cu_seqlens_q.shape[0] - 1
    modifiers, extra = checked_modifiers(
        _OP, q, batch, window, alibi_slopes, softcap, sinks, dropout_p, generator
    )
    name = resolve(_OP, q.device, q.dtype, features + extra, backend)
    if scale is None:
        dim = q.shape[2]
        scale = 1.0 / math.sqrt(dim) if dim else 1.0
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    if name == "reference" and not _is_compiling():
        _check_values(q, k, *lengths)
        return reference.attention_varlen(
            q, k, v, *lengths, causal=causal, scale=scale, return_lse=return_lse,
            **modifiers.of_reference(),
        )  # fmt: skip
    out, lse = _attention_varlen(q, k, v, *lengths, causal, scale, *modifiers, name)
    return (out, lse) if return_lse else out


def _check_tensors(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Any, cu_k: Any, max_q: Any, max_k: Any
) -> None:
    _sequences.tensors(_OP, 3, "[total, heads, head_dim]", q=q, k=k, v=v)
    if k.shape[2] != q.shape[2]:
        raise ValueError(
            f"llmops.{_OP}: k must be [total_k, Hkv, D] with q's D={q.shape[2]}; got shape "
            f"{tuple(k.shape)}"
        )
    if v.shape[:2] != k.shape[:2]:
        raise ValueError(
            f"llmops.{_OP}: v must be [total_k, Hkv, Dv] with k's {tuple(k.shape[:2])}; got shape "
            f"{tuple(v.shape)}"
        )
    _sequences.heads(_OP, "k", q.shape[1], k.shape[1])
    _sequences.integers(_OP, "cu_seqlens_q", cu_q, (None,), q)
    if cu_q.shape[0] == 0:
        raise ValueError(f"llmops.{_OP}: cu_seqlens_q must be [B + 1], beginning with 0; got [0]")
    _sequences.integers(_OP, "cu_seqlens_k", cu_k, (cu_q.shape[0],), q)
    for name, longest in (("max_seqlen_q", max_q), ("max_seqlen_k", max_k)):
        if not isinstance(longest, (int, torch.SymInt)) or longest < 0:
            raise ValueError(f"llmops.{_OP}: {name} must be an int >= 0; got {longest!r}")


def _check_values(q: Tensor, k: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> None:
    _sequences.bounds(_OP, "q", cu_q, q.shape[0], max_q)
    _sequences.bounds(_OP, "k", cu_k, k.shape[0], max_k)


# ---- the operators -------------------------------------------------------------------------------

_attention_varlen_raw = shortcut(_OP, autocast=True)


def _packed_like(like: Tensor, dim: int) -> Tensor:
    """Empty [total, H, dim], laid out as `like` is: usually as it reads, heads first where they lie
    further apart than tokens."""
    total, heads, _ = like.shape
    if like.stride(1) < like.stride(0):
        return like.new_empty(total, heads, dim)
    return like.new_empty(heads, total, dim).transpose(0, 1)


def _laid_out(x: Tensor, like: Tensor) -> Tensor:
    return _packed_like(like, x.shape[2]).copy_(x)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int,
    causal: bool, scale: float, *rest: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    modifiers, backend = Modifiers(*rest[:-1]), rest[-1]
    if backend != "cpu":
        backend = resolve(_OP, q.device, q.dtype, (), backend)
    if backend == "reference":
        _check_values(q, k, cu_q, cu_k, max_q, max_k)
        out, lse = reference.attention_varlen(
            q, k, v, cu_q, cu_k, max_q, max_k, causal=causal, scale=scale, return_lse=True,
            **modifiers.of_reference(),
        )  # fmt: skip
        return _laid_out(out, q), lse.contiguous()
    return get(backend).attention_varlen(
        q, k, v, cu_q, cu_k, max_q, max_k, causal, scale, *modifiers
    )


def _fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    lse_type = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=lse_type)
    return _packed_like(q, v.shape[2]), lse


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_q, cu_k, max_q, max_k, causal, scale, *modifiers, ctx.backend = inputs
    named = Modifiers(*modifiers)
    tensors = (named.alibi_slopes, named.sinks, named.seed)
    ctx.save_for_backward(q, k, v, *output, cu_q, cu_k, *tensors)
    ctx.modifiers = named._replace(alibi_slopes=None, sinks=None, seed=None)
    ctx.constants = (max_q, max_k, causal, scale)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse, cu_q, cu_k, alibi_slopes, sinks, seed = ctx.saved_tensors
    if grad_out is None and grad_lse is None:
        return (None,) * 17
    if ctx.needs_input_grad[11]:
        raise NotImplementedError(
            f"llmops.{_OP}: alibi_slopes takes no gradient on the kernels; detach it, or use "
            'backend="reference"'
        )
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    modifiers = ctx.modifiers._replace(alibi_slopes=alibi_slopes, sinks=sinks, seed=seed)
    dq, dk, dv, dsinks = _attention_varlen_bwd(
        grad_out, grad_lse, q, k, v, out, lse, cu_q, cu_k, *ctx.constants, *modifiers, ctx.backend
    )
    dsinks = dsinks if sinks is not None and ctx.needs_input_grad[13] else None
    # The lengths, causal, scale, the window, alibi_slopes, softcap; dropout_p, seed, backend.
    return dq, dk, dv, *(None,) * 10, dsinks, *(None,) * 3


def _reference_bwd(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor,
    lse: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool, scale: float,
    *modifiers: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    return reference.attention_varlen_bwd(
        grad_out, grad_lse, q, k, v, out, lse, cu_q, cu_k, causal, scale, *modifiers
    )


def _forward_bwd(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor,
    lse: Tensor, *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    *constants, backend = rest
    if backend != "cpu":
        backend = resolve("attention_varlen_bwd", q.device, q.dtype, (), backend)
    arguments = (grad_out, grad_lse, q, k, v, out, lse, *constants)
    if backend == "reference":
        dq, dk, dv, dsinks = _reference_bwd(*arguments)
        dq, dk, dv = _laid_out(dq, q), _laid_out(dk, k), _laid_out(dv, v)
    else:
        dq, dk, dv, dsinks = get(backend).attention_varlen_bwd(*arguments)
    return dq, dk, dv, lse.new_empty(0) if dsinks is None else dsinks


def _fake_bwd(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor,
    lse: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool, scale: float,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    sinks = Modifiers(*rest[:-1]).sinks
    return (
        _packed_like(q, q.shape[2]),
        _packed_like(k, k.shape[2]),
        _packed_like(v, v.shape[2]),
        lse.new_empty((0,) if sinks is None else sinks.shape),
    )


_LENGTHS = (
    "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, "
    "bool causal, float scale"
)
_attention_varlen_bwd = Op(
    "attention_varlen_bwd(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, "
    f"Tensor out, Tensor lse, {_LENGTHS}, {MODIFIERS}, str backend) -> "
    "(Tensor dq, Tensor dk, Tensor dv, Tensor dsinks)",
    forward=_forward_bwd,
    fake=_fake_bwd,
    reference=_reference_bwd,
)
_attention_varlen = Op(
    f"attention_varlen(Tensor q, Tensor k, Tensor v, {_LENGTHS}, {MODIFIERS}, str backend) -> "
    "(Tensor out, Tensor lse)",
    forward=_forward,
    fake=_fake,
    setup=_setup,
    backward=_backward,
)
