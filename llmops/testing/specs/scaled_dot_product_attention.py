"""Samples of scaled_dot_product_attention: torch's own in fp64 is the oracle."""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F

import llmops
from llmops.testing._core import Make, OpSpec, Sample


def samples(make: Make) -> Iterator[Sample]:
    def inputs(*tokens: int) -> tuple[object, ...]:
        return tuple(make(1, 2, t, 16) for t in (tokens[0], tokens[1], tokens[1]))

    yield Sample("40x50", inputs(40, 50))
    yield Sample("causal-30x30", inputs(30, 30), {"is_causal": True})
    yield Sample("3d-20x30", tuple(make(3, t, 16) for t in (20, 30, 30)), {"scale": 0.2})
    # One key is seen: the query's gradient is pure cancellation, so forward only.
    single = tuple(make(1, 2, t, 16, grad=False) for t in (1, 20, 20))
    yield Sample("causal-1x20", single, {"is_causal": True})
    yield Sample("empty-0x5", inputs(0, 5))


SPEC = OpSpec(
    name="scaled_dot_product_attention",
    fn=llmops.scaled_dot_product_attention,
    reference=F.scaled_dot_product_attention,
    torch_fn=F.scaled_dot_product_attention,
    samples=samples,
    rows=True,
    skip={"double_backward": "torch's flash kernel has none to compare with; attention's spec has"},
)
