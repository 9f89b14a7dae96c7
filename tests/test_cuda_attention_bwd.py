"""Attention's backward in CUDA, in the simulator: every tile width, tiles that are left out and
rows that saw nothing. Its kit runs with LLMOPS_CUDA_SIM=1, as every operator's."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from llmops import reference
from llmops.testing import assert_close
from llmops.testing.specs.attention import torch_attention


def _tensors(sizes: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, k, v, and the gradients of out and lse, for sizes B, H, Hkv, Tq, Tk, D, Dv."""
    torch.manual_seed(0)
    batch, heads, kv_heads, queries, keys, dim, dim_v = sizes
    shapes = (
        (batch, heads, queries, dim),
        (batch, kv_heads, keys, dim),
        (batch, kv_heads, keys, dim_v),
        (batch, heads, queries, dim_v),
    )
    return (*(torch.randn(s).to(dtype) for s in shapes), torch.randn(batch, heads, queries))


def _by_autograd(function: Any, tensors: tuple[Tensor, ...], causal: bool) -> tuple[Any, Any]:
    """(out, lse) and (dq, dk, dv)."""
    q, k, v, grad_out, grad_lse = tensors
    inputs = [t.detach().requires_grad_() for t in (q, k, v)]
    out, lse = function(*inputs, causal=causal, return_lse=True)
    # A row that saw nothing has an lse of -inf and no gradient.
    grad_lse = grad_lse.masked_fill(lse.isinf(), 0.0).to(lse.dtype)
    grads = torch.autograd.grad((out, lse), inputs, (grad_out.to(out.dtype), grad_lse))
    return (out.detach(), lse.detach()), grads


def _backward(tensors: tuple[Tensor, ...], results: Any, causal: bool = False, **extra: Any) -> Any:
    q, k, v, grad_out, grad_lse = tensors
    out, lse = results[0].to(q.dtype), results[1].float()
    return torch.ops.llmops_cuda_sim.attention_bwd(
        grad_out, grad_lse, q, k, v, None, out, lse, causal, q.shape[3] ** -0.5, False, **extra
    )[:3]


SHAPES = {
    "d64-many-tiles": (1, 2, 1, 150, 140, 64, 64),
    "d40-odd-v": (2, 2, 2, 40, 70, 40, 33),
    "d96": (1, 1, 1, 70, 90, 96, 96),
    "d96-more-queries": (1, 2, 1, 90, 30, 91, 96),
    "d128": (1, 2, 1, 70, 70, 128, 128),
    "d256": (1, 2, 1, 40, 70, 256, 200),
    "one-query": (1, 4, 2, 1, 70, 64, 64),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_cuda_attention_bwd_of_every_tile(sim: Any, shape: str, dtype: torch.dtype) -> None:
    tensors = _tensors(SHAPES[shape], dtype)
    wide = tuple(t.double() for t in tensors)
    results, oracle = _by_autograd(reference.attention, wide, True)
    _, yardstick = _by_autograd(torch_attention, tensors, True)
    sim.schedule(seed=len(shape))
    for name, got, o, y in zip(
        "qkv", _backward(tensors, results, True), oracle, yardstick, strict=True
    ):
        assert_close(got, o, y, factor=3.0, what=f"d{name}")


@pytest.mark.parametrize("dim", [64, 136])
def test_cuda_attention_bwd_bits_of_every_schedule(sim: Any, dim: int) -> None:
    tensors = _tensors((1, 2, 1, 90, 100, dim, dim), torch.bfloat16)
    results, _ = _by_autograd(reference.attention, tensors, True)
    found = []
    for order, seed in ((0, 0), (1, 0), (2, 3), (2, 4)):
        sim.schedule(order=order, seed=seed)
        found.append(_backward(tensors, results, True))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True))


