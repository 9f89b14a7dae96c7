"""flash_attn_with_kvcache: flash-attn's argument combinations, sequence by sequence against plain
PyTorch, results and what the caches hold afterwards."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from flash_attn_kit import DTYPES, HEADS, attend, by_dtype, describe, rotate
from torch import Tensor

import llmops
from llmops.integrations.flash_attn import flash_attn_with_kvcache
from llmops.testing import assert_close

pytestmark = pytest.mark.usefixtures("one_thread")
BATCH = 2
# (Tq, cache length), head dim: a decode step, a few tokens, a chunk, more queries than held keys.
SIZES = ((1, 40), (3, 61), (16, 50), (1, 128), (8, 33), (3, 16), (25, 32))
DIMS = (32, 59, 64, 80, 48)
KINDS = ("plain", "leftpad", "batch_idx", "batch_idx-leftpad", "paged", "paged-leftpad")
ROTARY_FORMS = ((0.0, True), (0.5, True), (0.5, False), (1.0, True), (1.0, False))
# No new keys; new ones: as many as queries or fewer, and rotary (fraction of the head, pairs).
NEW = (None, *itertools.product((True, False), ROTARY_FORMS))


@dataclass
class Caches:
    """Keys and values [B, N, Hkv, D] as the call sees them, and the arguments that lead there."""

    k: Tensor
    v: Tensor
    arguments: dict[str, Any]

    def rows(self, which: Tensor, b: int) -> Tensor:
        """[N, Hkv, D] of sequence b."""
        if "block_table" in self.arguments:
            return which[self.arguments["block_table"][b].long()].flatten(0, 1)
        index = self.arguments.get("cache_batch_idx")
        return which[b if index is None else int(index[b])]


def make_caches(kind: str, length: int, heads: int, dim: int, dtype: torch.dtype) -> Caches:
    if "paged" in kind:
        page = 16
        columns = -(-length // page)
        free = torch.randperm(3 * BATCH * columns).int()
        k, v = torch.randn(2, len(free), page, heads, dim).to(dtype)
        return Caches(k, v, {"block_table": free[: BATCH * columns].view(BATCH, columns)})
    rows = 2 * BATCH if "batch_idx" in kind else BATCH
    k, v = torch.randn(2, rows, length, heads, dim).to(dtype)
    return Caches(
        k, v, {"cache_batch_idx": torch.randperm(rows)[:BATCH].int()} if rows > BATCH else {}
    )


@by_dtype
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("kind", KINDS)
def test_flash_attn_with_kvcache_combinations(kind: str, heads: str, dtype: torch.dtype) -> None:
    """alibi, local, causal, new keys and their number, rotary: each combination, in one of the
    three dtypes."""
    torch.manual_seed(0)
    flags = itertools.product((False, True), repeat=3)
    every = enumerate(itertools.product(flags, NEW))
    for n, ((alibi, local, causal), new) in itertools.islice(every, DTYPES.index(dtype), None, 3):
        queries, length = SIZES[n % len(SIZES)]
        check(kind, heads, dtype, alibi, local, causal, new, queries, length, DIMS[n % len(DIMS)])


def check(
    kind: str, heads: str, dtype: torch.dtype, alibi: bool, local: bool, causal: bool, new: Any,
    queries: int, length: int, dim: int,
) -> None:  # fmt: skip
    hq, hkv = HEADS[heads]
    caches = make_caches(kind, length, hkv, dim, dtype)
    q = torch.randn(BATCH, queries, hq, dim).to(dtype)
    tokens = 0
    arguments: dict[str, Any] = {"causal": causal, **caches.arguments}
    if new is not None:
        same_number, (fraction, interleaved) = new
        tokens = queries if same_number else int(torch.randint(1, queries + 1, ()))
        k, v = torch.randn(2, BATCH, tokens, hkv, dim).to(dtype)
        arguments |= {"k": k, "v": v, "rotary_interleaved": interleaved}
        half = int(fraction * dim) // 16 * 8
        if half:
            angle = torch.rand(length + queries, half, dtype=torch.float64) * 6.3
            arguments |= {"rotary_cos": angle.cos().to(dtype), "rotary_sin": angle.sin().to(dtype)}
    held = torch.randint(0 if tokens else 1, length - tokens + 1, (BATCH,), dtype=torch.int32)
    arguments["cache_seqlens"] = held
    leftpad = [0] * BATCH
    if "leftpad" in kind:
        leftpad = [int(torch.randint(0, int(h) + 1, ())) if h else 0 for h in held]
        arguments["cache_leftpad"] = torch.tensor(leftpad, dtype=torch.int32)
    if alibi:
        arguments["alibi_slopes"] = torch.rand(BATCH, hq) * 0.3
    if local:
        arguments["window_size"] = tuple(torch.randint(0, length, (2,)))
    # What is no key is NaN: read once, it would show.
    for b in range(BATCH):
        for cache in (caches.k, caches.v):
            rows = caches.rows(cache, b).clone()
            rows[: leftpad[b]], rows[int(held[b]) :] = math.nan, math.nan
            write(caches, cache, b, rows)
    wanted = [
        expected(q, caches, arguments, held, leftpad, tokens, d) for d in (torch.float64, dtype)
    ]
    what = f"{queries}x{length}x{dim} {describe(arguments)}"
    results = []
    for num_splits in (0, 1, 4):
        k_cache, v_cache = caches.k.clone(), caches.v.clone()
        with llmops.use_backend("cpu"):
            out, lse = flash_attn_with_kvcache(
                q, k_cache, v_cache, **arguments, num_splits=num_splits, return_softmax_lse=True
            )
        results.append((out, lse, k_cache, v_cache))
    for other in results[1:]:
        assert all(same(a, b) for a, b in zip(results[0], other, strict=True)), what
    out, lse, k_cache, v_cache = results[0]
    assert out.shape == q.shape and lse.shape == (BATCH, hq, queries) and lse.dtype == torch.float32
    (out_o, lse_o, k_o, v_o), (out_y, lse_y, k_y, _) = wanted
    # 3 as flash-attn allows here: the rotation rounds before the attention does.
    assert_close(out, out_o, out_y, factor=3.0, what=f"{what}: out")
    lses = (x.flatten() for x in (lse, lse_o, lse_y))
    assert_close(*lses, factor=3.0, what=f"{what}: lse")  # as one row: it may cancel to near zero
    assert same(v_cache, v_o.to(dtype)), what
    assert_close(k_cache, k_o, k_y, factor=2.0, what=f"{what}: k_cache")


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def write(caches: Caches, cache: Tensor, b: int, rows: Tensor) -> None:
    if "block_table" in caches.arguments:
        table = caches.arguments["block_table"][b].long()
        cache[table] = rows.unflatten(0, (len(table), -1))
    else:
        index = caches.arguments.get("cache_batch_idx")
        cache[b if index is None else int(index[b])] = rows


def expected(
    q: Tensor, caches: Caches, arguments: dict[str, Any], held: Tensor, leftpad: list[int],
    tokens: int, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """out, lse and the caches after the call, computed in `dtype`."""
    k_cache, v_cache = caches.k.to(dtype), caches.v.to(dtype)
    causal, window = arguments["causal"], arguments.get("window_size", (-1, -1))
    outs, lses = [], []
    for b, start in enumerate(held.tolist()):
        own = q[b : b + 1].to(dtype)
        if tokens:
            k, v = (arguments[name][b : b + 1].to(dtype) for name in "kv")
            if "rotary_cos" in arguments:
                # (No complex bf16: the rotation in fp32, rounded.)
                wide = torch.float64 if dtype == torch.float64 else torch.float32
                tables = [arguments[f"rotary_{f}"].to(wide) for f in ("cos", "sin")]
                steps = torch.arange(q.shape[1])
                if not causal and "window_size" not in arguments:
                    steps = steps * 0
                pairs = arguments["rotary_interleaved"]
                own = rotate(own.to(wide), *tables, (start + steps)[None], pairs).to(dtype)
                at = torch.arange(start, start + tokens)[None]
                k = rotate(k.to(wide), *tables, at, pairs).to(dtype)
            for cache, x in ((k_cache, k), (v_cache, v)):
                rows = caches.rows(cache, b).clone()
                rows[start : start + tokens] = x[0]
                write(caches, cache, b, rows)
        keys, values = (
            caches.rows(cache, b)[None, leftpad[b] : start + tokens] for cache in (k_cache, v_cache)
        )
        slopes = arguments.get("alibi_slopes")
        out, lse = attend(
            own, keys, values, causal=causal, window_size=window,
            alibi_slopes=None if slopes is None else slopes[b],
        )  # fmt: skip
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses), k_cache, v_cache


def test_flash_attn_with_kvcache_lengths_as_int_and_none() -> None:
    torch.manual_seed(0)
    q, (k, v) = torch.randn(3, 1, 4, 32), torch.randn(2, 3, 20, 2, 32)
    with torch.no_grad():
        for length, tensor in ((7, 7), (None, 20)):
            got = flash_attn_with_kvcache(q, k, v, cache_seqlens=length)
            want = flash_attn_with_kvcache(q, k, v, cache_seqlens=torch.full((3,), tensor))
            assert isinstance(got, Tensor) and torch.equal(got, want)


def test_flash_attn_with_kvcache_sequences_share_a_row() -> None:
    """Where nothing is written: parallel samples of one prompt."""
    torch.manual_seed(0)
    q, (k, v) = torch.randn(3, 2, 4, 32), torch.randn(2, 2, 20, 2, 32)
    index = torch.tensor([1, 0, 1])
    got = flash_attn_with_kvcache(q, k, v, cache_seqlens=13, cache_batch_idx=index, causal=True)
    want = flash_attn_with_kvcache(q, k[index], v[index], cache_seqlens=13, causal=True)
    assert isinstance(got, Tensor) and isinstance(want, Tensor) and torch.equal(got, want)


@pytest.mark.parametrize("append", [False, True])
def test_flash_attn_with_kvcache_block_table_bounds(append: bool) -> None:
    """A length beyond what the block table addresses raises, and the cache is untouched; one that
    fills it is served."""
    pages = torch.randn(4, 16, 1, 32)
    table = torch.zeros(1, 1, dtype=torch.int32)
    q, new = torch.randn(1, 1, 1, 32), torch.randn(1, 1, 1, 32)
    arguments: dict[str, Any] = {"k": new, "v": new} if append else {}
    before = pages.clone()
    too_long = torch.tensor([16 if append else 17], dtype=torch.int32)
    with pytest.raises(ValueError, match="cache"):
        flash_attn_with_kvcache(
            q, pages, pages.clone(), cache_seqlens=too_long, block_table=table, **arguments
        )
    assert torch.equal(pages, before)
    out = flash_attn_with_kvcache(
        q, pages, pages.clone(), cache_seqlens=too_long - 1, block_table=table, **arguments
    )
    assert bool(out.isfinite().all())  # type: ignore[union-attr]


Q, C, NEW_KEY = torch.zeros(2, 1, 4, 16), torch.zeros(3, 8, 2, 16), torch.zeros(2, 1, 2, 16)
C3, ROWS, ROTARY = torch.zeros(3, 8, 3, 16), torch.tensor([0, 1]), torch.ones(9, 8)
APPEND = {"k": NEW_KEY, "v": NEW_KEY, "cache_seqlens": 1}


@pytest.mark.parametrize(
    ("error", "match", "kwargs"),
    [
        (ValueError, "q must be", {"q": Q[0]}),
        (ValueError, r"k_cache must be \[C, N", {"k_cache": C[0]}),
        (ValueError, r"v_cache", {"v_cache": C[:, :5]}),
        (TypeError, "k_cache has dtype", {"k_cache": C.half()}),
        (ValueError, "head dim", {"k_cache": C[..., :8]}),
        (ValueError, "heads", {"k_cache": C3, "v_cache": C3}),
        (ValueError, "stride 1", {"k_cache": torch.zeros(3, 8, 2, 32)[..., ::2]}),
        (ValueError, "k_cache has 1 rows", {"k_cache": C[:1], "v_cache": C[:1]}),
        (ValueError, "k and v", {"k": NEW_KEY}),
        (ValueError, "k and v must agree", {**APPEND, "v": NEW_KEY[:, :, :1]}),
        (ValueError, "k must be", {"k": NEW_KEY[:1], "v": NEW_KEY[:1], "cache_seqlens": 1}),
        (ValueError, "cache_seqlens must be given", {"k": NEW_KEY, "v": NEW_KEY}),
        (ValueError, "8", {"k": NEW_KEY, "v": NEW_KEY, "cache_seqlens": 8}),
        (ValueError, "cache_seqlens", {"cache_seqlens": 9}),
        (ValueError, "cache_seqlens", {"cache_seqlens": -1}),
        (ValueError, "cache_seqlens", {"cache_seqlens": torch.tensor([1, 1, 1])}),
        (TypeError, "cache_seqlens", {"cache_seqlens": torch.ones(2)}),
        (TypeError, "cache_seqlens", {"cache_seqlens": 3.5}),
        (IndexError, "cache_batch_idx", {"cache_batch_idx": torch.tensor([0, 3])}),
        (IndexError, "cache_batch_idx", {"cache_batch_idx": torch.tensor([0, -1])}),
        (ValueError, "cache_batch_idx", {"cache_batch_idx": torch.tensor([0])}),
        (ValueError, "cache_batch_idx", {"cache_batch_idx": ROWS, "block_table": ROWS[:, None]}),
        (ValueError, "each row once", {**APPEND, "cache_batch_idx": ROWS * 0}),
        (ValueError, "cache_leftpad", {"cache_leftpad": torch.tensor([0, 9])}),
        (IndexError, "block_table", {"block_table": torch.tensor([[0], [3]])}),
        (ValueError, "block_table", {"block_table": torch.tensor([0, 1])}),
        (ValueError, "rotary_cos", {"rotary_cos": ROTARY, "rotary_sin": ROTARY}),
        (ValueError, "rotary_sin", {"rotary_cos": ROTARY, **APPEND}),
        (IndexError, "pos", {"rotary_cos": ROTARY[:1], "rotary_sin": ROTARY[:1], **APPEND}),
        (ValueError, "num_splits", {"num_splits": 129}),
        (ValueError, "num_splits", {"num_splits": -1}),
        (ValueError, "softcap", {"softcap": -1.0}),
        (ValueError, "window_size", {"window_size": (1,)}),
        (ValueError, "alibi_slopes", {"alibi_slopes": torch.ones(2)}),
        (RuntimeError, "q requires a gradient", {"q": Q.clone().requires_grad_()}),
    ],
)  # fmt: skip
def test_flash_attn_with_kvcache_refuses(error: Any, match: str, kwargs: dict[str, Any]) -> None:
    with pytest.raises(error, match=match):
        flash_attn_with_kvcache(**{"q": Q, "k_cache": C, "v_cache": C.clone(), **kwargs})
