"""cross_entropy at the vocabularies of GPT-2, SmolLM2, Llama 3 and Gemma.

Bytes: the logits read once (forward); read once and the gradient written once (backward); fwd+bwd
is their sum. Targets and per-row numbers do not count.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

import llmops
from llmops.bench.harness import Case, with_backward

# model, rows, vocabulary
SHAPES = (
    ("GPT-2", 1024, 50257),
    ("SmolLM2", 512, 49152),
    ("Llama 3 8B", 256, 128256),
    ("Gemma 2B", 32, 256000),
)
FACTORS = {"fwd": 1, "bwd": 2, "fwd+bwd": 3}


def cases(quick: bool) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        for model, rows, classes in SHAPES[1:2] if quick else SHAPES:
            x = torch.randn(rows, classes).mul_(3).to(dtype).requires_grad_()
            target = torch.randint(classes, (rows,))
            # PyTorch adds a row's exponentials in fp32, V/8 after one another in each lane (ours
            # per run of 4096, then in fp64), so that its own error grows with V.
            drift = classes / 8 * torch.finfo(torch.float32).eps / 2
            for passes, factor in FACTORS.items():
                yield Case(
                    "cross_entropy",
                    passes,
                    dtype,
                    f"{rows}x{classes}",
                    with_backward(passes, llmops.cross_entropy, (x, target)),
                    with_backward(passes, F.cross_entropy, (x, target)),
                    bytes=factor * x.numel() * x.element_size(),
                    tolerance=20 * torch.finfo(dtype).eps + drift,
                    model=model,
                )
