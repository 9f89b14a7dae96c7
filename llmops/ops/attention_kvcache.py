"""attention_kvcache: attention of new queries over a contiguous or paged key-value cache."""

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
from llmops.ops.attention import PLAIN, _heads_like, _laid_out, checked_modifiers

_OP = "attention_kvcache"
_is_compiling = torch.compiler.is_compiling


def attention_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    block_table: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the last Tq tokens of each sequence over its keys and values in a cache.

    Sequence b holds the keys of rows cache_leftpad[b] (0 without it) to cache_seqlens[b] of the
    cache; nothing else of the cache is read. cache_seqlens counts all of them, the new tokens' own
    included: append first (`llmops.kv_cache_append_`), then attend with cache_seqlens + Tq. Each
    sequence behaves as in `llmops.attention` with Tk = cache_seqlens[b] - cache_leftpad[b]: causal,
    window and ALiBi are aligned bottom-right, the last query at the last key. So Tq = 1 is a decode
    step (causal or not), and Tq > 1 with causal=True a chunk of a prompt. A sequence without keys
    gives zeros, lse -inf (the sink where there is one).

    Args:
        q: [B, Hq, Tq, D], fp32/bf16/fp16 (fp64 on the reference), any strides. The result is laid
            out as q is.
        k_cache: [B, Hkv, Tmax, D], or paged [blocks, Hkv, page, D]; q's dtype, any strides (a
            last dimension with gaps is copied), any page size; Hq a multiple of Hkv.
        v_cache: the same with Dv.
        cache_seqlens: [B], int64 or int32: where each sequence's keys end, at most Tmax, or page
            times the table's width.
        block_table: [B, width], int64 or int32; makes the cache paged: row r of sequence b is row
            r % page of block block_table[b, r // page]. Entries of rows that are not held are not
            read and may be anything, e.g. -1.
        cache_leftpad: [B], int64 or int32: where each sequence's keys begin, for prompts padded on
            their left.
        causal, scale, window, alibi_slopes, softcap, sinks: as `llmops.attention`.
        return_lse: also return lse.
        backend: "cpu", "triton", "cuda", "reference" or "auto"; None follows use_backend.

    Returns:
        out [B, Hq, Tq, Dv] in q's dtype; with return_lse also lse [B, Hq, Tq], fp32, natural log.
        For inference: gradients are right, but computed in plain PyTorch.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        IndexError: block_table names a block that the cache has not.
        NotImplementedError: a named backend cannot serve the call.
        On a GPU, which is not waited for, lengths, pads and block table are not checked: a sequence
        whose length or pad its cache cannot hold, and a query that sees a key of a block that the
        cache has not, give NaN, out and lse; nothing is read for them.

    Numerics: as `llmops.attention`. Long caches are split among threads and merged by their
    log-sum-exp; the split depends on the lengths, never on the number of threads.

    Source: Dao et al., "Flash-Decoding", 2023; Kwon et al., "PagedAttention", 2023. flash-attn's
    flash_attn_with_kvcache counts the same way when it is given no new k and v.
    """
    plain = window is None and alibi_slopes is None and softcap is None and sinks is None
    raw = None
    if scale is not None:
        _check.scale(_OP, scale)
    if plain and backend is None and not is_tracing():
        raw = _raw(q, k_cache, v_cache, cache_seqlens)
    if raw is not None:
        try:
            if scale is None:
                scale = _scale(q)
            out, lse = raw(
                q, k_cache, v_cache, cache_seqlens, block_table, cache_leftpad, causal, scale
            )
            return (out, lse) if return_lse else out
        except (RuntimeError, ValueError, IndexError):
            pass  # the checks below say what is wrong
    if _autocast.enabled(q):
        q, k_cache, v_cache = _autocast.lowered(q, k_cache, v_cache)
    _check_tensors(q, k_cache, v_cache, cache_seqlens, block_table, cache_leftpad)
    features: tuple[str, ...] = ("causal",) if causal else ()
    if block_table is not None:
        features += ("block_table",)
    modifiers = PLAIN
    if not plain:
        modifiers, extra = checked_modifiers(
            _OP, q, q.shape[0], window, alibi_slopes, softcap, sinks, 0.0, None
        )
        features += extra
    name = resolve(_OP, q.device, q.dtype, features, backend)
    if scale is None:
        scale = _scale(q)
    arguments = (q, k_cache, v_cache, cache_seqlens, block_table, cache_leftpad, causal, scale)
    if name == "reference" and not _is_compiling():
        out, lse = _reference(*arguments, *modifiers[:5])
    else:
        out, lse = _attention_kvcache(*arguments, *modifiers[:5], name)
    return (out, lse) if return_lse else out


def _scale(q: Tensor) -> float:
    dim = q.shape[-1]
    return 1.0 / math.sqrt(dim) if dim else 1.0


def _check_tensors(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Any, table: Any, leftpad: Any
) -> None:
    _sequences.tensors(
        _OP, 4, "[batch or blocks, heads, tokens, head_dim]", q=q, k_cache=k_cache, v_cache=v_cache
    )
    batch, heads, _, dim = q.shape
    if k_cache.shape[3] != dim or (table is None and k_cache.shape[0] != batch):
        raise ValueError(
            f"llmops.{_OP}: k_cache must be [B, Hkv, Tmax, D] with q's B={batch} and D={dim}, or "
            f"[blocks, Hkv, page, D] with a block_table; got shape {tuple(k_cache.shape)}"
        )
    if v_cache.shape[:3] != k_cache.shape[:3]:
        raise ValueError(
            f"llmops.{_OP}: v_cache must have k_cache's first sizes {tuple(k_cache.shape[:3])}; "
            f"got shape {tuple(v_cache.shape)}"
        )
    _sequences.heads(_OP, "k_cache", heads, k_cache.shape[1])
    _sequences.integers(_OP, "cache_seqlens", lengths, (batch,), q)
    if leftpad is not None:
        _sequences.integers(_OP, "cache_leftpad", leftpad, (batch,), q)
    if table is not None:
        _sequences.integers(_OP, "block_table", table, (batch, None), q)
        if k_cache.shape[2] == 0:
            raise ValueError(f"llmops.{_OP}: a page of k_cache must hold at least one key; got 0")


# ---- the operator --------------------------------------------------------------------------------

_raw = shortcut(_OP, ("causal",), autocast=True)


def _reference(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, block_table: Tensor | None,
    cache_leftpad: Tensor | None, causal: bool, scale: float, window_left: int, window_right: int,
    alibi_slopes: Tensor | None, softcap: float, sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _sequences.cached(_OP, k_cache, cache_seqlens, block_table, cache_leftpad)
    out, lse = reference.attention_kvcache(
        q, k_cache, v_cache, cache_seqlens, block_table=block_table, cache_leftpad=cache_leftpad,
        causal=causal, scale=scale, window=(window_left, window_right), alibi_slopes=alibi_slopes,
        softcap=softcap, sinks=sinks, return_lse=True,
    )  # fmt: skip
    return out, lse


def _forward(q: Tensor, k_cache: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *arguments, backend = rest
    if backend != "cpu":
        backend = resolve(_OP, q.device, q.dtype, (), backend)
    if backend == "reference":
        out, lse = _reference(q, k_cache, *arguments)
        return _laid_out(out, q), lse.contiguous()
    return get(backend).attention_kvcache(q, k_cache, *arguments)  # type: ignore[no-any-return]


def _fake(q: Tensor, k_cache: Tensor, v_cache: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    lse_type = torch.float64 if q.dtype == torch.float64 else torch.float32
    return _heads_like(q, v_cache.shape[3]), q.new_empty(q.shape[:3], dtype=lse_type)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.causal, ctx.scale, left, right, slopes, softcap, sinks, ctx.backend = inputs
    ctx.save_for_backward(*tensors, slopes, sinks)
    ctx.window, ctx.softcap = (left, right), softcap
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    *tensors, slopes, sinks = ctx.saved_tensors
    if grad_out is None and grad_lse is None:
        return (None,) * 14
    if ctx.needs_input_grad[10]:
        raise NotImplementedError(
            f"llmops.{_OP}: alibi_slopes takes no gradient on the kernels; detach it, or use "
            'backend="reference"'
        )
    dq, dk, dv, dsinks = _attention_kvcache_bwd(
        grad_out, grad_lse, *tensors, ctx.causal, ctx.scale, *ctx.window, slopes, ctx.softcap,
        sinks, ctx.backend,
    )  # fmt: skip
    dsinks = dsinks if sinks is not None and ctx.needs_input_grad[12] else None
    # The lengths, the table, the pads, causal, scale, the window, alibi_slopes, softcap; backend.
    return dq, dk, dv, *(None,) * 9, dsinks, None


def _reference_bwd(
    grad_out: Tensor | None, grad_lse: Tensor | None, q: Tensor, k_cache: Tensor, v_cache: Tensor,
    cache_seqlens: Tensor, block_table: Tensor | None, cache_leftpad: Tensor | None, *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    lengths = (cache_seqlens, block_table, cache_leftpad)
    _sequences.cached(_OP, k_cache, *lengths)
    return reference.attention_kvcache_bwd(
        grad_out, grad_lse, q, k_cache, v_cache, *lengths, *rest
    )  # fmt: skip


def _forward_bwd(*arguments: Any) -> tuple[Tensor, ...]:
    *given, _backend = arguments
    return tuple(grad.contiguous() for grad in _reference_bwd(*given))


def _fake_bwd(
    grad_out: Tensor | None, grad_lse: Tensor | None, q: Tensor, k_cache: Tensor, v_cache: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    sinks = rest[-2]
    empty = q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
    return *(x.new_empty(x.shape) for x in (q, k_cache, v_cache)), empty


_ARGUMENTS = (
    "Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens, "
    "Tensor? block_table, Tensor? cache_leftpad, bool causal, float scale, int window_left, "
    "int window_right, Tensor? alibi_slopes, float softcap, Tensor? sinks, str backend"
)
# Decoding is not differentiated; where it is, the specification's gradient is right. An operator of
# its own, since the lengths are read as numbers, which no compiler traces.
_attention_kvcache_bwd = Op(
    f"attention_kvcache_bwd(Tensor? grad_out, Tensor? grad_lse, {_ARGUMENTS}) -> "
    "(Tensor dq, Tensor dk, Tensor dv, Tensor dsinks)",
    forward=_forward_bwd,
    fake=_fake_bwd,
    reference=_reference_bwd,
)
_attention_kvcache = Op(
    f"attention_kvcache({_ARGUMENTS}) -> (Tensor out, Tensor lse)",
    forward=_forward,
    fake=_fake,
    setup=_setup,
    backward=_backward,
)
