"""embedding at model shapes: prompts and decode, with learned positions, and the dense gradient.

Bytes: the rows looked up and the result (forward); grad read and all of the weight's gradient
written (backward).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import llmops
from llmops.bench.harness import Case, with_backward

# B, T, V, D
SHAPES = ((4, 512, 50257, 768), (1, 512, 49152, 576), (1, 1, 49152, 576))


def _eager_positions(tokens: Tensor, weight: Tensor, position_weight: Tensor) -> Tensor:
    positions = torch.arange(tokens.shape[-1])
    return F.embedding(tokens, weight) + F.embedding(positions, position_weight)


def _ours_positions(tokens: Tensor, weight: Tensor, position_weight: Tensor) -> Tensor:
    return llmops.embedding(tokens, weight, position_weight=position_weight)


def cases(quick: bool) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        for b, t, v, d in SHAPES[:1] if quick else SHAPES:
            tokens = torch.randint(v, (b, t))
            weight = torch.randn(v, d).to(dtype).requires_grad_()
            position_weight = torch.randn(1024, d).to(dtype)
            name, size = f"{b}x{t} of {v}x{d}", b * t * d * weight.element_size()
            yield Case(
                "embedding",
                "fwd",
                dtype,
                name,
                with_backward("fwd", llmops.embedding, (tokens, weight)),
                with_backward("fwd", F.embedding, (tokens, weight)),
                bytes=2 * size,
            )
            yield Case(
                "embedding",
                "fwd",
                dtype,
                f"+pos {name}",
                with_backward("fwd", _ours_positions, (tokens, weight, position_weight)),
                with_backward("fwd", _eager_positions, (tokens, weight, position_weight)),
                bytes=3 * size,
            )
            if b * t == 1:
                continue  # a decode step has no backward
            yield Case(
                "embedding",
                "bwd",
                dtype,
                name,
                with_backward("bwd", llmops.embedding, (tokens, weight)),
                with_backward("bwd", F.embedding, (tokens, weight)),
                bytes=size + v * d * weight.element_size(),
            )
