"""Row ops over the length of a row at a constant size, far beyond a GPU's cache: how much of the
copy bandwidth each reaches, from rows in registers to a vocabulary of 256k.

bf16, 2^27 elements (256 MiB) a tensor; on a CPU 2^22. Bytes: as in each op's own cases.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import llmops
from llmops.bench.harness import Case, with_backward

ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 27}
LENGTHS = (1024, 4096, 8192, 16384, 65536)
VOCABULARIES = (32768, 131072, 262144)
DTYPE = torch.bfloat16
# Weights' gradients: sums over many rows, of another order on torch's side and there in 16 bits.
NORM = 0.2
LOSS = 20 * torch.finfo(DTYPE).eps  # as in cross_entropy's own cases


def _ops(n: int) -> Iterator[tuple[str, Any, Any, tuple[int, int], int, float | None]]:
    """Op, ours, torch's, (bytes of forward, of backward) in tensors of x's size, number of such
    tensors among its inputs, tolerance; both take these and then weight and bias."""
    shape, eps = (n,), 1e-6
    yield (
        "softmax",
        lambda x, w, b: llmops.softmax(x),
        lambda x, w, b: torch.softmax(x, -1),
        (2, 3),
        1,
        None,
    )
    yield (
        "layer_norm",
        lambda x, w, b: llmops.layer_norm(x, shape, w, b),
        lambda x, w, b: F.layer_norm(x, shape, w, b),
        (2, 3),
        1,
        NORM,
    )
    yield (
        "rms_norm",
        lambda x, w, b: llmops.rms_norm(x, shape, w, eps),
        lambda x, w, b: F.rms_norm(x, shape, w, eps),
        (2, 3),
        1,
        NORM,
    )

    def eager_add(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        h = x + r
        return F.rms_norm(h, shape, w, eps), h

    yield (
        "add_rms_norm",
        lambda x, r, w, b: llmops.add_rms_norm(x, r, shape, w, eps),
        eager_add,
        (4, 4),
        2,
        NORM,
    )


def _case(
    op: str, passes: str, shape: str, sides: tuple[Any, Any], inputs: Any, size: int, tolerance: Any
) -> Case:
    ours, eager = (with_backward(passes, side, inputs) for side in sides)
    return Case(op, passes, DTYPE, shape, ours, eager, bytes=size, tolerance=tolerance)


def cases(quick: bool) -> Iterator[Case]:
    elements = ELEMENTS["cuda" if torch.get_default_device().type == "cuda" else "cpu"]
    size = elements * DTYPE.itemsize
    for n in LENGTHS[1:2] if quick else LENGTHS:
        for op, ours, eager, moved, number, tolerance in _ops(n):
            wide = [torch.randn(elements // n, n, dtype=DTYPE) for _ in range(number)]
            weights = [torch.randn(n, dtype=DTYPE) for _ in range(2)]
            used = wide if op == "softmax" else [*wide, weights[0]]
            for leaf in [*used, weights[1]] if op == "layer_norm" else used:
                leaf.requires_grad_()
            shape, inputs = f"bandwidth {elements // n}x{n}", (*wide, *weights)
            for passes, factor in zip(("fwd", "bwd"), moved, strict=True):
                sides = (ours, eager)
                yield _case(op, passes, shape, sides, inputs, factor * size, tolerance)
    for v in VOCABULARIES[1:2] if quick else VOCABULARIES:
        x = torch.randn(elements // v, v, dtype=DTYPE).requires_grad_()
        target = torch.randint(v, (elements // v,))
        sides = (llmops.cross_entropy, F.cross_entropy)
        for passes, factor in (("fwd", 1), ("bwd", 2), ("fwd+bwd", 3)):
            shape = f"bandwidth {elements // v}x{v}"
            yield _case("cross_entropy", passes, shape, sides, (x, target), factor * size, LOSS)
