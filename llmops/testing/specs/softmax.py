"""Samples of softmax that reach every branch of its kernels."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import llmops
from llmops import reference
from llmops.testing._core import Make, OpSpec, Sample


def samples(make: Make) -> Iterator[Sample]:
    yield Sample("37x129", (make(37, 129, scale=3),))
    yield Sample("causal-2x5x9", (make(2, 5, 9),), {"causal": True, "scale": 0.3})
    yield Sample("addmask-3x4x17", (make(3, 4, 17),), {"mask": make(1, 4, 17)})
    yield Sample("1x1", (make(1, 1),))
    yield Sample("7", (make(7),))
    yield Sample("empty-0x5", (make(0, 5),))
    yield Sample("empty-5x0", (make(5, 0),))
    for n in (15, 16, 17, 63, 64, 65, 1000):
        yield Sample(f"3x{n}", (make(3, n),))
    yield Sample("dim0-6x5", (make(6, 5), 0), row_dim=0)
    yield Sample("dim1-3x8x5", (make(3, 8, 5), 1), {"scale": 2.0}, row_dim=1)
    yield Sample("negative-scale-4x33", (make(4, 33),), {"scale": -1.5})
    yield Sample("zero-scale-2x9", (make(2, 9),), {"scale": 0.0})
    # One weight is 1 to the last bit: the gradient is pure cancellation there, so forward only.
    yield Sample("large-4x50", (make(4, 50, scale=300, grad=False),))
    # Tq > Tk: the first rows see nothing and are zeros.
    yield Sample("causal-9x4", (make(9, 4),), {"causal": True})
    yield Sample("boolmask-4x70", (make(4, 70),), {"mask": make.bools(4, 70)})
    yield Sample("boolmask-row-2x3x19", (make(2, 3, 19),), {"mask": make.bools(2, 1, 19)})
    yield Sample("boolmask-column-2x6x11", (make(2, 6, 11),), {"mask": make.bools(6, 1)})
    yield Sample("dim0-boolmask-6x5", (make(6, 5), 0), {"mask": make.bools(6, 1)}, row_dim=0)
    # Constant along a row, it changes nothing and its gradient is 0 = pure cancellation.
    yield Sample("addmask-column-4x21", (make(4, 21),), {"mask": make(4, 1, grad=False)})
    infinite = make(3, 24, grad=False).masked_fill(make.bools(3, 24, keep=0.4), -math.inf)
    yield Sample("addmask-inf-3x24", (make(3, 24),), {"mask": infinite})
    yield Sample("both-5x13", (make(5, 13),), {"mask": make.bools(5, 13), "causal": True})
    # Past the rows that GPU kernels hold in registers.
    yield Sample("2x17001", (make(2, 17001),))
    yield Sample(
        "causal-boolmask-2x17001", (make(2, 17001),), {"mask": make.bools(2, 17001), "causal": True}
    )
    yield Sample("dtype-4x40", (make(4, 40),), {"dtype": torch.float32})


def torch_softmax(
    x: Tensor,
    dim: int = -1,
    *,
    scale: float = 1.0,
    mask: Tensor | None = None,
    causal: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """As one writes it in PyTorch, in x's dtype."""
    z = x * scale
    if mask is not None:
        z = z.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else z + mask
    if causal:
        keep = x.new_ones(x.shape[-2:], dtype=torch.bool).tril(x.shape[-1] - x.shape[-2])
        z = z.masked_fill(~keep, -math.inf)
    y = torch.softmax(z, dim, dtype=dtype)
    return y.nan_to_num(0.0) if mask is not None or causal else y


def schemas(make: Make) -> dict[str, tuple[Any, ...]]:
    y = make(4, 8, grad=False).softmax(-1).requires_grad_()
    return {
        "softmax": (make(4, 8), 0.7, make(4, 8), True, torch.float32, "cpu"),
        "softmax_bwd": (make(4, 8), y, 0.7, torch.float32, "cpu"),
    }


SPEC = OpSpec(
    name="softmax",
    fn=llmops.softmax,
    reference=reference.softmax,
    torch_fn=torch_softmax,
    samples=samples,
    schemas=schemas,
    rows=True,
)
