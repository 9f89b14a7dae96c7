"""The gain of a replacement, measured on the spot for `patch(dry_run=True)`."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from llmops.integrations.patch import _swap
from llmops.integrations.patch._rules import SERVED, Rule

ROWS = 128  # tokens of the inputs
ROUNDS = 7
_known: dict[Any, float | None] = {}


def module(original: nn.Module, rule: Rule) -> float | None:
    """Time of the module over that of its replacement, forward alone; None where it has no simple
    input, or no memory behind its parameters."""
    tensors = [*original.parameters(), *original.buffers()]
    dtype = next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)
    device = tensors[0].device if tensors else torch.device("cpu")
    if device.type == "meta" or dtype not in SERVED:
        return None
    shapes = tuple(tuple(t.shape) for t in tensors)
    key = (type(original), rule.op, shapes, dtype, device)
    if key not in _known:
        inputs = _inputs(original, rule, dtype, device)
        _known[key] = None if inputs is None else _ratio(original, rule, inputs)
    return _known[key]


def _inputs(
    original: Any, rule: Rule, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, ...] | None:
    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device=device)

    if rule.op == "embedding":
        return (torch.randint(original.num_embeddings, (1, ROWS), device=device),)
    if rule.op == "cross_entropy":
        return randn(ROWS, 8192), torch.randint(8192, (ROWS,), device=device)
    if rule.op == "linear":
        return (randn(1, original.in_features),)
    if rule.op in ("swiglu", "geglu"):
        first = next((m for m in original.modules() if isinstance(m, nn.Linear)), None)
        return None if first is None else (randn(1, ROWS, first.in_features),)
    if rule.op in ("layer_norm", "rms_norm"):
        weight = next(original.parameters(), None)
        shape = original.normalized_shape if weight is None else weight.shape
        return (randn(ROWS, *shape),)
    if rule.op in ("softmax", "gelu"):
        return (randn(ROWS, 1024),)
    if isinstance(original, nn.MultiheadAttention):
        x = randn(1, ROWS, original.embed_dim)
        y = randn(1, ROWS, original.kdim), randn(1, ROWS, original.vdim)
        return x, y[0], y[1]
    return None


def _ratio(original: nn.Module, rule: Rule, inputs: tuple[Tensor, ...]) -> float:
    ours = copy.copy(original)  # the same parameters
    _swap.swap(ours, rule.mixin, rule.state)
    return ratio(lambda: original(*inputs), lambda: ours(*inputs), inputs[0].device)


def ratio(theirs: Callable[[], Any], ours: Callable[[], Any], device: torch.device) -> float:
    """Median time of the one call over the other's, in turn."""

    def time(call: Callable[[], Any]) -> float:
        start = perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return perf_counter() - start

    with torch.inference_mode():
        for call in (theirs, ours, theirs, ours):
            call()
        pairs = [(time(theirs), time(ours)) for _ in range(ROUNDS)]
    return statistics.median(p[0] for p in pairs) / statistics.median(p[1] for p in pairs)
