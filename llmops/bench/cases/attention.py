"""attention: causal prefill, its backward, and decode, beside torch's own kernel.

Operations: 4 B H Tq Tk D, halved if causal; the backward 2.5 times that. Bytes of decode: K and V
read once; of prefill: q, k, v read, out written, and the backward those again and their gradients.
torch's side is its scaled_dot_product_attention, whose kernel the row names (flash or math on CPU).
BERT's is bidirectional.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import llmops
from llmops.bench.harness import Case, with_backward

# model, B, Hq, Hkv, T, D; causal but for BERT
PREFILL = (
    ("SmolLM2", 1, 9, 3, 512, 64),
    ("GPT-2", 1, 12, 12, 1024, 64),
    ("Llama 3 8B", 1, 32, 8, 512, 128),
    ("Llama 2 7B, 4 heads", 1, 4, 4, 2048, 128),
    ("Gemma 2 2B", 1, 8, 4, 512, 256),
    ("BERT", 1, 12, 12, 512, 64),
)
# model, B, Hq, Hkv, Tk, D
DECODE = (
    ("Llama 3 8B", 1, 32, 8, 4096, 128),
    ("SmolLM2", 1, 9, 3, 512, 64),
    ("GPT-2", 1, 12, 12, 1024, 64),
    ("Llama 2 7B", 1, 32, 32, 4096, 128),
    ("Gemma 2 2B", 1, 8, 4, 4096, 256),
)


def _ours(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    out = llmops.attention(q, k, v, causal=causal)
    assert isinstance(out, Tensor)
    return out


def _torch(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    return F.scaled_dot_product_attention(
        q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
    )


def cases(quick: bool) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        for model, b, h, hkv, t, d in PREFILL[:1] if quick else PREFILL:
            shapes = ((b, h, t, d), (b, hkv, t, d), (b, hkv, t, d))
            q, k, v = (torch.randn(s).to(dtype).requires_grad_() for s in shapes)
            causal = model != "BERT"
            kind, share = ("causal", 2) if causal else ("full", 1)
            for passes, factor in (("fwd", 1.0), ("bwd", 2.5)):
                yield Case(
                    "attention",
                    passes,
                    dtype,
                    f"{kind} {b}x{h}/{hkv}x{t}x{d}",
                    with_backward(passes, _ours, (q, k, v, causal)),
                    with_backward(passes, _torch, (q, k, v, causal)),
                    bytes=int(factor * 2 * b * (h + hkv) * t * d * q.element_size()),
                    flops=int(factor * 4 * b * h * t * t * d) // share,
                    model=model,
                )
        for model, b, h, hkv, t, d in DECODE[:1] if quick else DECODE:
            q = torch.randn(b, h, 1, d).to(dtype)
            k, v = (torch.randn(b, hkv, t, d).to(dtype) for _ in range(2))
            # An average of t values is sqrt(t) smaller than what is added up and rounded, here 0.1
            # of 0.8: in fp32 each side is off by two eps of that, 16 of the result.
            eps = torch.finfo(dtype).eps
            yield Case(
                "attention",
                "fwd",
                dtype,
                f"decode {b}x{h}/{hkv}x{t}x{d}",
                with_backward("fwd", _ours, (q, k, v, False)),
                with_backward("fwd", _torch, (q, k, v, False)),
                bytes=2 * k.numel() * k.element_size(),
                flops=4 * b * h * t * d,
                tolerance=max(20.0, t**0.5 / 2) * eps,
                read_only=True,
                model=model,
            )
