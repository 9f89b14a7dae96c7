"""flash_attn_with_kvcache: one call rotates, appends to a cache and attends. The package's
docstring has the arguments that all functions share."""

from __future__ import annotations

import torch
from torch import Tensor

from llmops.integrations.flash_attn import _arguments
from llmops.integrations.flash_attn._arguments import Window
from llmops.integrations.flash_attn.rotary import turn
from llmops.ops import _check, _sequences
from llmops.ops.attention_kvcache import attention_kvcache
from llmops.ops.kv_cache_append_ import kv_cache_append_

OP = "flash_attn_with_kvcache"


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of q over a cache, to which k and v are appended first, in place.

    Sequence b attends to its Tk = cache_seqlens[b] - cache_leftpad[b] + T_new tokens; causal,
    window and ALiBi align its last query with its last key.

    Args:
        q: [B, Tq, Hq, D], fp32/bf16/fp16.
        k_cache, v_cache: [C, N, Hkv, D] with C >= B, or with block_table pages [P, page, Hkv, D] of
            any size. Last dimension without gaps.
        k, v: [B, T_new, Hkv, D], written to the cache behind cache_seqlens; both or none.
        rotary_cos, rotary_sin: [N, R/2], of any float dtype, with k and v only. k is rotated at
            positions cache_seqlens, cache_seqlens + 1, ...; so is q with causal or a window, and
            without either all of q is rotated at cache_seqlens.
        cache_seqlens: tokens in the cache before the call, left padding included: an int for all,
            or [B], int32 or int64. None is a full cache, which takes no k and v.
        cache_batch_idx: [B], int32 or int64: sequence b's row of the cache; b when None. Distinct
            where k and v are given (upstream lets either win). Not with block_table.
        cache_leftpad: [B], int32 or int64: tokens at the start that are no keys.
        block_table: [B, pages], int32 or int64: the pages of each sequence, in order. Pages beyond
            its length are never read.
        rotary_interleaved: pairs of neighbours (GPT-J), not halves (GPT-NeoX).
        num_splits: how upstream's scheduler divides the keys, 0 to 128 (0 chooses). Here the
            division follows from the shape, so that every value gives the same bits.
        return_softmax_lse: return (out, softmax_lse).
        Others: as in the package's docstring.

    Returns:
        out [B, Tq, Hq, D]; with return_softmax_lse also softmax_lse [B, Hq, Tq], fp32.

    Raises:
        TypeError, ValueError, IndexError: naming the argument.
        RuntimeError: an input requires a gradient; as upstream, this has no backward.
    """
    mods = _arguments.modifiers(OP, softmax_scale, causal, window_size, softcap, alibi_slopes)
    _check_tensors(q, k_cache, v_cache, k, v, block_table)
    if not 0 <= num_splits <= 128:
        raise ValueError(f"llmops.{OP}: num_splits must be in [0, 128]; got {num_splits}")
    k_cache, v_cache, table = _rows(q, k_cache, v_cache, cache_batch_idx, block_table)
    if k is not None and cache_batch_idx is not None and len(cache_batch_idx.unique()) < len(q):
        raise ValueError(
            f"llmops.{OP}: cache_batch_idx must name each row once where k and v are written; got "
            f"{cache_batch_idx.tolist()}"
        )
    capacity = k_cache.shape[1] * (1 if table is None else table.shape[1])
    lengths = _lengths(cache_seqlens, k, capacity, q)
    if rotary_cos is not None or rotary_sin is not None:
        if rotary_cos is None or rotary_sin is None or k is None:
            raise ValueError(
                f"llmops.{OP}: rotary_cos and rotary_sin must be given together, and with k and v"
            )
        ordered = causal or mods["window"] is not None
        q = _rotate(q, rotary_cos, rotary_sin, lengths, rotary_interleaved, ordered)
        k = _rotate(k, rotary_cos, rotary_sin, lengths, rotary_interleaved, True)
    q, k_cache, v_cache = (x.transpose(1, 2) for x in (q, k_cache, v_cache))
    if k is not None and v is not None:
        kv_cache_append_(
            k_cache, v_cache, k.transpose(1, 2), v.transpose(1, 2), lengths, block_table=table
        )
        lengths = lengths + k.shape[1]
    out, lse = attention_kvcache(
        q, k_cache, v_cache, lengths, block_table=table, cache_leftpad=cache_leftpad, **mods,
        return_lse=True,
    )  # fmt: skip
    out = out.transpose(1, 2)
    return (out, lse) if return_softmax_lse else out


def _check_tensors(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    block_table: Tensor | None,
) -> None:
    paged = "[P, page, Hkv, D] with block_table"
    _arguments.heads(OP, "[B, Tq, Hq, D]", q=q)
    _arguments.heads(
        OP, "[C, N, Hkv, D]" if block_table is None else paged, k_cache=k_cache, v_cache=v_cache
    )
    _arguments.same_keys(OP, q, k_cache, v_cache, "q k_cache v_cache")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.shape[-1] > 1 and cache.stride(-1) != 1:
            raise ValueError(f"llmops.{OP}: {name} must have stride 1 in its last dimension")
    if (k is None) != (v is None):
        raise ValueError(f"llmops.{OP}: k and v must be given together")
    tensors = {"q": q, "k_cache": k_cache, "v_cache": v_cache}
    if k is not None and v is not None:
        tensors |= {"k": k, "v": v}
        _arguments.heads(OP, "[B, T_new, Hkv, D]", k=k, v=v)
        _arguments.same_keys(OP, q, k, v)
        for name, x, cache in (("k", k, k_cache), ("v", v, v_cache)):
            if x.shape[0] != q.shape[0] or x.shape[2:] != cache.shape[2:]:
                raise ValueError(
                    f"llmops.{OP}: {name} must be [B, T_new, Hkv, D] with q's B {q.shape[0]} and "
                    f"{name}_cache's (Hkv, D) {tuple(cache.shape[2:])}; got shape {tuple(x.shape)}"
                )
    for name, x in tensors.items():
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"llmops.{OP}: {name} requires a gradient, and there is no backward; call it "
                "under torch.no_grad()"
            )


def _rows(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, index: Tensor | None, block_table: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The caches and their block table. Rows picked by cache_batch_idx are pages of the whole
    length, one to a sequence."""
    batch = q.shape[0]
    if index is not None:
        if block_table is not None:
            raise ValueError(f"llmops.{OP}: cache_batch_idx cannot be combined with block_table")
        _sequences.integers(OP, "cache_batch_idx", index, (batch,), q)
        _check.within(OP, "cache_batch_idx", index, len(k_cache), "the cache has")
        return k_cache, v_cache, index[:, None]
    if block_table is not None:
        _sequences.integers(OP, "block_table", block_table, (batch, None), q)
        return k_cache, v_cache, block_table
    if len(k_cache) < batch:
        raise ValueError(
            f"llmops.{OP}: k_cache has {len(k_cache)} rows, q {batch} sequences; where sequences "
            "share rows pass cache_batch_idx"
        )
    return k_cache[:batch], v_cache[:batch], None


def _lengths(
    cache_seqlens: int | Tensor | None, k: Tensor | None, capacity: int, q: Tensor
) -> Tensor:
    if isinstance(cache_seqlens, Tensor):
        _sequences.integers(OP, "cache_seqlens", cache_seqlens, (len(q),), q)
        return cache_seqlens
    if cache_seqlens is None:
        if k is not None:
            raise ValueError(f"llmops.{OP}: cache_seqlens must be given with k and v")
        cache_seqlens = capacity
    if not isinstance(cache_seqlens, (int, torch.SymInt)):
        _check.fail_type(OP, "cache_seqlens", "an int or an integer Tensor", cache_seqlens)
    return torch.full((len(q),), cache_seqlens, dtype=torch.int32, device=q.device)


def _rotate(
    x: Tensor, cos: Tensor, sin: Tensor, starts: Tensor, interleaved: bool, ordered: bool
) -> Tensor:
    """x [B, T, H, D] turned at starts, starts + 1, ...; all at starts unless `ordered`."""
    steps = torch.arange(x.shape[1], device=x.device) if ordered else starts.new_zeros(x.shape[1])
    return turn(x, cos, sin, starts[:, None] + steps, interleaved)
