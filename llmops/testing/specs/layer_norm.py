"""Samples of layer_norm and add_layer_norm that reach every branch of their kernels."""

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
    yield from _norm.samples(make, add=False, bias=True)
    yield Sample("bias-4x20", (make(4, 20), 20, None, make(20)))
    mixed = (make(20, dtype=torch.float32), make(20, dtype=torch.float16))
    yield Sample("mixed-parameters-4x20", (make(4, 20), 20, *mixed))
    # A row that begins unlike itself: its sums are taken twice.
    start = make(4, 200, grad=False)
    start[:, :16] += 90
    yield Sample("outliers-first-4x200", (start.requires_grad_(), 200, make(200), make(200)))


def samples_add(make: Make) -> Iterator[Sample]:
    yield from _norm.samples(make, add=True, bias=True)
    yield Sample("bias-4x20", (make(4, 20), make(4, 20), 20, None, make(20)))
    start = make(4, 200, grad=False)
    start[:, :16] += 90
    yield Sample("outliers-first-4x200", (start.requires_grad_(), make(4, 200), 200, make(200)))


def torch_layer_norm(
    x: Tensor,
    normalized_shape: int | tuple[int, ...],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else normalized_shape
    parameters = _norm.parameter(weight, x.dtype), _norm.parameter(bias, x.dtype)
    return F.layer_norm(x, shape, *parameters, eps)


def torch_add_layer_norm(
    x: Tensor, residual: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    h = x + residual
    return _norm.in_dtype_of(x, torch_layer_norm(h, *args, **kwargs)), h


def schemas(make: Make) -> dict[str, tuple[Any, ...]]:
    parameters = (make(8), make(8), 1e-5, 1)
    return {
        "layer_norm": (make(3, 8), *parameters, "cpu"),
        "layer_norm_bwd": (
            make(3, 8), make(3, 8), make(3, 8), *parameters, True, False, True, "cpu"
        ),
    }  # fmt: skip


def schemas_add(make: Make) -> dict[str, tuple[Any, ...]]:
    half, parameters = make(3, 8, dtype=torch.bfloat16), (make(8), make(8), 1e-5, 1)
    return {
        "add_layer_norm": (half, make(3, 8), *parameters, "cpu"),
        "layer_norm_bwd": (half, make(3, 8), None, *parameters, True, True, False, "cpu"),
    }


SPEC = OpSpec(
    name="layer_norm",
    fn=llmops.layer_norm,
    reference=reference.layer_norm,
    torch_fn=torch_layer_norm,
    samples=samples,
    schemas=schemas,
)
SPEC_ADD = OpSpec(
    name="add_layer_norm",
    fn=llmops.add_layer_norm,
    reference=reference.add_layer_norm,
    torch_fn=torch_add_layer_norm,
    samples=samples_add,
    schemas=schemas_add,
)
