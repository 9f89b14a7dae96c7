"""linear_cross_entropy at the last layers of GPT-2, SmolLM2, Llama 3 (1B) and Gemma (2B).

Flops: the logits' matrix product, 2 N D V (forward); with the two of the gradients 6 N D V
(fwd+bwd). PyTorch's side holds all logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import llmops
from llmops.bench.harness import Case, trains_slowly, with_backward

# model, rows, width, vocabulary
SHAPES = (
    ("GPT-2", 512, 768, 50257),
    ("SmolLM2", 512, 576, 49152),
    ("Llama 3.2 1B", 128, 2048, 128256),
    ("Gemma 2 2B", 32, 2304, 256000),
)


def _eager(input: Tensor, linear_weight: Tensor, target: Tensor) -> Any:
    return F.cross_entropy(F.linear(input, linear_weight), target)


def cases(quick: bool) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        for model, rows, width, classes in SHAPES[1:2] if quick else SHAPES:
            x = torch.randn(rows, width).to(dtype).requires_grad_()
            weight = torch.randn(classes, width).mul_(width**-0.5).to(dtype).requires_grad_()
            inputs = (x, weight, torch.randint(classes, (rows,)))
            for passes, factor in (("fwd", 2), ("fwd+bwd", 6)):
                if passes != "fwd" and trains_slowly(dtype):
                    continue
                yield Case(
                    "linear_cross_entropy",
                    passes,
                    dtype,
                    f"{rows}x{width} of {classes}",
                    with_backward(passes, llmops.linear_cross_entropy, inputs),
                    with_backward(passes, _eager, inputs),
                    flops=factor * rows * width * classes,
                    # As cross_entropy's; and 16-bit logits' gradients are rounded on both sides.
                    tolerance=40 * torch.finfo(dtype).eps + classes / 16 * 2**-23,
                    model=model,
                )
