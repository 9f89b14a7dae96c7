"""sample in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llmops.reference._common import _wide


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    uniform = None
    if temperature > 0.0:
        uniform = torch.rand(
            logits.shape[0], generator=generator, device=logits.device, dtype=torch.float64
        )
    return sample_at(logits, uniform, temperature, top_k, top_p, min_p)


def sample_at(
    logits: Tensor,
    uniform: Tensor | None,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
) -> Tensor:
    """The tokens for given uniform numbers [B] in [0, 1)."""
    if uniform is None:
        return logits.argmax(-1)
    probabilities = sample_probabilities(
        logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p
    )
    # Inverse distribution in token order: the first token whose cumulative sum exceeds u.
    cumulative = probabilities.double().cumsum(-1)
    target = uniform[:, None] * cumulative[:, -1:]
    return (cumulative <= target).sum(-1).clamp(max=logits.shape[-1] - 1)


def sample_probabilities(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Tensor:
    """[B, V] fp32: the distribution `sample` draws from; filters apply in the order of arguments,
    top_p and min_p to the distribution renormalized after the filter before. Tokens tied with the
    last one kept are kept."""
    scaled = _wide(logits) / temperature
    if 0 < top_k < scaled.shape[-1]:
        limit = scaled.topk(top_k, -1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < limit, -math.inf)
    if top_p < 1.0:
        p = scaled.softmax(-1)
        ordered = p.sort(-1, descending=True).values
        before = ordered.cumsum(-1) - ordered
        # The least probable token that is kept; the first always is.
        limit = ordered.masked_fill(before >= top_p, math.inf).amin(-1, keepdim=True)
        limit = torch.minimum(limit, ordered[:, :1])
        scaled = scaled.masked_fill(p < limit, -math.inf)
    if min_p > 0.0:
        p = scaled.softmax(-1)
        scaled = scaled.masked_fill(p < min_p * p.amax(-1, keepdim=True), -math.inf)
    return scaled.softmax(-1)
