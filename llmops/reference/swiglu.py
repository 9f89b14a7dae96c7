"""swiglu in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llmops.reference._common import _wide
from llmops.reference.gelu import _activation


def _gate_up(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    if up is not None:
        return gate, up
    first, second = gate.chunk(2, -1)
    return first, second


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    g, u = _gate_up(gate, up)
    return (F.silu(_wide(g)) * _wide(u)).to(gate.dtype)


def geglu(gate: Tensor, up: Tensor | None = None, *, approximate: str = "none") -> Tensor:
    g, u = _gate_up(gate, up)
    return (F.gelu(_wide(g), approximate=approximate) * _wide(u)).to(gate.dtype)


def glu_bwd(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """dgate and dup of act(gate) * up."""
    value, slope = _activation(_wide(gate), activation)
    return (_wide(grad) * _wide(up) * slope).to(gate.dtype), (_wide(grad) * value).to(up.dtype)


def glu_bwd_fused(grad: Tensor, x: Tensor, activation: str) -> Tensor:
    gate, up = x.chunk(2, -1)
    return torch.cat(glu_bwd(grad, gate, up, activation), -1)
