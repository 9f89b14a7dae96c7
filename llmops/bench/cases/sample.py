"""sample over real vocabularies beside the usual chain of sort, cumsum and multinomial.

Bytes: the logits, read once. Both draw, so their tokens differ: the tests hold ours to the exact
distribution.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import llmops
from llmops.bench.harness import Case

SHAPES = (("SmolLM2", (1, 49152)), ("Llama 3 8B", (8, 128256)), ("Gemma 2B", (1, 256000)))
FILTERS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "plain": {},
    "top_k 50": {"top_k": 50},
    "top_p 0.9": {"top_p": 0.9},
    "all": {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "min_p": 0.05},
}


def _eager(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Tensor:
    """As generation loops write it."""
    if temperature == 0.0:
        return logits.argmax(-1)
    x = logits.float() / temperature
    if top_k:
        x = x.masked_fill(x < x.topk(top_k).values[:, -1:], -math.inf)
    if top_p < 1.0:
        ordered, order = x.sort(-1)
        drop = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
        drop[:, -1] = False
        x = x.masked_fill(torch.zeros_like(drop).scatter(1, order, drop), -math.inf)
    p = x.softmax(-1)
    if min_p:
        p = p.masked_fill(p < min_p * p.amax(-1, keepdim=True), 0.0)
    return torch.multinomial(p, 1)[:, 0]


def cases(quick: bool) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        for model, shape in SHAPES[:1] if quick else SHAPES:
            logits = (torch.randn(shape) * 3).to(dtype)
            for name, filters in FILTERS.items():

                def ours(x: Tensor = logits, filters: dict[str, Any] = filters) -> Tensor:
                    return llmops.sample(x, **filters)

                def eager(x: Tensor = logits, filters: dict[str, Any] = filters) -> Tensor:
                    return _eager(x, **filters)

                yield Case(
                    "sample",
                    "fwd",
                    dtype,
                    f"{name} {shape[0]}x{shape[1]}",
                    ours,
                    eager,
                    bytes=logits.numel() * logits.element_size(),
                    read_only=True,
                    model=model,
                    in_place=name != "greedy",  # a draw is not compared: see above
                )
