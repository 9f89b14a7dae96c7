"""Samples that rms_norm and layer_norm share, and their add forms."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from llmops.testing._core import Make, Sample


def in_dtype_of(x: Tensor, y: Tensor) -> Tensor:
    """y in x's dtype, where a residual made it wider; autocast on a GPU is to stay as it is."""
    return y if x.is_cuda and torch.is_autocast_enabled("cuda") else y.to(x.dtype)


def samples(make: Make, add: bool, bias: bool) -> Iterator[Sample]:
    """fn(x, [residual,] normalized_shape, weight, [bias,] eps=1e-5)"""

    def sample(
        id: str,
        shape: tuple[int, ...],
        dims: int = 1,
        *,
        parameters: str = "all",
        dtype: torch.dtype | None = None,
        residual_dtype: torch.dtype | None = None,
        grad: bool = True,
        **how: Any,
    ) -> Sample:
        last = shape[len(shape) - dims :]
        arguments: list[Any] = [make(*shape, grad=grad, **how)]
        if add:
            arguments.append(make(*shape, grad=grad, dtype=residual_dtype))
        arguments.append(last[0] if dims == 1 else last)
        arguments.append(None if parameters == "none" else make(*last, grad=grad, dtype=dtype))
        if bias:
            wanted = parameters == "all"
            arguments.append(make(*last, grad=grad, dtype=dtype) if wanted else None)
        return Sample(id, tuple(arguments), {"eps": 1e-5})

    yield sample("5x129", (5, 129))
    yield sample("2x3x4x6-two-dims", (2, 3, 4, 6), 2)
    yield sample("3x40-none", (3, 40), parameters="none")
    yield sample("3x40-weight", (3, 40), parameters="weight")
    yield sample("33-one-row", (33,))
    for n in (2, 15, 16, 17, 63, 64, 65, 1000):
        yield sample(f"3x{n}", (3, n))
    # One value per row: the gradient of x is pure cancellation, so forward only.
    yield sample("4x1", (4, 1), grad=False)
    yield sample("0x5-empty", (0, 5))
    yield sample("5x0-empty", (5, 0))
    yield sample("2x0x3-empty-two-dims", (2, 0, 3), 2)
    yield sample("fp32-parameters-6x48", (6, 48), dtype=torch.float32)
    yield sample("bf16-parameters-6x48", (6, 48), dtype=torch.bfloat16)
    # Several blocks of rows and a remainder; enough elements for two chunks and two threads.
    yield sample("4x31x900", (4, 31, 900))
    if add:
        yield sample("fp32-residual-7x80", (7, 80), residual_dtype=torch.float32)
        yield sample("fp16-residual-7x80", (7, 80), residual_dtype=torch.float16)
        yield sample("fp32-residual-120x500", (120, 500), residual_dtype=torch.float32)


def parameter(p: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """As one writes it in PyTorch, whose norms want the parameters in x's dtype."""
    return None if p is None else p.to(dtype)
