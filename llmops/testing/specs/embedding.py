"""Samples of embedding that reach every branch of its kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import llmops
from llmops import reference
from llmops.testing._core import Make, OpSpec, Sample


def samples(make: Make) -> Iterator[Sample]:
    yield Sample("2x5-of-7x19", (make.ints(2, 5, high=7), make(7, 19)))
    positions = {"position_weight": make(6, 33)}
    yield Sample("positions-3x6", (make.ints(3, 6, high=11), make(11, 33)), positions)
    given = {"positions": make.ints(2, 4, high=9), "position_weight": make(9, 17)}
    yield Sample("given-2x4", (make.ints(2, 4, high=5), make(5, 17)), given)
    yield Sample("padding-3x8", (make.ints(3, 8, high=4), make(4, 70)), {"padding_idx": 2})
    yield Sample("padding-negative", (make.ints(9, high=3), make(3, 16)), {"padding_idx": -1})
    ids32 = make.ints(4, 3, high=5, dtype=torch.int32)
    row = {"positions": make.ints(3, high=8, dtype=torch.int32), "position_weight": make(8, 64)}
    yield Sample("int32-4x3", (ids32, make(5, 64)), row)
    # Many ids of one row, rows of none, and enough work for more than one thread.
    yield Sample("often-40x50", (make.ints(40, 50, high=3), make(900, 65)))
    yield Sample("scalar", (make.ints(high=4), make(4, 5)))
    yield Sample("fixed-weight", (make.ints(3, high=4), make(4, 5, grad=False)))
    yield Sample("empty-0x3", (make.ints(0, 3, high=4), make(4, 5)))
    yield Sample("empty-width-2", (make.ints(2, high=4), make(4, 0)))


def torch_embedding(
    tokens: Tensor,
    weight: Tensor,
    *,
    padding_idx: int | None = None,
    positions: Tensor | None = None,
    position_weight: Tensor | None = None,
) -> Tensor:
    """As models write it; but where rows have no elements torch 2.11's CUDA kernels read out of
    range, which an H100 reported from the next call, whoever made it."""
    if weight.shape[1] == 0:
        return weight.new_empty(*tokens.shape, 0) + weight.sum()
    y = F.embedding(tokens, weight, padding_idx)
    if position_weight is None:
        return y
    if positions is None:
        positions = torch.arange(tokens.shape[-1], device=tokens.device)
    return y + F.embedding(positions, position_weight)


def schemas(make: Make) -> dict[str, tuple[Any, ...]]:
    tokens, positions = make.ints(2, 3, high=5), make.ints(2, 3, high=4)
    return {
        "embedding": (tokens, make(5, 6), positions, make(4, 6), 2, "cpu"),
        "embedding_bwd": (make(2, 3, 6), tokens, 5, 2, "cpu"),
    }


SPEC = OpSpec(
    name="embedding",
    fn=llmops.embedding,
    reference=reference.embedding,
    torch_fn=torch_embedding,
    samples=samples,
    schemas=schemas,
    rows=True,
)
