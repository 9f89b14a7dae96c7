"""layer_norm and add_layer_norm at model shapes, decode included.

Bytes: x read, y written (forward); dy and x read, dx written (backward). The add form reads x and
the residual and writes y and h; its backward reads dy, h and dh and writes the one gradient.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import llmops
from llmops.bench.harness import Case, passes_of, with_backward

SHAPES = (
    ("BERT, GPT-2", (512, 768)),
    ("GPT-3 1.3B", (4, 512, 2048)),
    ("GPT-3 6.7B", (2048, 4096)),
    ("GPT-2", (1, 1, 768)),
    ("GPT-3 6.7B", (8, 1, 4096)),
)


def _eager(x: Tensor, shape: tuple[int], weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, shape, weight, bias)


def _eager_add(
    x: Tensor, residual: Tensor, shape: tuple[int], weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    h = x + residual
    return F.layer_norm(h, shape, weight, bias), h


def cases(quick: bool) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        for model, shape in SHAPES[:1] if quick else SHAPES:
            n, name = shape[-1], "x".join(map(str, shape))
            x, residual = (torch.randn(shape).to(dtype).requires_grad_() for _ in range(2))
            weight, bias = (torch.randn(n).to(dtype).requires_grad_() for _ in range(2))
            size = x.numel() * x.element_size()
            # The parameters' gradients are rounded to their dtype on both sides, from sums of
            # other order (on torch's side in 16 bits).
            tolerance = 1e-3 if dtype == torch.float32 else 0.2
            for passes, factor in passes_of(x.numel() // n, 2, 3):
                inputs = (x, (n,), weight, bias)
                yield Case(
                    "layer_norm",
                    passes,
                    dtype,
                    name,
                    with_backward(passes, llmops.layer_norm, inputs),
                    with_backward(passes, _eager, inputs),
                    bytes=factor * size,
                    tolerance=tolerance,
                    model=model,
                )
            for passes, factor in passes_of(x.numel() // n, 4, 4):
                both = (x, residual, (n,), weight, bias)
                yield Case(
                    "add_layer_norm",
                    passes,
                    dtype,
                    name,
                    with_backward(passes, llmops.add_layer_norm, both),
                    with_backward(passes, _eager_add, both),
                    bytes=factor * size,
                    tolerance=tolerance,
                    model=model,
                )
