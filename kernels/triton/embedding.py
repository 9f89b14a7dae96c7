"""Token embedding, with learned positions or without, and its gradient.

    y[i] = weight[tokens[i]] (+ position_weight[positions[i]])
    dweight[v] = sum of dy[i] over the i with ids[i] = v; zero for padding_idx

Forward: a tile of a few tokens and a block of columns per program; 2 accesses per element (3 with
positions). Backward: the ids are sorted once, stably, so that the places of a table row lie
together, in order; a program then adds them for a few rows and a block of columns, several places
at a time, in fp32, rounded once. No atomics: the same bits each run. An id outside its table, which
a GPU cannot report, reads nothing and gives a row of NaN; the backward drops it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from llmops.kernels.triton import _config, _rows
from llmops.kernels.triton._launch import cdiv, launch
from torch import Tensor


@triton.jit
def _row_of(table, id, column, inside, rows, table_row, table_column):
    """Rows id [TOKENS, 1] of a table at the columns, in its dtype; NaN where it has no such row."""
    known = inside & (id >= 0) & (id < rows)
    at = table + id * table_row + column * table_column
    return tl.load(at, mask=known, other=float("nan"))


@triton.jit
def embedding_fwd_kernel(
    tokens, weight, positions, position_weight, y, count, length, dim, rows, position_rows,
    w_row, w_column, p_row, p_column, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """positions is None: place i of `length`. position_weight is None: tokens alone."""
    blocks = tl.cdiv(dim, BLOCK)
    program = tl.program_id(0).to(tl.int64)
    i = (program // blocks * TOKENS + tl.arange(0, TOKENS))[:, None]
    column = (program % blocks * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside = (i < count) & (column < dim)
    id = tl.load(tokens + i, mask=i < count, other=0).to(tl.int64)
    value = _row_of(weight, id, column, inside, rows, w_row, w_column)
    if position_weight is not None:
        id = i % length
        if positions is not None:
            id = tl.load(positions + i, mask=i < count, other=0).to(tl.int64)
        added = _row_of(position_weight, id, column, inside, position_rows, p_row, p_column)
        value = (value.to(tl.float32) + added.to(tl.float32)).to(y.dtype.element_ty)
    tl.store(y + i * dim + column, value, mask=inside)


@triton.jit
def embedding_bwd_kernel(
    dy, order, first, dweight, rows, dim, padding_idx, dy_row, dy_column,
    ROWS: tl.constexpr, PLACES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """order[first[v] .. first[v + 1]) are the places of row v in dy [*, dim], ascending."""
    blocks = tl.cdiv(dim, BLOCK)
    program = tl.program_id(0).to(tl.int64)
    v = program // blocks * ROWS + tl.arange(0, ROWS)
    column = program % blocks * BLOCK + tl.arange(0, BLOCK)
    begin = tl.load(first + v, mask=v < rows, other=0)
    count = tl.load(first + v + 1, mask=v < rows, other=0) - begin
    count = tl.where(v == padding_idx, 0, count)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    within = tl.arange(0, PLACES)[None, :]
    inside = (column < dim)[None, None, :]
    for done in range(0, tl.max(count, 0), PLACES):
        left = done + within < count[:, None]
        i = tl.load(order + begin[:, None] + done + within, mask=left, other=0)
        at = dy + i[:, :, None] * dy_row + column[None, None, :] * dy_column
        g = tl.load(at, mask=left[:, :, None] & inside, other=0.0).to(tl.float32)
        total += tl.sum(g, 1)
    keep = (v < rows)[:, None] & (column < dim)[None, :]
    at = dweight + v[:, None] * dim + column[None, :]
    tl.store(at, total.to(dweight.dtype.element_ty), mask=keep)


# ---- launchers -----------------------------------------------------------------------------------

# Elements of a program, and places that one step of the backward adds.
TILE = 2048
PLACES = 8


def _table(dim: int) -> _config.Config:
    """Not measured yet; from ahead-of-time inspection."""
    block = _rows.block(dim, TILE)
    return {"TOKENS": min(TILE // block, 64), "BLOCK": block, "num_warps": 4}


def _table_bwd(dim: int) -> _config.Config:
    block = _rows.block(dim, TILE // 4)
    rows = min(2 * TILE // (PLACES * block) or 1, 64)
    return {"ROWS": rows, "PLACES": PLACES, "BLOCK": block, "num_warps": 4}


def entries(op: str, dtype: torch.dtype) -> Iterator[tuple[_config.Key, _config.Config]]:
    for dim in _rows.lengths(TILE if op == "embedding" else TILE // 4):
        yield (dim, dtype), (_table if op == "embedding" else _table_bwd)(dim)


def candidates(op: str, key: tuple[int, torch.dtype]) -> Iterator[_config.Config]:
    """What `llmops tune` tries beside the table."""
    for block in sorted({min(key[0], size) for size in (256, 512, 1024, 2048)}):
        for config in _rows.tiles(block, most=1024):
            rows = config.pop("ROWS")
            if op == "embedding":
                yield {**config, "TOKENS": rows, "BLOCK": block}
            elif rows <= 8 and block <= 1024:
                yield {**config, "ROWS": rows, "PLACES": PLACES, "BLOCK": block}


def embedding(
    tokens: Tensor,
    weight: Tensor,
    positions: Tensor | None = None,
    position_weight: Tensor | None = None,
) -> Tensor:
    """tokens of any shape, weight [V, D]; positions of tokens' shape, None with a position_weight
    [P, D]: 0 to T - 1 along tokens' last dimension. Returns [*tokens.shape, D], contiguous."""
    dim = weight.shape[1]
    y = torch.empty((*tokens.shape, dim), dtype=weight.dtype, device=weight.device)
    if y.numel() == 0:
        return y
    count, length = tokens.numel(), tokens.shape[-1] if tokens.dim() else 1
    # A view of one dimension may still have gaps.
    ids = tokens.reshape(-1).contiguous()
    places = None if positions is None else positions.reshape(-1).contiguous()
    position_rows, position_strides = 0, (0, 0)
    if position_weight is not None:
        position_rows = position_weight.shape[0]
        position_strides = (position_weight.stride(0), position_weight.stride(1))
    config = _config.choose("embedding", (_rows.power_of_2(dim), weight.dtype), _table(dim))
    grid = (cdiv(count, config["TOKENS"]) * cdiv(dim, config["BLOCK"]),)
    launch(
        embedding_fwd_kernel, grid, ids, weight, places, position_weight, y,
        count, length, dim, weight.shape[0], position_rows, *weight.stride(), *position_strides,
        **config,
    )  # fmt: skip
    return y


def embedding_bwd(grad: Tensor, ids: Tensor, rows: int, padding_idx: int) -> Tensor:
    """grad [..., D], ids of its leading shape; returns [rows, D], contiguous."""
    dim = grad.shape[-1]
    dweight = torch.empty((rows, dim), dtype=grad.dtype, device=grad.device)
    if dweight.numel() == 0:
        return dweight
    if ids.numel() == 0:
        return dweight.zero_()
    dy = grad.reshape(-1, dim)
    sorted_ids, order = torch.sort(ids.reshape(-1), stable=True)
    every = torch.arange(rows + 1, dtype=ids.dtype, device=ids.device)
    first = torch.searchsorted(sorted_ids, every)
    config = _config.choose("embedding_bwd", (_rows.power_of_2(dim), grad.dtype), _table_bwd(dim))
    grid = (cdiv(rows, config["ROWS"]) * cdiv(dim, config["BLOCK"]),)
    arguments = (dy, order, first, dweight, rows, dim, padding_idx, *dy.stride())
    launch(embedding_bwd_kernel, grid, *arguments, **config)
    return dweight
