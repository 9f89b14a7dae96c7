"""Attention on flash-attention's grid, to be read beside its tables: head dim 64 and 128, causal or
not, 512 to 16k tokens, batch x tokens constant.

There, and here on a GPU, the model is 2048 wide (32 or 16 heads) and batch x tokens 16k, 16-bit;
for a CPU it is 128 wide (2 heads of 64, 1 of 128) with batch x tokens 2k, more where one sequence
is longer. Each sequence and head is computed by itself, so that the rate is the same, and the rest
only takes longer: that grid once is 90 TFLOP, and measured (two providers, seven calls each) six
hours at the 56 GFLOP/s of one core. Operations as there: 4 B H T^2 D, halved if causal; backward
2.5 times that.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import llmops
from llmops.bench.harness import Case, with_backward

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
WIDTH, TOKENS = {"cpu": 128, "cuda": 2048}, {"cpu": 2048, "cuda": 16384}
BACKWARD_UP_TO = 4096  # tokens on a CPU: beyond, one backward of torch's takes many seconds


def _ours(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    out = llmops.attention(q, k, v, causal=causal)
    assert isinstance(out, Tensor)
    return out


def _torch(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def cases(quick: bool) -> Iterator[Case]:
    gpu = torch.get_default_device().type == "cuda"
    for t in LENGTHS[:1] if quick else LENGTHS:
        for dtype in (torch.bfloat16,) if gpu else (torch.float32, torch.bfloat16):
            for d in (128,) if quick else (64, 128):
                for causal in (True,) if quick else (True, False):
                    yield from _point(t, dtype, d, causal)


def _point(t: int, dtype: torch.dtype, d: int, causal: bool) -> Iterator[Case]:
    device = "cuda" if torch.get_default_device().type == "cuda" else "cpu"
    b, h = max(TOKENS[device] // t, 1), WIDTH[device] // d
    q, k, v = (torch.randn(b, h, t, d).to(dtype).requires_grad_() for _ in range(3))
    # As of decode in cases/attention.py: results of T equal keys shrink by sqrt(T), the rounding of
    # what is summed up does not. Rounding to 16 bits is relative to the result.
    tolerance = max(20.0, t**0.5 / 2) * torch.finfo(dtype).eps if dtype == torch.float32 else None
    for passes, factor in (("fwd", 1.0), ("bwd", 2.5)):
        if passes == "bwd" and t > BACKWARD_UP_TO and device == "cpu":
            continue
        kind = "causal" if causal else "full"
        yield Case(
            "attention",
            passes,
            dtype,
            f"{kind} grid {b}x{h}x{t}x{d}",
            with_backward(passes, _ours, (q, k, v, causal)),
            with_backward(passes, _torch, (q, k, v, causal)),
            bytes=int(factor * 4 * q.numel() * q.element_size()),
            flops=int(factor * 4 * b * h * t * t * d) // (2 if causal else 1),
            tolerance=tolerance,
            curve=(f"attention {passes} {kind} D{d} over T", t),
        )
