"""What the operators over sequences of unequal lengths check."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from torch import Tensor

from llmops.ops import _check


def tensors(op: str, dims: int, shape: str, **given: Tensor) -> None:
    """Floating-point tensors of `dims` dimensions, one dtype and one device."""
    first_name, first = next(iter(given.items()))
    for name, x in given.items():
        _check.floating(op, name, x)
        if x.dim() != dims:
            raise ValueError(f"llmops.{op}: {name} must be {shape}; got shape {tuple(x.shape)}")
        if x.dtype != first.dtype:
            raise TypeError(
                f"llmops.{op}: {name} has dtype {_check.dtype_name(x.dtype)} and {first_name} "
                f"{_check.dtype_name(first.dtype)}; convert one, e.g. {name}.to({first_name}.dtype)"
            )
        if x.device != first.device:
            _check.same_device(op, first_name, first, name, x)


def heads(op: str, k_name: str, heads: int, kv_heads: int) -> None:
    if kv_heads != heads and (kv_heads == 0 or heads % kv_heads != 0):
        raise ValueError(
            f"llmops.{op}: q has {heads} heads, which is no multiple of {k_name}'s {kv_heads}; "
            "repeat or drop key/value heads"
        )


def integers(op: str, name: str, x: Any, shape: tuple[int | None, ...], like: Tensor) -> None:
    """An int64 or int32 tensor of `shape` (None: any size) on like's device."""
    _check.integers(op, name, x)
    if x.dim() != len(shape) or any(
        want is not None and got != want for got, want in zip(x.shape, shape, strict=True)
    ):
        want = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"llmops.{op}: {name} must be [{want}]; got shape {tuple(x.shape)}")
    _check.same_device(op, "q" if op.startswith("attention") else "k", like, name, x)


# What the kernels check by themselves, for the reference.


def bounds(op: str, side: str, cu_seqlens: Tensor, rows: int, longest: int) -> None:
    at = cu_seqlens.tolist()
    name = f"cu_seqlens_{side}"
    if at[0] != 0 or at[-1] != rows:
        raise ValueError(
            f"llmops.{op}: {name} must run from 0 to {rows}, the rows of {side}; got {at[0]} to "
            f"{at[-1]}"
        )
    for b, (begin, end) in enumerate(pairwise(at)):
        if end < begin:
            raise ValueError(
                f"llmops.{op}: {name} must not decrease; got {begin}, {end} at index {b}"
            )
        if end - begin > longest:
            raise ValueError(
                f"llmops.{op}: max_seqlen_{side} is {longest}, but sequence {b} has {end - begin} "
                "rows; pass the largest length"
            )


def capacity(cache: Tensor, block_table: Tensor | None) -> int:
    """Keys that one sequence of the cache can hold."""
    return cache.shape[2] * (1 if block_table is None else block_table.shape[1])


def blocks(op: str, cache: Tensor, block_table: Tensor | None, b: int, begin: int, end: int) -> Any:
    """The block ids that hold rows [begin, end) of sequence b, each a block of the cache."""
    if block_table is None or begin >= end:
        return []
    page, count = cache.shape[2], cache.shape[0]
    ids = block_table[b, begin // page : -(-end // page)].tolist()
    for i, block in enumerate(ids, begin // page):
        if not 0 <= block < count:
            raise IndexError(
                f"llmops.{op}: block_table holds {block}, but the cache has {count} rows"
                + (f" (0 to {count - 1})" if count else "")
                + f", in sequence {b}'s entry {i}"
            )
    return ids


def cached(
    op: str, cache: Tensor, ends: Tensor, block_table: Tensor | None, leftpad: Tensor | None
) -> None:
    most = capacity(cache, block_table)
    begins = [0] * len(ends) if leftpad is None else leftpad.tolist()
    for b, (begin, end) in enumerate(zip(begins, ends.tolist(), strict=True)):
        if not 0 <= end <= most:
            raise ValueError(
                f"llmops.{op}: cache_seqlens holds {end} for sequence {b}, expected 0 to {most}, "
                "what the cache can hold"
            )
        if not 0 <= begin <= end:
            raise ValueError(
                f"llmops.{op}: cache_leftpad holds {begin} for sequence {b}, expected 0 to its "
                f"cache_seqlens of {end}"
            )
        blocks(op, cache, block_table, b, begin, end)


def appended(
    op: str, cache: Tensor, starts: Tensor, block_table: Tensor | None, tokens: int
) -> None:
    most, written = capacity(cache, block_table), set()
    for b, start in enumerate(starts.tolist()):
        if not 0 <= start <= most - tokens:
            raise ValueError(
                f"llmops.{op}: sequence {b} holds {start} keys and {tokens} more do not fit the "
                f"{most} of the cache; allocate it longer, or map more blocks"
            )
        for block in blocks(op, cache, block_table, b, start, start + tokens):
            if block in written:
                raise ValueError(
                    f"llmops.{op}: block_table maps block {block} to two places that would be "
                    "written; give each sequence blocks of its own beyond a shared prefix"
                )
            written.add(block)
