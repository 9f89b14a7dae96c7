"""More than 2^31 elements: offsets are 64-bit, in what is read and in what is written.

The kit's check `far_strides` reads rows that lie that far apart, for every op; here are dense
tensors of that size, whose results are written beyond 2^31, and the axes it leaves alone. Inputs
are reserved and touched where it matters only: an untouched page reads as zero and takes no memory.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import llmops

GIB = 2**30
WIDTH = 2**16
ROWS = 2**31 // WIDTH + 2  # the last two rows lie beyond 2^31 elements
CHECKED = (0, ROWS - 2, ROWS - 1)
DTYPE = torch.bfloat16

# `large`: continuous integration takes a rotating part of these, as of the kit.
pytestmark = [pytest.mark.slow, pytest.mark.large]


def require(gib: float) -> None:
    """Skips, with the reason, where the memory is not there."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        pytest.skip("cannot tell how much memory is free: no /proc/meminfo")
    if free / 2**20 < gib:
        pytest.skip(f"needs {gib} GiB of free memory, and {free / 2**20:.1f} are")


def rows_of(width: int = WIDTH) -> Tensor:
    """[ROWS, width], zeros that take no memory, values in the rows that are checked."""
    x = torch.zeros(ROWS, width, dtype=DTYPE)
    generator = torch.Generator().manual_seed(0)
    for row in CHECKED:
        x[row] = torch.randn(width, generator=generator).to(DTYPE)
    return x


# Every op whose result is as large as its input; (function of x) -> results, and GiB written.
DENSE: dict[str, tuple[Callable[[Tensor], Any], int]] = {
    "softmax": (lambda x: llmops.softmax(x), 4),
    "rms_norm": (lambda x: llmops.rms_norm(x, WIDTH), 4),
    "layer_norm": (lambda x: llmops.layer_norm(x, WIDTH), 4),
    "add_rms_norm": (lambda x: llmops.add_rms_norm(x, x, WIDTH), 8),
    "add_layer_norm": (lambda x: llmops.add_layer_norm(x, x, WIDTH), 8),
    "gelu": (lambda x: llmops.gelu(x), 4),
    "swiglu": (lambda x: llmops.swiglu(x, x), 4),
    "geglu": (lambda x: llmops.geglu(x, x), 4),
    "rope": (lambda x: _rotated(x), 4),
}


def _rotated(x: Tensor) -> Tensor:
    heads = x.view(1, x.shape[0] * 64, 1, 1024)  # [B, H, T, D]
    out: Tensor = llmops.rope(heads, *llmops.rope_tables(1, 1024))
    return out.view(x.shape)


@pytest.mark.parametrize("op", DENSE)
def test_large_dense(op: str) -> None:
    fn, gib = DENSE[op]
    require(gib + 2)
    x = rows_of()
    results = fn(x)
    for result in results if isinstance(results, tuple) else (results,):
        assert result.numel() > 2**31
    few = fn(x[list(CHECKED)])
    for large, small in zip(
        results if isinstance(results, tuple) else (results,),
        few if isinstance(few, tuple) else (few,),
        strict=True,
    ):
        assert torch.equal(large[list(CHECKED)], small)


@pytest.mark.parametrize("op", ["softmax", "rms_norm"])
def test_large_dense_backward(op: str) -> None:
    """Of the last rows alone: the gradient that comes in is zero elsewhere."""
    fn, gib = DENSE[op]
    require(2 * gib + 4)
    x = rows_of().requires_grad_()
    grad = rows_of()
    dx = torch.autograd.grad(fn(x), x, grad)[0]
    few = x.detach()[list(CHECKED)].requires_grad_()
    small = torch.autograd.grad(fn(few), few, grad[list(CHECKED)])[0]
    assert torch.equal(dx[list(CHECKED)], small)


def test_large_embedding() -> None:
    """A table of more than 2^31 elements, read at its end."""
    require(2)
    table = rows_of()
    tokens = torch.tensor([ROWS - 1, 0, ROWS - 2])
    assert torch.equal(llmops.embedding(tokens, table), table[tokens])


def test_large_logits() -> None:
    """Ops that give little of much: sample and the loss."""
    require(2)
    logits = rows_of()
    logits[ROWS - 1, 777] = 100.0
    drawn = llmops.sample(logits, temperature=0.0)
    assert drawn[ROWS - 1] == 777
    assert drawn[ROWS - 2] == logits[ROWS - 2].argmax()
    target = torch.full((ROWS,), -100)
    target[ROWS - 2 :] = torch.tensor([5, 778])
    got = llmops.cross_entropy(logits, target, reduction="none")[ROWS - 2 :]
    want = llmops.cross_entropy(logits[ROWS - 2 :], target[ROWS - 2 :], reduction="none")
    assert torch.equal(got, want)


@pytest.mark.parametrize("axis", ["batch", "heads", "tokens"])
@pytest.mark.parametrize("queries", [1, 40], ids=["decode", "prefill"])
def test_large_attention_strides(axis: str, queries: int) -> None:
    """q, k, v and their gradients with any axis spread over more than 2^31 elements."""
    require(1)
    generator = torch.Generator().manual_seed(0)

    def spread(batch: int, heads: int, tokens: int, dim: int) -> Tensor:
        sizes = [batch, heads, tokens, dim]
        strides = [heads * tokens * dim, tokens * dim, dim, 1]
        i = ("batch", "heads", "tokens").index(axis)
        count = max(sizes[i] - 1, 1)
        strides[i] = (2**31 // count) + 2**20
        if axis == "tokens":
            strides[1], strides[0] = dim, heads * dim
        buffer = torch.empty(sum((n - 1) * s for n, s in zip(sizes, strides, strict=True)) + 1,
                             dtype=DTYPE)  # fmt: skip
        x = buffer.as_strided(sizes, strides)
        return x.copy_(torch.randn(sizes, generator=generator).to(DTYPE))

    q, k, v = spread(2, 4, queries, 32), spread(2, 2, 70, 32), spread(2, 2, 70, 32)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    near = [t.detach().contiguous().requires_grad_() for t in leaves]
    results = []
    for given in (leaves, near):
        out = llmops.attention(*given, causal=True)
        assert isinstance(out, Tensor)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(DTYPE)
        results.append((out.detach(), *torch.autograd.grad(out, given, grad)))
    for far_result, near_result in zip(*results, strict=True):
        assert torch.equal(far_result, near_result)
