"""Samples of rms_norm and add_rms_norm that reach every branch of their kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import llmops
from llmops import reference
from llmops.testing._core import Make, OpSpec, Sample
from llmops.testing.specs import _norm


def samples(make: Make) -> Iterator[Sample]:
    yield from _norm.samples(make, add=False, bias=False)
    gemma = {"eps": 1e-6, "weight_offset": 1.0}
    yield Sample("gemma-4x70", (make(4, 70), 70, make(70)), gemma)
    yield Sample("gemma-none-4x20", (make(4, 20), 20), gemma)


def samples_add(make: Make) -> Iterator[Sample]:
    yield from _norm.samples(make, add=True, bias=False)
    gemma = {"eps": 1e-6, "weight_offset": 1.0}
    yield Sample("gemma-4x70", (make(4, 70), make(4, 70), 70, make(70)), gemma)


def torch_rms_norm(
    x: Tensor,
    normalized_shape: int | tuple[int, ...],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    weight_offset: float = 0.0,
) -> Tensor:
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else normalized_shape
    weight = _norm.parameter(weight, x.dtype)
    if weight is not None and weight_offset:
        weight = weight + weight_offset
    return F.rms_norm(x, shape, weight, eps)


def torch_add_rms_norm(
    x: Tensor, residual: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    h = x + residual
    return _norm.in_dtype_of(x, torch_rms_norm(h, *args, **kwargs)), h


def schemas(make: Make) -> dict[str, tuple[Any, ...]]:
    rest = (1e-6, 1, 0.0)
    return {
        "rms_norm": (make(3, 8), make(8), *rest, "cpu"),
        "rms_norm_bwd": (
            make(3, 8), make(3, 8), make(3, 8), make(8), *rest, True, False, True, "cpu"
        ),
    }  # fmt: skip


def schemas_add(make: Make) -> dict[str, tuple[Any, ...]]:
    half, rest = make(3, 8, dtype=torch.bfloat16), (1e-6, 1, 0.0)
    return {
        "add_rms_norm": (half, make(3, 8), make(8), *rest, "cpu"),
        "rms_norm_bwd": (half, make(3, 8), None, make(8), *rest, True, True, False, "cpu"),
    }


SPEC = OpSpec(
    name="rms_norm",
    fn=llmops.rms_norm,
    reference=reference.rms_norm,
    torch_fn=torch_rms_norm,
    samples=samples,
    schemas=schemas,
)
SPEC_ADD = OpSpec(
    name="add_rms_norm",
    fn=llmops.add_rms_norm,
    reference=reference.add_rms_norm,
    torch_fn=torch_add_rms_norm,
    samples=samples_add,
    schemas=schemas_add,
)
