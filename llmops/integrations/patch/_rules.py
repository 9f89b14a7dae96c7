"""What a rule is, and the rules of torch's own modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import llmops
from llmops.integrations.patch._swap import Replaced
from llmops.nn import Attention

# The dtypes of the kernels; anything else takes the module's own way.
SERVED = (torch.float32, torch.bfloat16, torch.float16)


def served(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dtype in SERVED and not x.is_nested


@dataclass(frozen=True)
class Rule:
    """A mixin that stands for the forward of one class of modules.

    Args:
        base: the class; one derived from it, with the same forward, goes by the same rule.
        op: the operator, a name for `patch(ops=...)`.
        mixin: computes it.
        unless: what keeps this module from it, or None.
        note: how the replacement differs, for the report.
        hides: names of children whose work it does itself.
        state: attributes for the mixin.
    """

    base: type
    op: str
    mixin: type
    unless: Callable[[Any], str | None] = lambda module: None
    note: str = ""
    hides: tuple[str, ...] = ()
    state: Mapping[str, Any] = field(default_factory=dict)


# For the mixins mypy needs the attributes that the class behind them brings.
class _Module(Replaced):
    weight: Tensor
    bias: Tensor | None
    eps: Any
    normalized_shape: Any
    forward: Any


class LayerNorm(_Module):
    def forward(self, input: Tensor) -> Tensor:
        if not served(input):
            return super().forward(input)
        return llmops.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(_Module):
    def forward(self, x: Tensor) -> Tensor:
        if not served(x):
            return super().forward(x)
        return llmops.rms_norm(x, self.normalized_shape, self.weight, self.eps)


class Softmax(_Module):
    dim: int

    def forward(self, input: Tensor) -> Tensor:
        return llmops.softmax(input, self.dim) if served(input) else super().forward(input)


class GELU(_Module):
    approximate: str

    def forward(self, input: Tensor) -> Tensor:
        if not served(input):
            return super().forward(input)
        return llmops.gelu(input, approximate=self.approximate)


class Embedding(_Module):
    padding_idx: int | None

    def forward(self, input: Tensor) -> Tensor:
        if not served(self.weight):
            return super().forward(input)
        return llmops.embedding(input, self.weight, padding_idx=self.padding_idx)


class Linear(_Module):
    def forward(self, input: Tensor) -> Tensor:
        # A weight of another type, quantized say, computes its product in its own way.
        if type(self.weight) not in (nn.Parameter, Tensor) or not served(input):
            return super().forward(input)
        return llmops.linear(input, self.weight, self.bias)


class CrossEntropyLoss(_Module):
    ignore_index: int
    label_smoothing: float
    reduction: str

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        if not served(input):
            return super().forward(input, target)
        return llmops.cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction=self.reduction,
        )


class MultiheadAttention(Replaced, Attention):
    rotary = None
    backend = None

    @property
    def num_kv_heads(self) -> int:  # type: ignore[override]
        return self.num_heads

    def forward(  # type: ignore[override]
        self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        if not (served(query) and served(key) and served(value)):
            return nn.MultiheadAttention.forward(self, query, key, value, *args, **kwargs)
        return Attention.forward(self, query, key, value, *args, **kwargs)


class TransformerLayer(_Module):
    """The layers go through their parts: torch's fused inference kernel would go past them."""

    activation: Any
    linear1: Any
    # Read by the layer's forward: 0 turns its fused kernel off. In front of the instance's own.
    activation_relu_or_gelu = property(lambda self: 0)

    def _ff_block(self, x: Tensor) -> Tensor:
        if self.activation is not F.gelu or not served(x):
            return super()._ff_block(x)  # type: ignore[misc]
        layer: Any = self
        last = layer.dropout3 if isinstance(self, nn.TransformerDecoderLayer) else layer.dropout2
        return last(layer.linear2(layer.dropout(llmops.gelu(self.linear1(x)))))


class EncoderLayer(TransformerLayer):
    def forward(self, src: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(src, *args, **kwargs)


class DecoderLayer(TransformerLayer):
    def forward(self, tgt: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(tgt, *args, **kwargs)


class Encoder(_Module):
    # As above: nested tensors are for torch's fused kernel only.
    use_nested_tensor = property(lambda self: False)

    def forward(self, src: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(src, *args, **kwargs)


def _embedding_unless(module: Any) -> str | None:
    for name in ("max_norm", "scale_grad_by_freq", "sparse"):
        if getattr(module, name):
            return f"{name}={getattr(module, name)!r} has no form in llmops.embedding"
    return None


def _linear_unless(module: Any) -> str | None:
    if type(module.weight) not in (nn.Parameter, Tensor):
        return f"its weight is a {type(module.weight).__name__}"
    return None


def _softmax_unless(module: Any) -> str | None:
    return "it names no dim" if module.dim is None else None


TORCH = (
    Rule(nn.LayerNorm, "layer_norm", LayerNorm),
    Rule(nn.RMSNorm, "rms_norm", RMSNorm),
    Rule(nn.Softmax, "softmax", Softmax, _softmax_unless),
    Rule(nn.GELU, "gelu", GELU),
    Rule(nn.Embedding, "embedding", Embedding, _embedding_unless),
    Rule(nn.Linear, "linear", Linear, _linear_unless),
    Rule(nn.CrossEntropyLoss, "cross_entropy", CrossEntropyLoss),
    Rule(
        nn.MultiheadAttention,
        "attention",
        MultiheadAttention,
        note="a query that sees no key gives zeros, not NaN",
        hides=("out_proj",),
    ),
    Rule(nn.TransformerEncoderLayer, "attention", EncoderLayer),
    Rule(nn.TransformerDecoderLayer, "attention", DecoderLayer),
    Rule(
        nn.TransformerEncoder,
        "attention",
        Encoder,
        note="what stands at padded positions is computed, too; torch's nested tensors give zeros",
    ),
)
