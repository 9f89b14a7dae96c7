"""swiglu, and geglu by tanh, of two tensors and of a fused projection at model shapes, decode too.

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

# op, model, shape
SHAPES = (
    ("swiglu", "SmolLM2", (512, 1536)),
    ("geglu", "Gemma 2 2B", (128, 9216)),
    ("swiglu", "SmolLM2", (128, 1536)),
    ("swiglu", "TinyLlama 1.1B", (2048, 5632)),
    ("swiglu", "SmolLM2", (1, 1536)),
    ("swiglu", "Llama 3 8B", (1, 14336)),
    ("geglu", "Gemma 2 2B", (1, 9216)),
)


def _halves(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    return (gate, up) if up is not None else gate.chunk(2, -1)  # type: ignore[return-value]


def _eager_swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    gate, up = _halves(gate, up)
    return F.silu(gate) * up


def _eager_geglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    gate, up = _halves(gate, up)
    return F.gelu(gate, approximate="tanh") * up


def _geglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    return llmops.geglu(gate, up, approximate="tanh")


PAIRS = {"swiglu": (llmops.swiglu, _eager_swiglu), "geglu": (_geglu, _eager_geglu)}


def cases(quick: bool) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        for op, model, shape in SHAPES[:2] if quick else SHAPES:
            gate, up = (torch.randn(shape).to(dtype).requires_grad_() for _ in range(2))
            fused = torch.randn(shape[0], 2 * shape[1]).to(dtype).requires_grad_()
            name = "x".join(map(str, shape))
            ours, eager = PAIRS[op]
            for passes, factor in passes_of(shape[0], 3, 5):
                for form, inputs in (("", (gate, up)), ("fused ", (fused,))):
                    yield Case(
                        op,
                        passes,
                        dtype,
                        form + name,
                        with_backward(passes, ours, inputs),
                        with_backward(passes, eager, inputs),
                        bytes=factor * gate.numel() * gate.element_size(),
                        # torch rounds the activation to 16 bits before the product.
                        tolerance=None if dtype == torch.float32 else 0.03,
                        model=model,
                    )
