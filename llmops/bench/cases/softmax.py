"""softmax: attention scores with a causal mask, and plain rows.

Bytes: x read once, y written once (forward); y and dy read, dx written (backward). The causal form
reads only the part it needs, half of x, and writes all of y.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

import llmops
from llmops.bench.harness import Case, with_backward

ROWS = ((4096, 1024), (2048, 4096), (512, 49152))
SCORES = (("GPT-2", (1, 12, 512, 512)), ("Llama 3 8B", (1, 32, 1024, 1024)))


def _causal_eager(x: Tensor, keep: Tensor) -> Tensor:
    return torch.softmax((x * 0.125).masked_fill(~keep, -math.inf), -1)


def cases(quick: bool) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        for shape in ROWS[:1] if quick else ROWS:
            x = torch.randn(shape).to(dtype).requires_grad_()
            size = x.numel() * x.element_size()
            for passes, factor in (("fwd", 2), ("bwd", 3)):
                yield Case(
                    "softmax",
                    passes,
                    dtype,
                    "x".join(map(str, shape)),
                    with_backward(passes, llmops.softmax, (x,)),
                    with_backward(passes, lambda t: torch.softmax(t, -1), (x,)),
                    bytes=factor * size,
                )
        for model, scores in SCORES[:1] if quick else SCORES:
            x = torch.randn(scores).to(dtype)
            keep = torch.ones(scores[-2:], dtype=torch.bool).tril()
            yield Case(
                "softmax",
                "fwd",
                dtype,
                "causal " + "x".join(map(str, scores)),
                with_backward("fwd", lambda t: llmops.softmax(t, causal=True, scale=0.125), (x,)),
                with_backward("fwd", _causal_eager, (x, keep)),
                bytes=x.numel() * x.element_size() * 3 // 2,
                # Scores rounded to 16 bits before the softmax on torch's side.
                tolerance=None if dtype == torch.float32 else 0.03,
                model=model,
            )
