"""Tensors as rows: what the row kernels' launchers have in common."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from llmops.kernels.triton import _config
from torch import Tensor

# A program handles about this many elements: enough loads in flight per thread, no spills.
TILE = 4096
# The longest row held in registers; longer ones are looped over.
LONGEST = 16384
# Shorter ones have blocks of so many elements: fewer forms to compile.
SHORTEST = 16


@triton.jit
def begin_of(row, size_b, size_c, stride_a, stride_b, stride_c):
    """Where the rows `row` of a tensor begin; sizes and strides are those of `broadcast`. The sizes
    are not multiplied: that may be beyond 32 bits."""
    row = row.to(tl.int64)
    outer = row // size_c
    at = outer // size_b * stride_a + outer % size_b * stride_b
    return at + row % size_c * stride_c


def power_of_2(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def block(n: int, most: int = LONGEST) -> int:
    """The least power of two that holds n elements: of SHORTEST to `most`."""
    return min(max(power_of_2(n), SHORTEST), most)


def lengths(longest: int = LONGEST) -> list[int]:
    """The longest row of each `block` up to `longest`, and one of the rows beyond."""
    return [SHORTEST << i for i in range((2 * longest // SHORTEST).bit_length())]


def tile(n: int, per_thread: int = 32) -> _config.Config:
    """Rows of n elements in registers, about TILE elements per program, and the warps (of 32) that
    leave `per_thread` of them to a thread: not measured yet; from ahead-of-time inspection."""
    size = block(n)
    rows = max(1, min(TILE // size, 16))
    warps = min(max(rows * size // (32 * per_thread), 1), 16)
    return {"ROWS": rows, "BLOCK": size, "num_warps": warps}


def tiles(n: int, most: int = 2048) -> Iterator[_config.Config]:
    """Candidates for rows of n elements in registers: 128 to `most` elements to a warp."""
    for rows in (1, 2, 4, 8, 16, 32):
        for warps in (1, 2, 4, 8, 16):
            if 128 * warps <= rows * n <= most * warps:
                yield {"ROWS": rows, "num_warps": warps}


def as_rows(x: Tensor, dims: int = 1) -> Tensor:
    """x as [rows, n], n its last `dims` dimensions together, elements of a row side by side: a view
    where the strides allow it, else a copy."""
    if dims == 1 and x.dim() == 2 and x.stride(1) == 1:
        return x
    n = 1
    for size in x.shape[x.dim() - dims :]:
        n *= size
    rows = x.reshape(x.numel() // n if n else _product(x.shape[: x.dim() - dims]), n)
    return rows if n <= 1 or rows.stride(1) == 1 else rows.contiguous()


def _product(sizes: Any) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


def contiguous_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def broadcast(x: Tensor, shape: torch.Size) -> tuple[Tensor, tuple[int, int, int, int, int]]:
    """How a row kernel finds the elements of x [broadcastable to shape]: a tensor, the sizes of the
    two inner of up to three row dimensions, and the strides of the three and of the last dimension.

    Row r is (a, b, c) with c = r % size_c, b = r // size_c % size_b.
    """
    x = x.expand(shape)
    merged = _merge(x.shape[:-1], x.stride()[:-1])
    if len(merged) > 3:  # of no use to a kernel: as rows of its own
        x = x.contiguous()
        merged = _merge(x.shape[:-1], x.stride()[:-1])
    (_, stride_a), (b, stride_b), (c, stride_c) = [(1, 0)] * (3 - len(merged)) + merged
    last = x.stride(-1) if shape[-1] > 1 else 1
    return x, (b, c, stride_a, stride_b, stride_c), last  # type: ignore[return-value]


def _merge(sizes: Any, strides: Any) -> list[tuple[int, int]]:
    """Dimensions (size, stride), neighbours that one stride serves merged, those of size 1 gone."""
    found: list[tuple[int, int]] = []
    for size, stride in zip(sizes, strides, strict=True):
        if size == 1:
            continue
        if found and found[-1][1] == size * stride:
            found[-1] = (found[-1][0] * size, stride)
        else:
            found.append((size, stride))
    return found
