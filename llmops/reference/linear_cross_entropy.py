"""linear_cross_entropy in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llmops.reference._common import _wide
from llmops.reference.cross_entropy import cross_entropy


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """linear_weight [V, D], or [V, d1, ..., D] for logits [N, V, d1, ...]."""
    wide_bias = None if linear_bias is None else _wide(linear_bias).flatten()
    logits = F.linear(_wide(input), _wide(linear_weight).flatten(0, -2), wide_bias)
    return cross_entropy(
        logits.reshape(*input.shape[:-1], *linear_weight.shape[:-1]),
        target,
        weight,
        ignore_index=-100 if ignore_index is None else ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
        dtype=dtype or input.dtype,
    )


def linear_cross_entropy_bwd(
    grad: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    dinput: Tensor,
    dweight: Tensor,
    dbias: Tensor,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    want_input: bool,
    want_weight: bool,
    want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients by torch.func.vjp; dinput, dweight and dbias, which a kernel may have made in
    its forward, are not looked at. What is not wanted is empty."""

    def loss(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return linear_cross_entropy(
            x,
            w,
            target,
            linear_bias=b,
            weight=weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction=reduction,
            dtype=grad.dtype,
        )

    given = (input, linear_weight) if linear_bias is None else (input, linear_weight, linear_bias)
    found = torch.func.vjp(loss, *given)[1](grad)
    wanted = (want_input, want_weight, want_bias and linear_bias is not None)
    dx, dw, db = (found[i] if want else input.new_empty(0) for i, want in enumerate(wanted))
    return dx, dw, db
