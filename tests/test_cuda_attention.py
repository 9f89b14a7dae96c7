"""The CUDA attention kernels in the simulator: every tile width, the ways a call is cut into
blocks, and that limits decide what is read. The kit runs on them with LLMOPS_CUDA_SIM=1."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from llmops import reference
from llmops.testing import assert_close
from llmops.testing.specs.attention import torch_attention


def _qkv(sizes: tuple[int, ...], dtype: torch.dtype) -> Any:
    """q [B, H, Tq, D], k and v [B, Hkv, Tk, D] for sizes B, H, Hkv, Tq, Tk, D."""
    torch.manual_seed(0)
    batch, heads, kv_heads, queries, keys, dim = sizes
    shapes = ((batch, heads, queries, dim), *[(batch, kv_heads, keys, dim)] * 2)
    return tuple(torch.randn(s).to(dtype) for s in shapes)


def _attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, **extra: Any) -> Any:
    arguments = {"mask": None, "causal": causal, "scale": q.shape[3] ** -0.5, **extra}
    return torch.ops.llmops_cuda_sim.attention_fwd(q, k, v, **arguments)


def _check(got: Any, q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> None:
    wide = [t.double() for t in (q, k, v)]
    oracle = reference.attention(*wide, **arguments, return_lse=True)
    yardstick = torch_attention(q, k, v, **arguments, return_lse=True)
    for g, o, y in zip(got, oracle, yardstick, strict=True):
        assert_close(g, o, y, factor=2.0, what="attention")


# B, H, Hkv, Tq, Tk, D, and by what they are served.
SHAPES = {
    "d64-two-blocks": (1, 2, 1, 150, 170, 64),
    "d96": (1, 1, 1, 70, 90, 96),
    "d96-odd": (1, 1, 1, 40, 67, 91),
    "d128": (1, 1, 1, 140, 100, 128),
    "d256": (1, 1, 1, 70, 50, 256),
    "packed-d128": (1, 3, 1, 25, 60, 128),
    "decode-d128": (2, 4, 2, 2, 130, 128),
    "decode-d200": (1, 2, 1, 1, 90, 200),
    "decode-split": (1, 2, 1, 3, 700, 64),
    "decode-blocks-of-rows": (1, 40, 1, 1, 1030, 64),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_cuda_attention_of_every_tile(sim: Any, shape: str, dtype: torch.dtype) -> None:
    q, k, v = _qkv(SHAPES[shape], dtype)
    sim.schedule(seed=len(shape))
    got = _attention(q, k, v, causal=True)
    _check(got, q, k, v, causal=True)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 90, 130, 64), (1, 2, 1, 2, 700, 64)], ids=str)
def test_cuda_attention_bits_of_every_schedule(sim: Any, sizes: tuple[int, ...]) -> None:
    q, k, v = _qkv(sizes, torch.bfloat16)
    results = []
    for order, seed in ((0, 0), (1, 0), (2, 3), (2, 4)):
        sim.schedule(order=order, seed=seed)
        results.append(_attention(q, k, v, causal=True))
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])


@pytest.mark.parametrize("dim", [64, 128])
def test_cuda_attention_reads_no_tile_that_no_query_sees(sim: Any, dim: int) -> None:
    """Keys past the causal limit, before the window and past the sequence are NaN."""
    q, k, v = _qkv((1, 1, 1, 40, 300, dim), torch.bfloat16)
    for window, first, last in (((-1, -1), 0, 200), ((30, -1), 130, 200)):
        dirty = [t.clone() for t in (k, v)]
        for t in dirty:
            t[:, :, :first], t[:, :, last:] = math.nan, math.nan
        keys = [t[:, :, :last] for t in dirty]
        out, lse = _attention(q, *keys, True, window_left=window[0])
        assert bool(out.isfinite().all()) and bool(lse.isfinite().all())
        clean = _attention(q, k[:, :, :last], v[:, :, :last], True, window_left=window[0])
        assert torch.equal(out, clean[0]) and torch.equal(lse, clean[1])
    limited = _attention(q, *dirty, window_left=30, window_right=0)  # the last query is at key 299
    assert bool(limited[0].isnan().any())


def test_cuda_attention_refuses_by_name(sim: Any) -> None:
    q, k, v = _qkv((1, 1, 1, 4, 5, 264), torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"head dim up to 256, got 264 and 264; use backend"):
        _attention(q, k, v)
    q, k, v = _qkv((1, 1, 1, 4, 5, 8), torch.float32)
    with pytest.raises(RuntimeError, match="take bfloat16 and float16, got Float"):
        _attention(q, k, v)
