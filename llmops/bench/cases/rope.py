"""rope, rope_qk and rope_qk_ at model shapes, decode included, beside rotate_half.

Bytes: q and k (rope: q alone) read once, written once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import llmops
from llmops.bench.harness import Case, passes_of, with_backward

# model, B, Hq, Hk, T, D
SHAPES = (
    ("SmolLM2", 1, 9, 3, 512, 64),
    ("Llama 3 8B", 1, 32, 8, 512, 128),
    ("Llama 3 8B", 1, 32, 8, 4096, 128),
    ("SmolLM2", 4, 9, 3, 1024, 64),
    ("Gemma 2 2B", 1, 8, 4, 512, 256),
    ("Llama 3 8B", 1, 32, 8, 1, 128),
)
ON_GPU = (("Llama 3 8B", 8, 32, 8, 4096, 128),)  # beyond its cache


def _rotate_half(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


def _eager_one(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + _rotate_half(x) * sin


def _eager(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return q * cos + _rotate_half(q) * sin, k * cos + _rotate_half(k) * sin


def cases(quick: bool) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        gpu = torch.get_default_device().type == "cuda"
        for model, b, hq, hk, t, d in SHAPES[:1] if quick else SHAPES + ON_GPU * gpu:
            # As a projection leaves them: [B, T, H, D] in memory.
            q, k = (torch.randn(b, t, h, d).to(dtype).transpose(1, 2) for h in (hq, hk))
            cos, sin = llmops.rope_tables(t, d)
            wide = [torch.cat((x, x), -1).to(dtype) for x in (cos, sin)]
            name = f"{b}x{hq}+{hk}x{t}x{d}"
            size = 2 * (q.numel() + k.numel()) * q.element_size()
            tolerance = None if dtype == torch.float32 else 0.03
            for passes, _ in passes_of(b * t, 1, 1):
                leaves = q.detach().requires_grad_(), k.detach().requires_grad_()
                yield Case(
                    "rope_qk",
                    passes,
                    dtype,
                    name,
                    with_backward(passes, llmops.rope_qk, (*leaves, cos, sin)),
                    with_backward(passes, _eager, (*leaves, *wide)),
                    bytes=size,
                    # The tables are rounded to 16 bits on torch's side.
                    tolerance=tolerance,
                    model=model,
                )
                yield Case(
                    "rope",
                    passes,
                    dtype,
                    f"{b}x{hq}x{t}x{d}",
                    with_backward(passes, llmops.rope, (leaves[0], cos, sin)),
                    with_backward(passes, _eager_one, (leaves[0], *wide)),
                    bytes=2 * q.numel() * q.element_size(),
                    tolerance=tolerance,
                    model=model,
                )
            yield Case(
                "rope_qk_",
                "fwd",
                dtype,
                name,
                with_backward("fwd", llmops.rope_qk_, (q, k, cos, sin)),
                with_backward("fwd", _eager, (q, k, *wide)),
                bytes=size,
                in_place=True,
                model=model,
            )
