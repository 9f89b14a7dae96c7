"""Samples of linear that reach every branch of its kernel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor

import llmops
from llmops import reference
from llmops.testing._core import Make, OpSpec, Sample


def samples(make: Make) -> Iterator[Sample]:
    yield Sample("2x3x40-bias-21", (make(2, 3, 40), make(21, 40), make(21)))
    # One row, two, and tiles of four with one to four rows in the last; lengths of every tail.
    for rows, k, n in (
        (1, 67, 33),
        (2, 65, 17),
        (3, 31, 15),
        (4, 128, 16),
        (5, 16, 8),
        (8, 7, 5),
        (9, 33, 1),
        # Matrix tiles of 16 rows, 16 weights and 32 of k: whole and cut, one and two, 64 weights.
        (16, 64, 64),
        (17, 96, 33),
        (48, 40, 130),
        # A lane to each row of x: one to four vectors of them, the last group of one; weights that
        # fill no tile, and are fewer than one; sums in several parts.
        (13, 20, 5),
        (24, 300, 25),
        (33, 257, 13),
        (50, 513, 30),
        (64, 31, 12),
        # So many rows that gradients may be ours, too.
        (200, 70, 66),
    ):
        yield Sample(f"{rows}x{k}-{n}", (make(rows, k), make(n, k)))
        yield Sample(f"{rows}x{k}-{n}-bias", (make(rows, k), make(n, k), make(n)))
    for k in (127, 128, 129, 255, 256, 257):
        yield Sample(f"1x{k}-4", (make(1, k), make(4, k)))
    yield Sample("vector-19", (make(19), make(6, 19), make(6)))
    # Long rows of x: panels of four. Enough products for a second thread.
    yield Sample("9x20000-6", (make(9, 20000, grad=False), make(6, 20000, grad=False)))
    yield Sample("1x1100-1000", (make(1, 1100, grad=False), make(1000, 1100, grad=False)))
    for rows, k, n in ((0, 5, 3), (3, 0, 4), (3, 5, 0)):
        yield Sample(f"empty-{rows}x{k}-{n}", (make(rows, k), make(n, k), make(n)))


def result_floor(sample: Sample) -> list[Tensor]:
    """A sum's fp32 error, in whichever order: about half an eps of what has been summed, at most
    sum |x w|. torch's own is as large, and in results that cancel small by luck."""
    x, weight, *bias = (t.detach().double().abs() for t in sample.args)
    return [2.0**-24 * F.linear(x, weight, *bias)]


def schemas(make: Make) -> dict[str, tuple[Any, ...]]:
    return {"linear": (make(2, 3, 9), make(5, 9), make(5), "cpu")}


SPEC = OpSpec(
    name="linear",
    fn=llmops.linear,
    reference=reference.linear,
    torch_fn=F.linear,
    samples=samples,
    schemas=schemas,
    result_floor=result_floor,
    rows=True,
    skip={
        "bitwise_repeatable": "gradients are torch's own products, whose bits change with the "
        "number of threads; tests/test_linear.py holds the forward to it",
        "after_fork": "torch's products wait forever in a forked child, as F.linear does",
    },
)
