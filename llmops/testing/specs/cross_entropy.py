"""Samples of cross_entropy that reach every branch of its kernels."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import llmops
from llmops import reference
from llmops.testing._core import Make, OpSpec, Sample


def _targets(make: Make, *shape: int, high: int, ignore: int = -100) -> Tensor:
    """Class indices, a few of them ignored."""
    return make.ints(*shape, high=high).masked_fill(~make.bools(*shape, keep=0.8), ignore)


def samples(make: Make) -> Iterator[Sample]:
    everything = {
        "weight": make(129, grad=False).abs(),
        "label_smoothing": 0.2,
        "z_loss": 0.01,
        "reduction": "none",
    }
    yield Sample("37x129", (make(37, 129, scale=3), _targets(make, 37, high=129)))
    yield Sample("all-9x129", (make(9, 129), _targets(make, 9, high=129)), everything)
    mean = {**everything, "reduction": "mean"}
    yield Sample("all-mean-9x129", (make(9, 129), _targets(make, 9, high=129)), mean)
    yield Sample("scalar-target-70", (make(70), make.ints(high=70)), {"reduction": "sum"})
    yield Sample("dims-3x8x5", (make(3, 8, 5), _targets(make, 3, 5, high=8)), {"z_loss": 0.1})
    none = {"reduction": "none", "label_smoothing": 0.1}
    yield Sample("dims-2x21x3x4", (make(2, 21, 3, 4), _targets(make, 2, 3, 4, high=21)), none)
    for n in (1, 15, 16, 17, 63, 65):
        weight = {"weight": make(n, grad=False).abs(), "label_smoothing": 0.3}
        yield Sample(f"smooth-3x{n}", (make(3, n), make.ints(3, high=n)), weight)
    # More than one run of the online sum, with the largest logits first, last and in the middle.
    long = torch.stack([torch.linspace(*ends, 9000) for ends in ((0, 6), (6, 0), (-3, 3))])
    long[2] = -long[2].abs()
    rows = make(3, 9000, scale=2, grad=False) + long.to(make.device, make.dtype)
    yield Sample("runs-3x9000", (rows.requires_grad_(), make.ints(3, high=9000)), none)
    weight = {"weight": make(9000, grad=False).abs(), "label_smoothing": 0.1, "reduction": "none"}
    yield Sample("runs-weight-3x9000", (make(3, 9000), make.ints(3, high=9000)), weight)
    # Peaked rows: softmax - 1 and the rounding of a large log-sum-exp.
    peaked = make(6, 300, scale=12, grad=False)
    sure = peaked.argmax(-1).masked_fill(make.bools(6, keep=0.5), 7)
    yield Sample("peaked-6x300", (peaked.requires_grad_(), sure), {"reduction": "none"})
    shifted = make(4, 90, shift=100, grad=False).requires_grad_()
    yield Sample("shifted-4x90", (shifted, make.ints(4, high=90)), {"reduction": "none"})
    infinite = make(5, 33, grad=False).masked_fill(make.bools(5, 33, keep=0.3), -math.inf)
    infinite[:, 3] = 1.0
    yield Sample("inf-5x33", (infinite.requires_grad_(), make.ints(5, high=1) + 3))
    yield Sample("int32-4x9", (make(4, 9), make.ints(4, high=9, dtype=torch.int32)))
    ignore = {"ignore_index": 2}
    yield Sample("ignore-2", (make(12, 4), make.ints(12, high=4)), ignore)
    nothing = torch.full((3,), -100, device=make.device)
    yield Sample("all-ignored", (make(3, 7), nothing))
    yield Sample("all-ignored-none", (make(3, 7), nothing), {"reduction": "none"})
    yield Sample("empty-0x5", (make(0, 5), make.ints(0, high=5)))
    yield Sample("empty-0x5-sum", (make(0, 5), make.ints(0, high=5)), {"reduction": "sum"})
    yield Sample("no-classes", (make(3, 0), nothing), {"reduction": "sum"})
    # Enough work for more than one thread.
    yield Sample("threads-80x900", (make(80, 900), _targets(make, 80, high=900)))
    yield Sample("dtype-4x40", (make(4, 40), make.ints(4, high=40)), {"dtype": torch.float32})


def torch_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """As one writes it in PyTorch, in input's dtype."""
    target = target.long() if not target.is_floating_point() else target
    if weight is not None:
        weight = weight.to(input.dtype)
    loss = F.cross_entropy(
        input if dtype is None else input.to(dtype),
        target,
        weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )
    if z_loss:
        kept = target != ignore_index
        squares = torch.logsumexp(input, min(input.dim() - 1, 1)).square() * kept
        if reduction == "none":
            return loss + z_loss * squares
        total = squares.sum()
        # With nothing kept the loss is NaN already; 0 / 0 would make its gradient NaN, too.
        count = kept.sum().clamp(min=1) if reduction == "mean" else 1
        loss = loss + z_loss * total / count
    return loss


def schemas(make: Make) -> dict[str, tuple[Any, ...]]:
    target = torch.tensor([1, -100, 7, 0])
    how = (-100, 0.1, 0.01, "mean")
    lse = make(4, grad=False, dtype=torch.float64).abs()
    weight = make(8, grad=False).abs()
    return {
        "cross_entropy": (make(4, 8), target, weight, *how, torch.float32, "cpu"),
        "cross_entropy_bwd": (make(), lse, make(4, 8), target, weight, lse + 2, *how, "cpu"),
    }


SPEC = OpSpec(
    name="cross_entropy",
    fn=llmops.cross_entropy,
    reference=reference.cross_entropy,
    torch_fn=torch_cross_entropy,
    samples=samples,
    schemas=schemas,
)
