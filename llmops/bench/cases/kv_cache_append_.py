"""kv_cache_append_: a decode step's token, and a prompt's, behind what each sequence holds.

Bytes: k and v read once, written once. torch's side writes by index, which is what unequal lengths
need; where all are equal, by a slice.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import llmops
from llmops.bench.harness import Case, with_backward

# model, lengths, T, H, D
SHAPES = (
    ("SmolLM2", (512, 30, 200, 100), 1, 3, 64),
    ("Llama 3 8B", (4000, 1000, 300, 2500), 1, 8, 128),
    ("Llama 3 8B", (0,), 512, 8, 128),
)
PAGE = 16


def _contiguous(*caches_and_new: Tensor, lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    k_cache, v_cache, k, v, ends = caches_and_new
    tokens = k.shape[2]
    for cache, new in ((k_cache, k), (v_cache, v)):
        if len(lengths) == 1:
            cache[:, :, lengths[0] : lengths[0] + tokens] = new
        else:
            cache[torch.arange(len(ends)), :, ends] = new[:, :, 0]
    return k_cache, v_cache


def _paged(
    k_pages: Tensor, v_pages: Tensor, k: Tensor, v: Tensor, ends: Tensor, table: Tensor
) -> tuple[Tensor, Tensor]:
    row = ends[:, None] + torch.arange(k.shape[2])  # [B, T]
    page = table.gather(1, row // PAGE)
    for pages, new in ((k_pages, k), (v_pages, v)):
        pages[page, :, row % PAGE] = new.transpose(1, 2)
    return k_pages, v_pages


def cases(quick: bool) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        for model, lengths, tokens, heads, dim in SHAPES[:1] if quick else SHAPES:
            batch, width = len(lengths), -(-(max(lengths) + tokens) // PAGE)
            ends = torch.tensor(lengths)
            table = torch.randperm(batch * width).view(batch, width)
            new = [torch.randn(batch, heads, tokens, dim).to(dtype) for _ in range(2)]
            cache = [torch.zeros(batch, heads, width * PAGE, dim, dtype=dtype) for _ in range(2)]
            pages = [torch.zeros(batch * width, heads, PAGE, dim, dtype=dtype) for _ in range(2)]

            def ours_paged(*inputs: Tensor) -> Any:
                return llmops.kv_cache_append_(*inputs[:5], block_table=inputs[5])

            def eager(*inputs: Tensor, lengths: tuple[int, ...] = lengths) -> Any:
                return _contiguous(*inputs, lengths=lengths)

            shape = f"{tokens} to {'+'.join(map(str, lengths))} x{heads}x{dim}"
            for name, ours, theirs, inputs in (
                (shape, llmops.kv_cache_append_, eager, (*cache, *new, ends)),
                (f"{shape} page {PAGE}", ours_paged, _paged, (*pages, *new, ends, table)),
            ):
                yield Case(
                    "kv_cache_append_",
                    "fwd",
                    dtype,
                    name,
                    with_backward("fwd", ours, inputs),
                    with_backward("fwd", theirs, inputs),
                    bytes=4 * new[0].numel() * new[0].element_size(),
                    in_place=True,
                    model=model,
                )
