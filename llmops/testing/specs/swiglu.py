"""Samples of swiglu and geglu that reach every branch of their kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor

import llmops
from llmops import reference
from llmops.testing._core import Make, OpSpec, Sample


def samples(make: Make) -> Iterator[Sample]:
    yield Sample("5x67", (make(5, 67, scale=3), make(5, 67)))
    yield Sample("fused-4x2*19", (make(4, 38, scale=3),))
    fixed = make(2, 9, grad=False)
    yield Sample("up-fixed-2x9", (make(2, 9), fixed))
    for n in (1, 15, 16, 17, 31, 32, 33):
        yield Sample(f"2x{n}", (make(2, n), make(2, n)))
    yield Sample("fused-2x3x2*32", (make(2, 3, 64),))
    yield Sample("far-3x40", (make(3, 40, scale=40), make(3, 40)))
    # More than one task of a flat walk, the last one not full; rows long enough to be shared.
    yield Sample("flat-3x30000", (make(3, 30000), make(3, 30000)))
    yield Sample("fused-40x2*2000", (make(40, 4000),))
    yield Sample("empty-0x4", (make(0, 4), make(0, 4)))
    yield Sample("empty-fused-3x0", (make(3, 0),))
    yield Sample("scalar", (make(), make()))


def samples_geglu(make: Make) -> Iterator[Sample]:
    """The walk over memory is swiglu's: a few samples of each form."""
    for name in ("none", "tanh"):
        kind = {"approximate": name}
        yield Sample(f"{name}-5x67", (make(5, 67, scale=3), make(5, 67)), kind)
        yield Sample(f"{name}-fused-4x2*19", (make(4, 38, scale=3),), kind)
        yield Sample(f"{name}-far-3x40", (make(3, 40, scale=40), make(3, 40)), kind)
        yield Sample(f"{name}-empty-0x4", (make(0, 4), make(0, 4)), kind)


def _halves(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    if up is not None:
        return gate, up
    first, second = gate.chunk(2, -1)
    return first, second


def torch_swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """As models write it."""
    g, u = _halves(gate, up)
    return F.silu(g) * u


def torch_geglu(gate: Tensor, up: Tensor | None = None, *, approximate: str = "none") -> Tensor:
    g, u = _halves(gate, up)
    return F.gelu(g, approximate=approximate) * u


def schemas(make: Make) -> dict[str, tuple[Any, ...]]:
    return {
        "swiglu": (make(3, 10), make(3, 10), "cpu"),
        "glu_bwd": (make(3, 9), make(3, 9), make(3, 9), "silu", "cpu"),
        "glu_bwd_fused": (make(3, 5), make(3, 10), "gelu", "cpu"),
    }


def schemas_geglu(make: Make) -> dict[str, tuple[Any, ...]]:
    return {"geglu": (make(3, 10), None, "tanh", "cpu")}


SPEC = OpSpec(
    name="swiglu",
    fn=llmops.swiglu,
    reference=reference.swiglu,
    torch_fn=torch_swiglu,
    samples=samples,
    schemas=schemas,
    rows=True,
)
SPEC_GEGLU = OpSpec(
    name="geglu",
    fn=llmops.geglu,
    reference=reference.geglu,
    torch_fn=torch_geglu,
    samples=samples_geglu,
    schemas=schemas_geglu,
    rows=True,
)
