"""embedding at model shapes: prompts and decode, with learned positions, and the dense gradient.

Bytes: the rows looked up and the result (forward); grad read and all of the weight's gradient
written (backward; with positions, of both weights).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import llmops
from llmops.bench.harness import Case, with_backward

# model, B, T, V, D
SHAPES = (
    ("GPT-2", 4, 512, 50257, 768),
    ("SmolLM2", 1, 512, 49152, 576),
    ("SmolLM2", 1, 1, 49152, 576),
    ("BERT", 8, 512, 30522, 768),
)


def _eager_positions(tokens: Tensor, weight: Tensor, position_weight: Tensor) -> Tensor:
    positions = torch.arange(tokens.shape[-1])
    return F.embedding(tokens, weight) + F.embedding(positions, position_weight)


def _ours_positions(tokens: Tensor, weight: Tensor, position_weight: Tensor) -> Tensor:
    return llmops.embedding(tokens, weight, position_weight=position_weight)


def cases(quick: bool) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        for model, b, t, v, d in SHAPES[:1] if quick else SHAPES:
            tokens = torch.randint(v, (b, t))
            weight = torch.randn(v, d).to(dtype).requires_grad_()
            position_weight = torch.randn(1024, d).to(dtype).requires_grad_()
            name, size = f"{b}x{t} of {v}x{d}", b * t * d * weight.element_size()
            table, positions = (w.numel() * w.element_size() for w in (weight, position_weight))
            forms = (
                ("", llmops.embedding, F.embedding, (tokens, weight), 2 * size, table),
                (
                    "+pos ",
                    _ours_positions,
                    _eager_positions,
                    (tokens, weight, position_weight),
                    3 * size,
                    table + positions,
                ),
            )
            for form, ours, eager, inputs, forward, gradients in forms:
                for passes, bytes in (("fwd", forward), ("bwd", size + gradients)):
                    if passes == "bwd" and b * t == 1:
                        continue  # a decode step has no backward
                    yield Case(
                        "embedding",
                        passes,
                        dtype,
                        form + name,
                        with_backward(passes, ours, inputs),
                        with_backward(passes, eager, inputs),
                        bytes=bytes,
                        model=model,
                    )
