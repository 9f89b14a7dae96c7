"""kv_cache_append_: which rows it writes, to the bit, and that an error writes none."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

import llmops
from llmops.testing import Make, Target, targets
from llmops.testing.specs.kv_cache_append_ import schemas

TARGETS = pytest.mark.parametrize("target", targets("kv_cache_append_"), ids=str)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
INTEGERS = pytest.mark.parametrize("integer", [torch.int64, torch.int32], ids=str)


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


def _new(tokens: int, dtype: torch.dtype, layout: str) -> list[Tensor]:
    """k [3, 2, T, 8] and v [3, 2, T, 6]; as one projection [B, T, H, D] would hold them."""
    made = [torch.randn(3, tokens, 2, d).to(dtype).transpose(1, 2) for d in (8, 6)]
    return made if layout == "token major" else [x.contiguous() for x in made]


def _spread(cache: Tensor, layout: str) -> Tensor:
    """The same cache, head- or token-major, or with a last dimension that is not dense."""
    if layout == "token major":
        return cache.transpose(1, 2).contiguous().transpose(1, 2)
    return cache.transpose(1, 3).contiguous().transpose(1, 3) if layout == "dim first" else cache


@TARGETS
@DTYPES
@INTEGERS
@pytest.mark.parametrize("layout", ["heads first", "token major", "dim first"])
@pytest.mark.parametrize("tokens", [0, 1, 5, 300])
def test_kv_cache_append_writes_its_rows_only(
    target: Target, dtype: torch.dtype, integer: torch.dtype, layout: str, tokens: int
) -> None:
    start = torch.tensor([0, 7, 3]).to(integer)
    k, v = _new(tokens, dtype, layout)
    caches = [_spread(torch.randn(3, 2, 320, d).to(dtype), layout) for d in (8, 6)]
    want = [c.clone() for c in caches]
    for cache, new in zip(want, (k, v), strict=True):
        for b in range(3):
            cache[b, :, start[b] : start[b] + tokens] = new[b]
    with target.active():
        got = llmops.kv_cache_append_(*caches, k, v, start, backend=target.backend)
    assert got[0] is caches[0] and got[1] is caches[1]
    assert all(_same(a, b) for a, b in zip(caches, want, strict=True))
    assert start.tolist() == [0, 7, 3], "cache_seqlens is not advanced"


@TARGETS
@DTYPES
@INTEGERS
@pytest.mark.parametrize("page", [1, 4, 7, 16])
def test_kv_cache_append_paged(
    target: Target, dtype: torch.dtype, integer: torch.dtype, page: int
) -> None:
    """Row r of a sequence is row r % page of its block r // page; all else keeps its bits."""
    tokens, start, width = 9, torch.tensor([0, 7, 3]).to(integer), -(-16 // page)
    table = torch.randperm(3 * width + 2)[: 3 * width].view(3, width).to(integer)
    k, v = _new(tokens, dtype, "token major")
    caches = [torch.full((3 * width + 2, 2, page, d), torch.nan, dtype=dtype) for d in (8, 6)]
    with target.active():
        llmops.kv_cache_append_(*caches, k, v, start, block_table=table, backend=target.backend)
    for cache, new in zip(caches, (k, v), strict=True):
        for b in range(3):
            rows = cache[table[b].long()].transpose(0, 1).flatten(1, 2)
            begin = int(start[b])
            assert torch.equal(rows[:, begin : begin + tokens], new[b])
            assert bool(rows[:, :begin].isnan().all() and rows[:, begin + tokens :].isnan().all())
        assert int((~cache.isnan()).sum()) == new.numel()


@pytest.mark.parametrize("backend", ["cpu", "reference", None])
def test_kv_cache_append_errors_change_nothing(backend: str) -> None:
    k, v = _new(4, torch.float32, "heads first")
    caches = [torch.randn(3, 2, 16, d) for d in (8, 6)]
    pages = [torch.randn(8, 2, 4, d) for d in (8, 6)]
    table = torch.tensor([[0, 1, 2], [3, 4, -1], [5, 6, 7]])
    before = [x.clone() for x in (*caches, *pages)]

    def call(given: list[Tensor], start: Any, **kwargs: Any) -> None:
        llmops.kv_cache_append_(*given, k, v, torch.tensor(start), backend=backend, **kwargs)

    with pytest.raises(ValueError, match="sequence 2 holds 13 keys and 4 more do not fit the 16"):
        call(caches, [0, 12, 13])
    with pytest.raises(ValueError, match="sequence 0 holds -1 keys"):
        call(caches, [-1, 12, 12])
    with pytest.raises(ValueError, match="sequence 1 holds 9 keys and 4 more do not fit the 12"):
        call(pages, [0, 9, 0], block_table=table)
    with pytest.raises(IndexError, match="block_table holds -1, but the cache has 8"):
        call(pages, [0, 8, 0], block_table=table)
    with pytest.raises(IndexError, match=f"block_table holds {2**33}"):
        call(pages, [0, 0, 2], block_table=table.clone().index_fill_(1, torch.tensor([1]), 2**33))
    with pytest.raises(ValueError, match="maps block 3 to two places"):
        call(pages, [0, 0, 0], block_table=table[[0, 1, 1]])
    with pytest.raises(ValueError, match="holds an element twice"):
        call([c[:1].expand(3, -1, -1, -1) for c in caches], [0, 0, 0])
    with pytest.raises(ValueError, match=r"k_cache must be \[3, 2, Tmax, 8\]"):
        call([c[:2] for c in caches], [0, 0, 0])
    with pytest.raises(TypeError, match="v_cache has dtype bfloat16 and k_cache float32"):
        call([caches[0], caches[1].bfloat16()], [0, 0, 0])
    with pytest.raises(RuntimeError, match=r"requires a gradient.*torch.no_grad\(\)"):
        call([c.detach().requires_grad_() for c in caches], [0, 0, 0])
    assert all(torch.equal(a, b) for a, b in zip((*caches, *pages), before, strict=True))
    # A shared prefix is no clash: those blocks are only read.
    call(pages, [4, 4, 4], block_table=torch.tensor([[0, 1], [0, 2], [0, 3]]))


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")
def test_kv_cache_append_of_triton_writes_nothing_out_of_range() -> None:
    """Nothing raises there: a sequence that does not fit is left out, as is a row of no block."""
    k, v = _new(4, torch.float32, "heads first")

    def call(caches: list[Tensor], start: list[int], table: Tensor | None = None) -> list[Tensor]:
        given = [c.clone() for c in caches]
        llmops.kv_cache_append_(
            *given, k, v, torch.tensor(start), block_table=table, backend="triton"
        )
        return given

    caches = [torch.randn(3, 2, 16, d) for d in (8, 6)]
    for bad in (13, 16, 2**40, -1, -(2**40)):
        for cache, got, new in zip(caches, call(caches, [0, bad, 12]), (k, v), strict=True):
            want = cache.clone()
            want[0, :, :4], want[2, :, 12:] = new[0], new[2]
            assert torch.equal(got, want)
    pages = [torch.randn(8, 2, 4, d) for d in (8, 6)]
    for bad in (8, -1, 2**33, -(2**33)):
        table = torch.tensor([[0, 1, 2], [3, 4, bad], [5, 6, 7]])
        # Sequence 0 does not fit the table's 12 rows; the last two rows of 1 have no block.
        for cache, got, new in zip(pages, call(pages, [9, 6, 0], table), (k, v), strict=True):
            want = cache.clone()
            want[4, :, 2:], want[5] = new[1, :, :2], new[2]
            assert torch.equal(got, want)


def test_kv_cache_append_is_seen_by_autograd() -> None:
    """A tensor that was saved before the cache changed is refused, not silently wrong."""
    k, v = _new(1, torch.float32, "heads first")
    caches = [torch.zeros(3, 2, 4, d) for d in (8, 6)]
    x = torch.randn(3, 2, 4, 8, requires_grad=True)
    y = (x * caches[0]).sum()
    with torch.no_grad():
        llmops.kv_cache_append_(*caches, k, v, torch.tensor([0, 1, 2]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_kv_cache_append_refuses_transforms() -> None:
    caches, new, lengths = (
        torch.zeros(3, 2, 2, 8, 4),
        torch.randn(3, 2, 2, 3, 4),
        torch.ones(2).int(),
    )

    def append(cache: Tensor, new: Tensor) -> Tensor:
        return llmops.kv_cache_append_(cache, cache.clone(), new, new, lengths)[0]

    with pytest.raises(NotImplementedError, match="vmap does not follow"):
        torch.func.vmap(append)(caches, new)
    with pytest.raises(NotImplementedError, match="forward-mode AD does not follow"):
        torch.func.jvp(lambda x: append(caches[0], x), (new[0],), (new[0],))
    assert not caches.any()


def test_kv_cache_append_opcheck_and_compile() -> None:
    arguments = schemas(Make(torch.float32))["kv_cache_append_"]
    torch.library.opcheck(torch.ops.llmops.kv_cache_append_.default, arguments)
    *tensors, table, _ = arguments
    eager = [t.clone() for t in tensors]
    with torch.no_grad():
        llmops.kv_cache_append_(*eager, block_table=table)
        compiled = torch.compile(llmops.kv_cache_append_, fullgraph=True, backend="aot_eager")
        compiled(*tensors, block_table=table)
    assert all(torch.equal(a, b) for a, b in zip(tensors, eager, strict=True))
