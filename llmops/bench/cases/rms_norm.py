"""rms_norm and add_rms_norm at model shapes, decode included.

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

SHAPES = ((512, 768), (4, 512, 2048), (2048, 4096), (1, 1, 576), (8, 1, 4096))


def _eager_add(
    x: Tensor, residual: Tensor, shape: tuple[int], weight: Tensor
) -> tuple[Tensor, Tensor]:
    h = x + residual
    return F.rms_norm(h, shape, weight, 1e-6), h


def cases(quick: bool) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        for shape in SHAPES[:1] if quick else SHAPES:
            n, name = shape[-1], "x".join(map(str, shape))
            x, residual = (torch.randn(shape).to(dtype).requires_grad_() for _ in range(2))
            weight = torch.randn(n).to(dtype).requires_grad_()
            size = x.numel() * x.element_size()
            # A weight's gradient is rounded to its dtype on both sides, from sums of other order.
            tolerance = 1e-3 if dtype == torch.float32 else 0.2
            for passes, factor in passes_of(x.numel() // n, 2, 3):
                yield Case(
                    "rms_norm",
                    passes,
                    dtype,
                    name,
                    with_backward(
                        passes, lambda t, w: llmops.rms_norm(t, t.shape[-1:], w, 1e-6), (x, weight)
                    ),
                    with_backward(
                        passes, lambda t, w: F.rms_norm(t, t.shape[-1:], w, 1e-6), (x, weight)
                    ),
                    bytes=factor * size,
                    tolerance=tolerance,
                )
            for passes, factor in passes_of(x.numel() // n, 4, 4):
                inputs = (x, residual, (n,), weight)
                yield Case(
                    "add_rms_norm",
                    passes,
                    dtype,
                    name,
                    with_backward(
                        passes,
                        lambda t, r, shape, w: llmops.add_rms_norm(t, r, shape, w, 1e-6),
                        inputs,
                    ),
                    with_backward(passes, _eager_add, inputs),
                    bytes=factor * size,
                    tolerance=tolerance,
                )
