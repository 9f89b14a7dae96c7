"""gelu in plain PyTorch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from llmops.reference._common import _wide


def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    return F.gelu(_wide(x), approximate=approximate).to(x.dtype)


def _activation(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """act(x) and its derivative, for "silu", "gelu" or "gelu_tanh"."""
    if activation == "silu":
        s = torch.sigmoid(x)
        return x * s, s * (1 + x * (1 - s))
    if activation == "gelu":
        cdf = 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))
        return x * cdf, cdf + x * torch.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))
    root = math.sqrt(2 / math.pi)
    t = torch.tanh(root * (x + 0.044715 * x**3))
    slope = 0.5 * x * (1 - t * t) * root * (1 + 3 * 0.044715 * x * x)
    return 0.5 * x * (1 + t), 0.5 * (1 + t) + slope


def gelu_bwd(grad: Tensor, x: Tensor, approximate: str) -> Tensor:
    _, slope = _activation(_wide(x), "gelu" if approximate == "none" else "gelu_tanh")
    return (_wide(grad) * slope).to(x.dtype)