def test_cuda_attention_bwd_reads_no_tile_that_nothing_sees(sim: Any) -> None:
    """Queries before the first key and keys past the last one any query sees are NaN."""
    late = _tensors((1, 1, 1, 150, 40, 64, 64), torch.bfloat16)
    results, want = _by_autograd(reference.attention, late, True)
    q, k, v, grad_out, grad_lse = (t.clone() for t in late)
    q[:, :, :110], grad_out[:, :, :110], grad_lse[..., :110] = math.nan, math.nan, math.nan
    got = _backward((q, k, v, grad_out, grad_lse), results, True)
    assert all(bool(g.isfinite().all()) for g in got) and not bool(got[0][:, :, :110].any())
    clean = _backward(late, results, True)
    assert all(torch.equal(a, b) for a, b in zip(got, clean, strict=True))
    assert want[0].shape == got[0].shape

    tensors = _tensors((1, 1, 1, 40, 300, 64, 64), torch.bfloat16)
    q, k, v, grad_out, grad_lse = tensors
    # The first query is at key 260, and sees 30 before it.
    out, lse = torch.ops.llmops_cuda_sim.attention_fwd(q, k, v, None, True, 0.125, window_left=30)
    clean = _backward(tensors, (out, lse), True, window_left=30)
    dirty = k.clone(), v.clone()
    for t in dirty:
        t[:, :, :192] = math.nan
    got = _backward((q, *dirty, grad_out, grad_lse), (out, lse), True, window_left=30)
    assert all(torch.equal(a, b) for a, b in zip(got, clean, strict=True))
    assert not bool(got[1][:, :, :230].any()) and bool(got[1][:, :, 230].any())


def test_cuda_attention_bwd_reads_no_key_before_every_window(sim: Any) -> None:
    """Such keys are NaN, some of them in the tile of the first one that is seen."""
    q, k, v, grad_out, grad_lse = _tensors((1, 2, 1, 64, 300, 64, 64), torch.bfloat16)
    dirty = [t.clone() for t in (k, v)]
    for t in dirty:
        t[:, :, :136] = math.nan  # the first query is at key 236
    found = []
    for keys in ((k, v), dirty):
        results = torch.ops.llmops_cuda_sim.attention_fwd(
            q, *keys, mask=None, causal=True, scale=0.125, window_left=100
        )
        tensors = (q, *keys, grad_out, grad_lse)
        found.append(_backward(tensors, results, causal=True, window_left=100))
    for clean, other in zip(*found, strict=True):
        assert torch.equal(clean, other)


def test_cuda_attention_bwd_of_rows_that_a_mask_leaves_nothing(sim: Any) -> None:
    """They have no gradient and give none, whatever their q and the gradient of their out hold."""
    q, k, v, grad_out, grad_lse = _tensors((1, 2, 1, 70, 50, 48, 48), torch.float16)
    mask = torch.randn(70, 50).half()
    mask[11], mask[40:45] = -math.inf, -math.inf
    out, lse = torch.ops.llmops_cuda_sim.attention_fwd(q, k, v, mask, False, 0.2)
    assert bool(lse[..., 11].isinf().all())

    def gradients(q: Tensor, grad_out: Tensor) -> Any:
        return torch.ops.llmops_cuda_sim.attention_bwd(
            grad_out, grad_lse, q, k, v, mask, out, lse, False, 0.2, True
        )[:4]

    clean = gradients(q, grad_out)
    for t in (q, grad_out):
        t[:, :, 11], t[:, :, 40:45] = math.nan, math.inf
    got = gradients(q, grad_out)
    assert all(torch.equal(a, b) for a, b in zip(got, clean, strict=True))
    assert not bool(got[0][:, :, 11].any()) and not bool(got[3][40:45].any())


def test_cuda_attention_bwd_without_query_heads(sim: Any) -> None:
    """Keys of a group that no head belongs to: nothing is read, and their gradients are zeros."""
    q, k, v, grad_out, grad_lse = _tensors((2, 0, 2, 5, 70, 64, 48), torch.bfloat16)
    out, lse = torch.empty(2, 0, 5, 48).bfloat16(), torch.empty(2, 0, 5)
    dq, dk, dv = _backward((q, k, v, grad_out, grad_lse), (out, lse), True)
    assert dq.shape == q.shape
    assert torch.equal(dk, torch.zeros_like(k)) and torch.equal(dv, torch.zeros_like(v))
