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


def _merged(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    lse = torch.logaddexp(lse_a, lse_b)
    a, b = ((part - lse).exp()[..., None] for part in (lse_a, lse_b))
    return a * out_a + b * out_b, lse


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
    yield "geglu", lambda: llmops.geglu(x, x), lambda: F.gelu(x) * x
    yield (
        "add_layer_norm",
        lambda: llmops.add_layer_norm(x, x, (64,), w, w),
        lambda: (F.layer_norm(x + x, (64,), w, w), x + x),
    )
    yield (
        "add_rms_norm",
        lambda: llmops.add_rms_norm(x, x, (64,), w, 1e-6),
        lambda: (F.rms_norm(x + x, (64,), w, 1e-6), x + x),
    )
    yield (
        "rope_qk",
        lambda: llmops.rope_qk(q, q, cos, sin),
        lambda: (_rotate(q, *wide), _rotate(q, *wide)),
    )
    yield "linear", lambda: llmops.linear(x, table), lambda: F.linear(x, table)
    target = torch.tensor([3])
    yield (
        "cross_entropy",
        lambda: llmops.cross_entropy(x, target),
        lambda: F.cross_entropy(x, target),
    )
    yield (
        "linear_cross_entropy",
        lambda: llmops.linear_cross_entropy(x, table, target),
        lambda: F.cross_entropy(F.linear(x, table), target),
    )
    lse = torch.zeros(1, 1, 1)
    yield (
        "merge_attention",
        lambda: llmops.merge_attention(q, lse, q, lse),
        lambda: _merged(q, lse, q, lse),
    )
    packed, bounds = torch.randn(1, 1, 64).requires_grad_(), torch.tensor([0, 1])
    yield (
        "attention_varlen",
        lambda: llmops.attention_varlen(packed, packed, packed, bounds, bounds, 1, 1),
        lambda: F.scaled_dot_product_attention(packed, packed, packed),
    )
    yield (
        "scaled_dot_product_attention",
        lambda: llmops.scaled_dot_product_attention(q, q, q),
        lambda: F.scaled_dot_product_attention(q, q, q),
    )
    # Decoding's: nothing there wants a gradient.
    one, new, ends = q.detach(), q.detach().clone(), torch.tensor([1])
    k, v = torch.randn(1, 1, 4, 64), torch.randn(1, 1, 4, 64)
    yield (
        "attention_kvcache",
        lambda: llmops.attention_kvcache(one, k, v, ends),
        lambda: F.scaled_dot_product_attention(one, k[:, :, :1], v[:, :, :1]),
    )
    yield (
        "kv_cache_append_",
        lambda: llmops.kv_cache_append_(k, v, new, new, ends),
        lambda: (k.index_copy_(2, ends, new), v.index_copy_(2, ends, new)),
    )
    logits = x.detach()
    yield (
        "sample",
        lambda: llmops.sample(logits, temperature=0.0),
        lambda: logits.argmax(-1),
    )


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
