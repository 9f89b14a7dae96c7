"""Elementwise kernels' walk over memory: one run of all elements where every tensor is contiguous,
else rows of the last dimension."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from llmops.kernels.triton import _config, _rows
from llmops.kernels.triton._launch import cdiv
from torch import Tensor


@triton.jit
def place(rows, n, blocks, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """This program's rows [ROWS, 1] and columns [1, BLOCK], of `blocks` blocks per row, and which
    of them there are."""
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (program % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    return row, column, (row < rows) & (column < n)


def as_matrices(*tensors: Tensor) -> list[Tensor]:
    """Tensors of one shape as [rows, n] with dense rows, of one row where all are contiguous."""
    if all(t.is_contiguous() for t in tensors):
        return [t.view(1, t.numel()) for t in tensors]
    return [_rows.as_rows(t if t.dim() else t.view(1)) for t in tensors]


def table(rows: int, n: int) -> _config.Config:
    """Rows per program, block and warps, not measured. One run has whole blocks, however short."""
    most = _rows.TILE // 2
    block = most if rows == 1 else _rows.block(n, most)
    many = min(most // block, 16)
    return {"ROWS": many, "BLOCK": block, "num_warps": min(max(many * block // 512, 1), 4)}


def entries(op: str, dtype: torch.dtype) -> Iterator[tuple[_config.Key, _config.Config]]:
    """Of one run, and of rows."""
    yield (_rows.TILE, dtype), table(1, _rows.TILE)
    for n in _rows.lengths(_rows.TILE // 2):
        yield (n, dtype), table(2, n)


def candidates(op: str, key: tuple[int, torch.dtype]) -> Iterator[_config.Config]:
    """What `llmops tune` tries beside the table."""
    for block in sorted({min(key[0], size) for size in (256, 512, 1024, 2048, 4096, 8192)}):
        for config in _rows.tiles(block, most=1024):
            if config["ROWS"] == 1 or block == key[0]:
                yield {**config, "BLOCK": block}


def grid(rows: int, n: int, config: _config.Config) -> tuple[tuple[int], int]:
    """The programs, and how many blocks each row has."""
    blocks = cdiv(n, config["BLOCK"])
    return (cdiv(rows, config["ROWS"]) * blocks,), blocks
