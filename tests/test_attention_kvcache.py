"""attention_kvcache: the conformance kit, and what is particular to it."""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch
from torch import Tensor

import llmops
from llmops.testing import Target, suite, targets
from llmops.testing.specs.attention_kvcache import SPEC

globals().update(suite(SPEC))

TARGETS = pytest.mark.parametrize("target", targets("attention_kvcache"), ids=str)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def _pages(cache: Tensor, lengths: Tensor, leftpad: Tensor, page: int) -> tuple[Tensor, Tensor]:
    """The cache in shuffled pages, NaN wherever nothing is held; -1 where no page is mapped."""
    batch, heads, longest, dim = cache.shape
    width = -(-longest // page)
    # The same for keys and values: one table serves both.
    generator = torch.Generator(cache.device).manual_seed(0)
    blocks = torch.randperm(batch * width + 2, generator=generator, device=cache.device)
    table = torch.full((batch, width), -1)
    paged = torch.full((len(blocks), heads, page, dim), math.nan, dtype=cache.dtype)
    for b in range(batch):
        for i in range(width):
            begin, end = max(i * page, int(leftpad[b])), min((i + 1) * page, int(lengths[b]))
            if begin < end:
                table[b, i] = blocks[b * width + i]
                rows = slice(begin - i * page, end - i * page)
                paged[table[b, i], :, rows] = cache[b, :, begin:end]
    return paged, table


@TARGETS
@DTYPES
@pytest.mark.parametrize("queries", [1, 3, 20, 70])
def test_attention_kvcache_equals_attention(
    target: Target, dtype: torch.dtype, queries: int
) -> None:
    """Contiguous with NaN wherever nothing is held, and paged in any size: what llmops.attention
    gives for each sequence alone, the kernel's or, for Triton's, the reference in fp64."""
    lengths, leftpad = torch.tensor([75, 700, 130, 0]), torch.tensor([0, 3, 129, 0]).int()
    q = torch.randn(4, 4, queries, 24).to(dtype)
    caches = [torch.randn(4, 2, 710, 24).to(dtype) for _ in range(2)]
    for cache in caches:
        for b in range(4):
            cache[b, :, lengths[b] :] = math.nan
            cache[b, :, : leftpad[b]] = math.nan

    def run(k_cache: Tensor, v_cache: Tensor, **kwargs: Any) -> Any:
        return llmops.attention_kvcache(
            q, k_cache, v_cache, lengths, cache_leftpad=leftpad, causal=True, return_lse=True,
            backend=target.backend, **kwargs,
        )  # fmt: skip

    with target.active():
        found = [run(*caches)]
        for page in (1, 7, 16, 64, 256, 1000):
            (k_pages, table), (v_pages, _) = (_pages(c, lengths, leftpad, page) for c in caches)
            found.append(run(k_pages, v_pages, block_table=table))
        for b in range(4):
            rows = slice(int(leftpad[b]), int(lengths[b]))
            given = (q[b : b + 1], *(c[b : b + 1, :, rows] for c in caches))
            close: dict[str, float] = {}
            backend = target.backend
            if backend == "triton":
                backend, given = "reference", tuple(x.double() for x in given)
                if dtype != torch.float32:
                    # Its weights are rounded to dtype: eps / 2 * sum p |v|, and |v| < 6 here.
                    close = {"rtol": torch.finfo(dtype).eps, "atol": 3 * torch.finfo(dtype).eps}
            out, lse = llmops.attention(*given, causal=True, return_lse=True, backend=backend)
            out, lse = out.to(dtype), lse.float()
            for got_out, got_lse in found:
                # The parts of a split sequence, and of a paged one, are rounded one by one.
                torch.testing.assert_close(got_out[b : b + 1], out, **close)
                torch.testing.assert_close(got_lse[b : b + 1], lse, rtol=1e-5, atol=1e-5)


@TARGETS
def test_attention_kvcache_strided_caches_and_lengths(target: Target) -> None:
    """Caches and lengths cut from larger buffers, heads last, pages transposed."""
    q, lengths = torch.randn(2, 6, 2, 16), torch.tensor([30, 11])
    k, v = (torch.randn(2, 3, 40, 16) for _ in range(2))
    table = torch.tensor([[3, 0], [1, 5]])
    gapped_table = torch.full((2, 5), 10**9).int()
    gapped_table[:, 1:4:2] = table.int()
    pages = [torch.randn(6, 3, 16, 16) for _ in range(2)]
    with target.active():
        for caches, kwargs in (((k, v), {}), (pages, {"block_table": table})):
            want = llmops.attention_kvcache(q, *caches, lengths, backend=target.backend, **kwargs)
            turned = []
            for cache in caches:
                blocks, heads, rows, dim = cache.shape
                buffer = torch.full((rows + 2, blocks, heads + 1, dim + 3), math.nan)
                turned.append(buffer[1:-1, :, 1:, 2 : dim + 2].permute(1, 2, 0, 3).copy_(cache))
            if kwargs:
                kwargs = {"block_table": gapped_table[:, 1:4:2]}
            got = llmops.attention_kvcache(
                q.transpose(1, 2).contiguous().transpose(1, 2), *turned,
                torch.stack((lengths, -lengths), 1)[:, 0], backend=target.backend, **kwargs,
            )  # fmt: skip
            assert isinstance(got, Tensor) and isinstance(want, Tensor)
            torch.testing.assert_close(got, want, rtol=0, atol=0)


@TARGETS
def test_attention_kvcache_bits_do_not_depend_on_threads(target: Target) -> None:
    """Decode over unequal lengths, long ones split; a chunk of tiles."""
    for queries in (1, 40):
        q, lengths = torch.randn(3, 8, queries, 64), torch.tensor([4000, 60, 2500])
        k, v = (torch.randn(3, 2, 4000, 64) for _ in range(2))
        results, before = [], torch.get_num_threads()
        try:
            for threads in (1, 2, 3, 2):
                torch.set_num_threads(threads)
                with target.active():
                    results.append(
                        llmops.attention_kvcache(
                            q, k, v, lengths, causal=True, return_lse=True, backend=target.backend
                        )
                    )
        finally:
            torch.set_num_threads(before)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_attention_kvcache_gradients_are_those_of_the_reference() -> None:
    """For inference; a gradient that is asked for is right all the same."""
    lengths = torch.tensor([5, 9])
    tensors = [torch.randn(2, h, t, 8, requires_grad=True) for h, t in ((4, 3), (2, 9), (2, 9))]
    results = []
    for backend in ("cpu", "reference"):
        out = llmops.attention_kvcache(*tensors, lengths, causal=True, backend=backend)
        assert isinstance(out, Tensor)
        results.append(torch.autograd.grad(out.square().sum(), tensors))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")
def test_attention_kvcache_of_triton_gives_nan_out_of_range() -> None:
    """Nothing raises there: what cannot be read gives NaN, in its sequence and its queries only."""
    q, pages = torch.randn(2, 4, 2, 8), torch.randn(6, 2, 4, 8)
    k = torch.randn(2, 2, 20, 8)

    def call(*arguments: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        found = llmops.attention_kvcache(
            q, *arguments, causal=True, return_lse=True, backend="triton", **kwargs
        )
        return found  # type: ignore[return-value]

    want = call(k, k, torch.tensor([7, 20]))
    for lengths, pads in (([7, 21], [0, 0]), ([7, -1], [0, 0]), ([7, 20], [0, 21]),
                          ([7, 2**40], [0, 0]), ([7, 20], [0, -1])):  # fmt: skip
        got = call(k, k, torch.tensor(lengths), cache_leftpad=torch.tensor(pads))
        for a, b in zip(got, want, strict=True):
            assert bool(a[1].isnan().all())
            torch.testing.assert_close(a[0], b[0])
    table = torch.tensor([[0, 1], [2, 4]])
    want = call(pages, pages, torch.tensor([8, 5]), block_table=table)
    for bad in (6, -1, 2**40):
        table[1, 1] = bad
        got = call(pages, pages, torch.tensor([8, 5]), block_table=table)
        for a, b in zip(got, want, strict=True):
            # Row 4 is the last query's only: the one before it does not see that block.
            assert bool(a[1, :, 1].isnan().all())
            torch.testing.assert_close(a[0], b[0])
            torch.testing.assert_close(a[1, :, 0], b[1, :, 0])


@pytest.mark.parametrize("backend", ["cpu", "reference", None])
def test_attention_kvcache_rejects_bad_input(backend: str | None) -> None:
    q, k, pages = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 20, 8), torch.randn(5, 2, 4, 8)
    lengths, table = torch.tensor([3, 20]), torch.tensor([[0, 1], [2, 4]])

    def call(*arguments: Any, **kwargs: Any) -> Any:
        return llmops.attention_kvcache(*arguments, backend=backend, **kwargs)

    with pytest.raises(TypeError, match="attention_kvcache: scale must be a number"):
        call(q, k, k, lengths, scale=True)
    with pytest.raises(ValueError, match="cache_seqlens holds 21 for sequence 1, expected 0 to 20"):
        call(q, k, k, lengths + 1)
    with pytest.raises(ValueError, match="cache_seqlens holds -1 for sequence 0"):
        call(q, k, k, torch.tensor([-1, 2]).int())
    with pytest.raises(ValueError, match="cache_leftpad holds 4 for sequence 0, expected 0 to its"):
        call(q, k, k, lengths, cache_leftpad=torch.tensor([4, 0]))
    with pytest.raises(ValueError, match="holds 9 for sequence 0, expected 0 to 8"):
        call(q, pages, pages, torch.tensor([9, 1]), block_table=table)
    for bad in (5, -1, 2**40):
        table[1, 1] = bad
        with pytest.raises(IndexError, match=f"block_table holds {bad}, but the cache has 5"):
            call(q, pages, pages, torch.tensor([8, 5]), block_table=table)
        out = call(q, pages, pages, torch.tensor([8, 4]), block_table=table)  # that one not read
        assert bool(out.isfinite().all())
    with pytest.raises(ValueError, match=r"block_table must be \[2, any\]; got shape \(3, 2\)"):
        call(q, pages, pages, lengths, block_table=torch.zeros(3, 2).int())
    with pytest.raises(TypeError, match="cache_seqlens must be an int64 or int32 Tensor"):
        call(q, k, k, lengths.float())
    with pytest.raises(TypeError, match="cache_seqlens must be an int64 or int32 Tensor; got 3"):
        call(q, k, k, 3)
    with pytest.raises(ValueError, match=r"cache_seqlens must be \[2\]; got shape \(1,\)"):
        call(q, k, k, lengths[:1])
    with pytest.raises(ValueError, match=r"k_cache must be .*B=2 and D=8.*block_table"):
        call(q, pages, pages, lengths)
    with pytest.raises(ValueError, match="v_cache must have k_cache's first sizes"):
        call(q, k, k[:, :, :19], lengths)
    with pytest.raises(ValueError, match="q has 4 heads, which is no multiple of k_cache's 3"):
        call(q, *[torch.randn(2, 3, 20, 8)] * 2, lengths)
    with pytest.raises(TypeError, match="k_cache has dtype bfloat16 and q float32"):
        call(q, k.bfloat16(), k, lengths)
    with pytest.raises(ValueError, match=r"window must be \(left, right\)"):
        call(q, k, k, lengths, window=3)
    with pytest.raises(ValueError, match="a page of k_cache must hold at least one key"):
        call(q, pages[:, :, :0], pages[:, :, :0], lengths, block_table=table)
