"""Samples of merge_attention."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import llmops
from llmops import reference
from llmops.testing._core import Make, OpSpec, Sample


def _parts(make: Make, *shape: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out_a, lse_a, out_b, lse_b for out of `shape`."""
    wide = {"dtype": torch.float32}
    rows = shape[:-1]
    return make(*shape), make(*rows, scale=2, **wide), make(*shape), make(*rows, scale=2, **wide)  # type: ignore[arg-type]


def samples(make: Make) -> Iterator[Sample]:
    yield Sample("2x3x5x7", _parts(make, 2, 3, 5, 7))
    yield Sample("5x64", _parts(make, 5, 64))
    yield Sample("row-33", _parts(make, 33))
    yield Sample("1x2x9x130", _parts(make, 1, 2, 9, 130))
    yield Sample("empty-0x8", _parts(make, 0, 8))
    yield Sample("empty-8x0", _parts(make, 8, 0))
    out_a, lse_a, out_b, lse_b = _parts(make, 6, 20)
    with torch.no_grad():  # an empty part on either side, and on both
        lse_a[1:3] = -math.inf
        lse_b[2:4] = -math.inf
        out_a[1:3] = 0
        out_b[2:4] = 0
    yield Sample("empty-parts-6x20", (out_a, lse_a, out_b, lse_b))
    far = _parts(make, 4, 20)
    with torch.no_grad():
        far[1][:] += 500  # one side outweighs the other by more than fp32 can hold
    yield Sample("far-4x20", (far[0], far[1], far[2], far[3].detach()))


def torch_merge(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    """As one writes it in PyTorch."""
    lse = torch.logaddexp(lse_a, lse_b)
    weight_a = torch.exp(lse_a - lse).nan_to_num(0.0)[..., None]
    weight_b = torch.exp(lse_b - lse).nan_to_num(0.0)[..., None]
    return (out_a * weight_a + out_b * weight_b).to(out_a.dtype), lse


def schemas(make: Make) -> dict[str, tuple[Any, ...]]:
    return {
        "merge_attention": (*_parts(make, 2, 3, 8), "cpu"),
        "merge_attention_bwd": (
            make(2, 3, 8),
            make(2, 3),
            *_parts(make, 2, 3, 8),
            "cpu",
        ),
    }


SPEC = OpSpec(
    name="merge_attention",
    fn=llmops.merge_attention,
    reference=reference.merge_attention,
    torch_fn=torch_merge,
    samples=samples,
    schemas=schemas,
    rows=True,
)
