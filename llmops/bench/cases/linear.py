"""linear at model shapes: one row of x (decode), a few, a prompt, and a prompt's gradients.

Bytes, up to eight rows: W and x read, y written; W is nearly all, so the limit is to read.
Beyond, flops: 2 rows N K, of both gradients twice as many. torch is F.linear.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

import llmops
from llmops.bench.harness import Case, trains_slowly, with_backward

# model, N, K: query projections, the first of an MLP, heads.
WEIGHTS = (
    ("SmolLM2", 576, 576),
    ("BERT, GPT-2", 3072, 768),
    ("Llama 3 8B", 4096, 4096),
    ("Gemma 2 2B", 9216, 2304),
    ("SmolLM2", 49152, 576),
)
ROWS = (1, 4, 8, 32, 128)


def cases(quick: bool) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for model, n, k in WEIGHTS[:1] if quick else WEIGHTS:
            weight = torch.randn(n, k).to(dtype)
            for rows in ROWS[:1] if quick else ROWS:
                x = torch.randn(rows, k).to(dtype)
                moved = (n * k + rows * (n + k)) * x.element_size()
                yield Case(
                    "linear",
                    "fwd",
                    dtype,
                    f"{rows}x{k} to {n}",
                    with_backward("fwd", llmops.linear, (x, weight)),
                    with_backward("fwd", F.linear, (x, weight)),
                    bytes=moved if rows <= 8 else 0,
                    flops=2 * rows * n * k if rows > 8 else 0,
                    read_only=rows <= 8,
                    model=model,
                )
            # Of the vocabulary: linear_cross_entropy. fp16 has few trainers on a CPU.
            if quick or n > 40000 or dtype == torch.float16 or trains_slowly(dtype):
                continue
            leaves = (x.requires_grad_(), weight.requires_grad_())
            yield Case(
                "linear",
                "bwd",
                dtype,
                f"{ROWS[-1]}x{k} to {n}",
                with_backward("bwd", llmops.linear, leaves),
                with_backward("bwd", F.linear, leaves),
                flops=4 * ROWS[-1] * n * k,
                model=model,
            )
