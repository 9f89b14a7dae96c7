"""merge_attention: two parts of a split decode, and two blocks of a prefill (ring attention).

Bytes: both outputs and their log-sum-exps read, one of each written (forward); the four inputs and
two gradients read, four gradients written (backward).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import llmops
from llmops.bench.harness import Case, passes_of, with_backward

# model, [B, H, T, D]
SHAPES = (("Llama 3 8B", (1, 32, 512, 128)), ("Llama 3 8B", (8, 32, 1, 128)))


def _eager(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    lse = torch.logaddexp(lse_a, lse_b)
    a, b = ((part - lse).exp()[..., None].to(out_a.dtype) for part in (lse_a, lse_b))
    return a * out_a + b * out_b, lse


def cases(quick: bool) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        for model, shape in SHAPES[:1] if quick else SHAPES:
            outs = [torch.randn(shape).to(dtype).requires_grad_() for _ in range(2)]
            lses = [torch.randn(shape[:-1]).requires_grad_() for _ in range(2)]
            inputs = (outs[0], lses[0], outs[1], lses[1])
            size = sum(x.numel() * x.element_size() for x in inputs) // 2
            for passes, factor in passes_of(shape[0] * shape[2], 3, 5):
                yield Case(
                    "merge_attention",
                    passes,
                    dtype,
                    "x".join(map(str, shape)),
                    with_backward(passes, llmops.merge_attention, inputs),
                    with_backward(passes, _eager, inputs),
                    bytes=factor * size,
                    # torch rounds the weights to 16 bits, and a log-sum-exp's gradient is a sum of
                    # D products of 16-bit values.
                    tolerance=1e-4 if dtype == torch.float32 else 0.1,
                    model=model,
                )
