"""What one call costs: tiny inputs, in inference mode, under no_grad, and with a gradient wanted
(which records the graph and is dropped). fp32; nothing to compute, so neither bytes nor flops.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import llmops
from llmops.bench.harness import Case

MODES: dict[str, Callable[[], Any]] = {
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "grad": contextlib.nullcontext,
}
Function = Callable[..., Any]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


def _ops() -> Iterator[tuple[str, Function, Function]]:
    """Name, our call, torch's; both of one positional-free closure over the same inputs."""
    x, w = torch.randn(1, 64).requires_grad_(), torch.ones(64).requires_grad_()
    q = torch.randn(1, 1, 1, 64).requires_grad_()
    cos, sin = llmops.rope_tables(1, 64)
    wide = [torch.cat((t, t), -1) for t in (cos, sin)]
    tokens, table = torch.tensor([[3]]), torch.randn(8, 64).requires_grad_()
    yield "softmax", lambda: llmops.softmax(x), lambda: torch.softmax(x, -1)
    yield "gelu", lambda: llmops.gelu(x), lambda: F.gelu(x)
    yield "swiglu", lambda: llmops.swiglu(x, x), lambda: F.silu(x) * x
    yield (
        "layer_norm",
        lambda: llmops.layer_norm(x, (64,), w, w),
        lambda: F.layer_norm(x, (64,), w, w),
    )
    yield (
        "rms_norm",
        lambda: llmops.rms_norm(x, (64,), w, 1e-6),
        lambda: F.rms_norm(x, (64,), w, 1e-6),
    )
    yield (
        "attention",
        lambda: llmops.attention(q, q, q),
        lambda: F.scaled_dot_product_attention(q, q, q),
    )
    yield "rope", lambda: llmops.rope(q, cos, sin), lambda: _rotate(q, *wide)
    yield "embedding", lambda: llmops.embedding(tokens, table), lambda: F.embedding(tokens, table)


def cases(quick: bool) -> Iterator[Case]:
    for op, ours, eager in _ops():
        for mode, setting in MODES.items():
            yield Case(
                "overhead",
                mode,
                torch.float32,
                op,
                ours,
                eager,
                tolerance=1e-4,
                setting=setting,
            )
