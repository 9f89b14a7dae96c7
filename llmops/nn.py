"""Modules over the operators, drop-in for torch.nn's: same constructor, same state dict."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import llmops


class LayerNorm(torch.nn.LayerNorm):
    """torch.nn.LayerNorm on `llmops.layer_norm`.

    For the sum with a residual first, call `llmops.add_layer_norm(x, residual,
    norm.normalized_shape, norm.weight, norm.bias, norm.eps)`.

    Args:
        backend: as in `llmops.layer_norm`. Others as in torch.nn.LayerNorm.
    """

    def __init__(self, *args: Any, backend: str | None = None, **kwargs: Any) -> None:
        self.backend = backend
        super().__init__(*args, **kwargs)

    def forward(self, input: Tensor) -> Tensor:
        return llmops.layer_norm(
            input, self.normalized_shape, self.weight, self.bias, self.eps, backend=self.backend
        )


class RMSNorm(torch.nn.RMSNorm):
    """torch.nn.RMSNorm on `llmops.rms_norm`.

    For the sum with a residual first, call `llmops.add_rms_norm(x, residual,
    norm.normalized_shape, norm.weight, norm.eps)`.

    Args:
        weight_offset: added to the weight; with 1.0 (Gemma's form) the weight starts at zero.
        backend: as in `llmops.rms_norm`. Others as in torch.nn.RMSNorm.
    """

    def __init__(
        self,
        *args: Any,
        weight_offset: float = 0.0,
        backend: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.weight_offset = weight_offset
        self.backend = backend
        super().__init__(*args, **kwargs)

    def reset_parameters(self) -> None:
        if self.elementwise_affine:
            torch.nn.init.constant_(self.weight, 1.0 - self.weight_offset)

    def forward(self, x: Tensor) -> Tensor:
        return llmops.rms_norm(
            x,
            self.normalized_shape,
            self.weight,
            self.eps,
            weight_offset=self.weight_offset,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        offset = f", weight_offset={self.weight_offset}" if self.weight_offset else ""
        return super().extra_repr() + offset
