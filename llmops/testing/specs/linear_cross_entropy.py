"""Samples of linear_cross_entropy that reach every branch of its kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import llmops
from llmops import reference
from llmops.testing._core import Make, OpSpec, Sample


def samples(make: Make) -> Iterator[Sample]:
    target = make.ints(300, high=70)
    # 300 rows are two chunks, 2100 classes two runs of a CPU's. fp16 holds logits of a few tens to
    # 2^-6 only: keep them small.
    yield Sample("300x24-of-70", (make(300, 24, scale=0.3), make(70, 24), target))
    some = make.ints(24, high=2100).masked_fill(~make.bools(24, keep=0.6), -100)
    everything = {
        "linear_bias": make(2100),
        "weight": make(2100, grad=False).abs(),
        "label_smoothing": 0.2,
    }
    few = (make(24, 8, scale=0.3), make(2100, 8), some)
    yield Sample("ignored-all-24x8", few, everything)
    none = {**everything, "linear_bias": make(2100), "reduction": "none"}
    yield Sample("none-24x8", (make(24, 8, scale=0.3), make(2100, 8), some), none)
    yield Sample(
        "sum-9x16", (make(9, 16), make(33, 16), make.ints(9, high=33)), {"reduction": "sum"}
    )
    fixed = (make(9, 16), make(33, 16, grad=False), make.ints(9, high=33))
    yield Sample("fixed-weight", fixed, {"linear_bias": make(33)})
    yield Sample("fixed-input", (make(9, 16, grad=False), make(33, 16), make.ints(9, high=33)))
    yield Sample("one-16", (make(16), make(33, 16), make.ints(high=33)))
    yield Sample("one-none-16", (make(16), make(33, 16), make.ints(high=33)), {"reduction": "none"})
    # Enough rows that PyTorch's own error is not small by luck, as it is of five.
    ids32 = make.ints(24, high=9, dtype=torch.int32)
    yield Sample("int32-ignore-3", (make(24, 8), make(9, 8), ids32), {"ignore_index": 3})
    nothing = torch.full((3,), -100, device=make.device)
    yield Sample("all-ignored", (make(3, 8), make(9, 8), nothing), {"linear_bias": make(9)})
    yield Sample("empty-0x8", (make(0, 8), make(9, 8), make.ints(0, high=9)), {"reduction": "sum"})
    wide = (make(4, 8, scale=0.3), make(9, 8), make.ints(4, high=9))
    yield Sample("dtype-4x8", wide, {"dtype": torch.float32})
    # So few rows that the logits' gradient is what is held.
    kept = {**everything, "linear_bias": make(2100)}
    yield Sample("kept-6x8", (make(6, 8, scale=0.3), make(2100, 8), some[:6].clone()), kept)


def torch_linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """PyTorch's way with all logits, in input's dtype (2.11 has no linear_cross_entropy)."""
    logits = F.linear(input, linear_weight, linear_bias)
    return F.cross_entropy(
        logits if dtype is None else logits.to(dtype),
        target if target.is_floating_point() else target.long(),
        None if weight is None else weight.to(dtype or input.dtype),
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )


def schemas(make: Make) -> dict[str, tuple[Any, ...]]:
    target = torch.tensor([1, -100, 7, 0])
    given = (make(4, 6), make(8, 6), target, make(8), make(8, grad=False).abs())
    made = (make(4, 6, grad=False), make(8, 6, grad=False), make(8, grad=False))
    flags, how = (True, True, True), (-100, 0.1, "mean")
    return {
        "linear_cross_entropy": (*given, *how, torch.float32, *flags, False, "cpu"),
        "linear_cross_entropy_bwd": (make(), *given, *made, *how, *flags, "cpu"),
    }


SPEC = OpSpec(
    name="linear_cross_entropy",
    fn=llmops.linear_cross_entropy,
    reference=reference.linear_cross_entropy,
    torch_fn=torch_linear_cross_entropy,
    samples=samples,
    schemas=schemas,
    lowers=True,
    skip={
        "bitwise_repeatable": "torch.mm of a few rows in fp32 splits its sums by the number of "
        "threads; tests/test_linear_cross_entropy.py has what is promised",
        "after_fork": "torch's products wait forever in a forked child, as F.linear does",
    },
)
