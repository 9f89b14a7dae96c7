"""kv_cache_append_: new keys and values into a contiguous or paged cache, in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmops import backends, reference
from llmops.dispatch import learn_sharding, resolve
from llmops.ops import _sequences
from llmops.ops._op import LIBRARY, is_tracing, refuse_transforms, shortcut

_OP = "kv_cache_append_"
_is_compiling = torch.compiler.is_compiling
_dispatch_modes = torch._C._len_torch_dispatch_stack


def kv_cache_append_(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    cache_seqlens: Tensor,
    *,
    block_table: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Writes the keys and values of T new tokens behind those that each sequence holds, in place.

    Token t of sequence b becomes row cache_seqlens[b] + t of its cache. cache_seqlens itself stays
    as it is: one step appends to the caches of all layers. Then attend with cache_seqlens + T.

    Args:
        k_cache, v_cache: [B, Hkv, Tmax, D] and [B, Hkv, Tmax, Dv], or paged [blocks, Hkv, page, D]
            and [blocks, Hkv, page, Dv]; fp32/bf16/fp16, any strides that hold no element twice.
            Both are overwritten.
        k, v: [B, Hkv, T, D] and [B, Hkv, T, Dv], the caches' dtype, any strides.
        cache_seqlens: [B], int64 or int32: the rows that each sequence holds already.
        block_table: [B, width], int64 or int32: row r of sequence b is row r % page of block
            block_table[b, r // page]. No two sequences may write to one block.
        backend: "cpu", "triton", "cuda", "reference" or "auto"; None follows use_backend.

    Returns:
        (k_cache, v_cache).

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came; also where the
            tokens do not fit Tmax or the block table.
        IndexError: block_table names a block that the cache has not.
        RuntimeError: a tensor requires a gradient while gradients are recorded.
        NotImplementedError: a named backend cannot serve the call.
        After any error the caches are as they were.
        On a GPU, which is not waited for, lengths and block table are not checked: the tokens of a
        sequence that do not fit Tmax or the block table, and those whose block the cache has not,
        are not written, and two sequences that name one block overwrite each other.
    """
    raw = None
    if backend is None and not is_tracing():
        raw = _raw(k, v, k_cache, v_cache, cache_seqlens)
    if raw is not None:
        try:
            if block_table is None:  # a None left out is an argument less to convert
                raw(k_cache, v_cache, k, v, cache_seqlens)
            else:
                raw(k_cache, v_cache, k, v, cache_seqlens, block_table)
        except (RuntimeError, ValueError, IndexError):
            pass  # nothing was written, and the checks below say what is wrong
        else:
            _written(k_cache, v_cache)
            return k_cache, v_cache
    _check_tensors(k_cache, v_cache, k, v, cache_seqlens, block_table)
    _refuse_gradients(k_cache, v_cache, k, v)
    features = ("block_table",) if block_table is not None else ()
    name = resolve(_OP, k.device, k.dtype, features, backend)
    arguments = (k_cache, v_cache, k, v, cache_seqlens, block_table, name)
    if _is_compiling() or _dispatch_modes() or any(type(x) is not Tensor for x in arguments[:4]):
        learn_sharding()
        torch.ops.llmops.kv_cache_append_(*arguments)
    else:
        _forward(*arguments)
    return k_cache, v_cache


def _refuse_gradients(*given: Tensor) -> None:
    refuse_transforms(_OP, "call it outside, on the whole batch", *given)
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        raise RuntimeError(
            f"llmops.{_OP}: a tensor requires a gradient, which writing to a cache does not "
            "record; use torch.no_grad() around it, or detach it"
        )


def _check_tensors(
    k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, lengths: Any, table: Any
) -> None:
    shape = "[batch or blocks, heads, tokens, head_dim]"
    _sequences.tensors(_OP, 4, shape, k_cache=k_cache, v_cache=v_cache, k=k, v=v)
    batch, heads, tokens, dim = k.shape
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"llmops.{_OP}: v must have k's first sizes ({batch}, {heads}, {tokens}); got shape "
            f"{tuple(v.shape)}"
        )
    for name, cache, width in (("k_cache", k_cache, dim), ("v_cache", v_cache, v.shape[3])):
        if (
            cache.shape[1] != heads
            or cache.shape[3] != width
            or (table is None and cache.shape[0] != batch)
        ):
            raise ValueError(
                f"llmops.{_OP}: {name} must be [{batch}, {heads}, Tmax, {width}] for k and v, or "
                f"[blocks, {heads}, page, {width}] with a block_table; got shape "
                f"{tuple(cache.shape)}"
            )
        if any(n > 1 and s == 0 for n, s in zip(cache.shape, cache.stride(), strict=True)):
            raise ValueError(
                f"llmops.{_OP}: {name} holds an element twice, as an expanded tensor does; its "
                f"strides are {cache.stride()}; allocate it, e.g. {name}.contiguous()"
            )
    if v_cache.shape[0] != k_cache.shape[0] or v_cache.shape[2] != k_cache.shape[2]:
        raise ValueError(
            f"llmops.{_OP}: v_cache must have k_cache's first sizes {tuple(k_cache.shape[:3])}; "
            f"got shape {tuple(v_cache.shape)}"
        )
    _sequences.integers(_OP, "cache_seqlens", lengths, (batch,), k)
    if table is not None:
        _sequences.integers(_OP, "block_table", table, (batch, None), k)
        if k_cache.shape[2] == 0:
            raise ValueError(f"llmops.{_OP}: a page of k_cache must hold at least one key; got 0")


# ---- the operator --------------------------------------------------------------------------------

_raw = shortcut(_OP)


def _forward(
    k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, cache_seqlens: Tensor,
    block_table: Tensor | None, backend: str,
) -> None:  # fmt: skip
    _refuse_gradients(k_cache, v_cache, k, v)
    if backend != "cpu":
        backend = resolve(_OP, k.device, k.dtype, (), backend)
    if backend == "reference":
        _sequences.appended(_OP, k_cache, cache_seqlens, block_table, k.shape[2])
        reference.kv_cache_append_(k_cache, v_cache, k, v, cache_seqlens, block_table=block_table)
        return
    backends.get(backend).kv_cache_append_(k_cache, v_cache, k, v, cache_seqlens, block_table)
    _written(k_cache, v_cache)


def _written(k_cache: Tensor, v_cache: Tensor) -> None:
    """Tells autograd that earlier operations which saved a cache must not use it any more."""
    if not torch.is_inference_mode_enabled():
        torch.autograd.graph.increment_version(
            [t for t in (k_cache, v_cache) if not t.is_inference()]
        )


# In place: no autograd, so no Op. It mutates, and says so in its schema.
LIBRARY.define(
    "kv_cache_append_(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, "
    "Tensor cache_seqlens, Tensor? block_table, str backend) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.impl(_OP, _forward, "CompositeExplicitAutograd")
torch.library.register_fake(f"llmops::{_OP}", lambda *args: None, lib=LIBRARY)
