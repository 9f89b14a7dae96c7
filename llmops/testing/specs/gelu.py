"""Samples of gelu that reach every branch of its kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F

import llmops
from llmops import reference
from llmops.testing._core import Make, OpSpec, Sample


def samples(make: Make) -> Iterator[Sample]:
    tanh = {"approximate": "tanh"}
    yield Sample("5x67", (make(5, 67, scale=2),))
    yield Sample("tanh-5x67", (make(5, 67, scale=2),), tanh)
    yield Sample("3x4x33", (make(3, 4, 33, scale=5),))
    for n in (1, 15, 16, 17, 31, 32, 33):
        yield Sample(f"{n}", (make(n),))
    yield Sample("far-4x50", (make(4, 50, scale=30),))
    yield Sample("tanh-far-4x50", (make(4, 50, scale=30),), tanh)
    # More than one task of a flat walk, the last one not full; rows long enough to be shared.
    yield Sample("flat-3x30000", (make(3, 30000),))
    for shape in ((), (0, 5), (5, 0)):
        yield Sample(f"empty-or-scalar-{'x'.join(map(str, shape))}", (make(*shape),))


def schemas(make: Make) -> dict[str, tuple[Any, ...]]:
    return {
        "gelu": (make(3, 9), "none", "cpu"),
        "gelu_bwd": (make(3, 9), make(3, 9), "tanh", "cpu"),
    }


SPEC = OpSpec(
    name="gelu",
    fn=llmops.gelu,
    reference=reference.gelu,
    torch_fn=F.gelu,
    samples=samples,
    schemas=schemas,
    rows=True,
)
