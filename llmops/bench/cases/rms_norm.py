"""rms_norm and add_rms_norm at model shapes, decode included.

Bytes: x read, y written (forward); dy and x read, dx written (backward). The add form reads x and
the residual and writes y and h; its backward reads dy, h and dh and writes the one gradient. Gemma
multiplies by 1 + weight (weight_offset), which PyTorch has to add first.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import llmops
from llmops.bench.harness import Case, passes_of, with_backward

SHAPES = (
    ("SmolLM2", (512, 576)),
    ("Llama 3.2 1B", (4, 512, 2048)),
    ("Llama 3 8B", (2048, 4096)),
    ("Gemma 2B", (512, 2048)),
    ("Gemma 2 2B", (512, 2304)),
    ("SmolLM2", (1, 1, 576)),
    ("Llama 3 8B", (8, 1, 4096)),
    ("Gemma 2 2B", (1, 1, 2304)),
)
Shape = tuple[int]


def _weight(weight: Tensor, offset: float) -> Tensor:
    return weight + offset if offset else weight


def _ours(x: Tensor, shape: Shape, weight: Tensor, offset: float) -> Tensor:
    return llmops.rms_norm(x, shape, weight, 1e-6, weight_offset=offset)


def _eager(x: Tensor, shape: Shape, weight: Tensor, offset: float) -> Tensor:
    return F.rms_norm(x, shape, _weight(weight, offset), 1e-6)


def _ours_add(
    x: Tensor, residual: Tensor, shape: Shape, weight: Tensor, offset: float
) -> tuple[Tensor, Tensor]:
    return llmops.add_rms_norm(x, residual, shape, weight, 1e-6, weight_offset=offset)


def _eager_add(
    x: Tensor, residual: Tensor, shape: Shape, weight: Tensor, offset: float
) -> tuple[Tensor, Tensor]:
    h = x + residual
    return F.rms_norm(h, shape, _weight(weight, offset), 1e-6), h


def cases(quick: bool) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        for model, shape in SHAPES[:1] if quick else SHAPES:
            n, name = shape[-1], "x".join(map(str, shape))
            offset = 1.0 if model.startswith("Gemma") else 0.0
            x, residual = (torch.randn(shape).to(dtype).requires_grad_() for _ in range(2))
            weight = torch.randn(n).to(dtype).requires_grad_()
            rest, rows = ((n,), weight, offset), x.numel() // n
            for op, ours, eager, inputs, factors in (
                ("rms_norm", _ours, _eager, (x, *rest), (2, 3)),
                ("add_rms_norm", _ours_add, _eager_add, (x, residual, *rest), (4, 4)),
            ):
                for passes, factor in passes_of(rows, *factors):
                    yield Case(
                        op,
                        passes,
                        dtype,
                        name + (", 1 + weight" if offset else ""),
                        with_backward(passes, ours, inputs),
                        with_backward(passes, eager, inputs),
                        bytes=factor * x.numel() * x.element_size(),
                        # A weight's gradient is rounded to its dtype on both sides, from sums of
                        # other order.
                        tolerance=1e-3 if dtype == torch.float32 else 0.2,
                        model=model,
                    )
