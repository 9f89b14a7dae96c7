"""swiglu of two tensors and of a fused projection at model shapes, decode included.

Bytes: gate and up read, y written (forward); dy, gate and up read, two gradients written
(backward).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import llmops
from llmops.bench.harness import Case, passes_of, with_backward

SHAPES = ((512, 1536), (128, 1536), (2048, 5632), (1, 1536), (1, 14336))


def _eager(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _eager_fused(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def cases(quick: bool) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        for shape in SHAPES[:1] if quick else SHAPES:
            gate, up = (torch.randn(shape).to(dtype).requires_grad_() for _ in range(2))
            fused = torch.randn(shape[0], 2 * shape[1]).to(dtype).requires_grad_()
            name = "x".join(map(str, shape))
            size = gate.numel() * gate.element_size()
            # torch rounds silu(gate) to 16 bits before the product.
            tolerance = None if dtype == torch.float32 else 0.03
            for passes, factor in passes_of(shape[0], 3, 5):
                yield Case(
                    "swiglu",
                    passes,
                    dtype,
                    name,
                    with_backward(passes, llmops.swiglu, (gate, up)),
                    with_backward(passes, _eager, (gate, up)),
                    bytes=factor * size,
                    tolerance=tolerance,
                )
                yield Case(
                    "swiglu",
                    passes,
                    dtype,
                    "fused " + name,
                    with_backward(passes, llmops.swiglu, (fused,)),
                    with_backward(passes, _eager_fused, (fused,)),
                    bytes=factor * size,
                    tolerance=tolerance,
                )
