"""Modules over the operators, drop-in for torch.nn's: same constructor, same state dict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import llmops
from llmops.nn.attention import Attention as Attention
from llmops.ops._dtensor import is_distributed, replicated


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


class Embedding(torch.nn.Embedding):
    """torch.nn.Embedding on `llmops.embedding`.

    Args:
        backend: as in `llmops.embedding`. Others as in torch.nn.Embedding, less max_norm,
            scale_grad_by_freq and sparse, which raise NotImplementedError.
    """

    def __init__(self, *args: Any, backend: str | None = None, **kwargs: Any) -> None:
        self.backend = backend
        super().__init__(*args, **kwargs)
        for name in ("max_norm", "scale_grad_by_freq", "sparse"):
            if getattr(self, name):
                raise NotImplementedError(
                    f"llmops.nn.Embedding: {name}={getattr(self, name)!r} is not supported; use "
                    "torch.nn.Embedding"
                )

    def forward(self, input: Tensor) -> Tensor:
        return llmops.embedding(
            input, self.weight, padding_idx=self.padding_idx, backend=self.backend
        )


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """torch.nn.CrossEntropyLoss on `llmops.cross_entropy`.

    Args:
        z_loss: as in `llmops.cross_entropy`.
        backend: as there. Others as in torch.nn.CrossEntropyLoss; the state dict is the same.
    """

    def __init__(
        self, *args: Any, z_loss: float = 0.0, backend: str | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.z_loss = z_loss
        self.backend = backend

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return llmops.cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            reduction=self.reduction,
            backend=self.backend,
        )


class Linear(torch.nn.Linear):
    """torch.nn.Linear on `llmops.linear`.

    Args:
        backend: as in `llmops.linear`. Others as in torch.nn.Linear.
    """

    def __init__(self, *args: Any, backend: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.backend = backend

    def forward(self, input: Tensor) -> Tensor:
        return llmops.linear(input, self.weight, self.bias, backend=self.backend)


class Softmax(torch.nn.Softmax):
    """torch.nn.Softmax on `llmops.softmax`.

    Args:
        dim: the dimension that sums to one; torch's guess where none is named is not made.
        backend: as in `llmops.softmax`.
    """

    def __init__(self, dim: int | None = None, *, backend: str | None = None) -> None:
        if dim is None:
            raise ValueError("llmops.nn.Softmax: name the dimension, e.g. Softmax(dim=-1)")
        super().__init__(dim)
        self.backend = backend

    def forward(self, input: Tensor) -> Tensor:
        assert self.dim is not None
        return llmops.softmax(input, self.dim, backend=self.backend)


class GELU(torch.nn.GELU):
    """torch.nn.GELU on `llmops.gelu`.

    Args:
        approximate: "none" or "tanh".
        backend: as in `llmops.gelu`.
    """

    def __init__(self, approximate: str = "none", *, backend: str | None = None) -> None:
        super().__init__(approximate)
        self.backend = backend

    def forward(self, input: Tensor) -> Tensor:
        return llmops.gelu(input, approximate=self.approximate, backend=self.backend)


class SwiGLU(torch.nn.Module):
    """y = silu(gate) up, without parameters: between the two projections of a gated MLP.

    forward(gate, up), or forward(fused) with the gate in the first half of the last dimension.

    Args:
        backend: as in `llmops.swiglu`.
    """

    def __init__(self, *, backend: str | None = None) -> None:
        super().__init__()
        self.backend = backend

    def forward(self, gate: Tensor, up: Tensor | None = None) -> Tensor:
        return llmops.swiglu(gate, up, backend=self.backend)


class RotaryEmbedding(torch.nn.Module):
    """Turns q and k by their positions, from tables made once.

    The tables stay fp32 whatever the module is converted to, follow it to another device, and are
    not in the state dict.

    Args:
        dim: elements of each head that are rotated, at most the head dim.
        max_length: positions 0 to max_length - 1 can be served.
        base, scaling: as in `llmops.rope_tables`.
        interleaved: as in `llmops.rope`.
        backend: as in `llmops.rope`.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        dim: int,
        max_length: int,
        *,
        base: float = 10000.0,
        scaling: Mapping[str, Any] | None = None,
        interleaved: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.interleaved = interleaved
        self.backend = backend
        cos, sin = llmops.rope_tables(max_length, dim, base=base, scaling=scaling)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> RotaryEmbedding:
        # .half() or .to(torch.bfloat16) converts buffers too: positions need the fp32 ones.
        kept = self.cos, self.sin
        super()._apply(fn, recurse)
        for name, table in zip(("cos", "sin"), kept, strict=True):
            converted = getattr(self, name)
            if converted.dtype != table.dtype:
                setattr(self, name, table.to(converted.device))
        return self

    def forward(
        self, q: Tensor, k: Tensor, position_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """q [B, Hq, T, D] and k [B, Hk, T, D], turned; position_ids [T] or [B, T], or 0 to T-1."""
        cos, sin = self.cos, self.sin
        if is_distributed(q) and not is_distributed(cos):  # made alike on every rank
            cos, sin = replicated(cos, q), replicated(sin, q)
        return llmops.rope_qk(
            q,
            k,
            cos,
            sin,
            position_ids,
            interleaved=self.interleaved,
            backend=self.backend,
        )
