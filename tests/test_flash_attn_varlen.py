"""flash_attn_varlen_func and its packed forms: flash-attn's argument combinations, sequence by
sequence against plain PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flash_attn_kit import (
    HEADS,
    attend,
    by_dtype,
    check,
    check_dropped,
    combinations,
    describe,
    modifiers,
)
from torch import Tensor

import llmops
from llmops.integrations.flash_attn import (
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)

pytestmark = pytest.mark.usefixtures("one_thread")
# Tokens of each sequence: queries and keys. Empty ones are among them.
QUERIES = ((13, 1, 0, 27), (31, 16, 9, 32), (5, 40, 1, 0), (64, 3, 20, 11))
KEYS = ((23, 9, 4, 29), (32, 16, 21, 31), (0, 33, 16, 7), (50, 12, 20, 40))
DIMS = (32, 59, 64, 40, 111)


def starts(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def of_sequence(arguments: dict[str, Any], b: int) -> dict[str, Any]:
    slopes = arguments.get("alibi_slopes")
    return {**arguments, "alibi_slopes": None if slopes is None else slopes[b]}


def plain(lengths: Any, arguments: dict[str, Any], keep: list[Tensor], *qkv: Tensor) -> Any:
    """Each sequence by itself; with slopes and dropped weights of its own."""
    outs, lses = [], []
    split = (x.split(n) for x, n in zip(qkv, (lengths[0], lengths[1], lengths[1]), strict=True))
    for b, (q, k, v) in enumerate(zip(*split, strict=True)):
        own = of_sequence(arguments, b)
        if keep:
            own["keep"] = keep[0][b : b + 1, :, : len(q), : len(k)].to(q.dtype)
        out, lse = attend(q[None], k[None], v[None], **own)
        outs.append(out[0])
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, 1)


def check_varlen(
    fn: Any, split: Any, inputs: tuple[Tensor, ...], boundaries: Any, lengths: Any,
    arguments: dict[str, Any], extra: dict[str, Any],
) -> None:  # fmt: skip
    """fn(*inputs, *boundaries) against `plain`; `split` makes q, k, v of the inputs."""
    keep: list[Tensor] = []
    dropout_p = extra["dropout_p"]

    def shim(*x: Tensor) -> Any:
        with llmops.use_backend("cpu"):
            out, lse, dropped = fn(*x, *boundaries, **arguments, **extra, return_attn_probs=True)
        heads = split(*x)[0].shape[1]
        shape = (len(lengths[0]), heads, max(lengths[0]), max(lengths[1]))
        assert dropped.shape == (shape if dropout_p else (0,))
        if dropout_p:
            keep[:] = [(dropped >= 0) / (1 - dropout_p)]
            fraction = float((dropped < 0).sum() / (dropped != 0).sum())
            assert abs(fraction - dropout_p) < 0.06, fraction
            q, k, _ = split(*x)
            pairs = zip(q.split(lengths[0]), k.split(lengths[1]), strict=True)
            for b, (qb, kb) in enumerate(pairs):
                own = of_sequence(arguments, b)
                check_dropped(dropped[b : b + 1, :, : len(qb), : len(kb)], qb[None], kb[None], own)
                assert not dropped[b, :, len(qb) :].any() and not dropped[b, :, :, len(kb) :].any()
        return out, lse

    what = f"{lengths} {tuple(inputs[0].shape)} {describe(arguments, extra)}"
    check(shim, lambda *x: plain(lengths, arguments, keep, *split(*x)), inputs, what)


@by_dtype
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("packed", [False, True], ids=["separate", "kvpacked"])
def test_flash_attn_varlen_func_combinations(dtype: torch.dtype, heads: str, packed: bool) -> None:
    torch.manual_seed(0)
    hq, hkv = HEADS[heads]
    pairs = tuple(zip(QUERIES, KEYS, strict=True))
    fn: Any = flash_attn_varlen_kvpacked_func if packed else flash_attn_varlen_func
    split = (lambda q, kv: (q, *kv.unbind(1))) if packed else (lambda *x: x)
    for alibi, local, arguments, extra, lengths, dim in combinations(pairs, DIMS):
        modifiers(arguments, alibi, local, hq, max(lengths[1]), batch=4)
        q = torch.randn(sum(lengths[0]), hq, dim).to(dtype) * (arguments["softcap"] or 1.0)
        kv = torch.randn(sum(lengths[1]), 2, hkv, dim).to(dtype)
        inputs = (q, kv) if packed else (q, *kv.unbind(1))
        boundaries = (*map(starts, lengths), *map(max, lengths))
        check_varlen(fn, split, inputs, boundaries, lengths, arguments, extra)


@by_dtype
def test_flash_attn_varlen_qkvpacked_func_combinations(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    split = lambda qkv: qkv.unbind(1)  # noqa: E731
    for alibi, local, arguments, extra, lengths, dim in combinations(KEYS, DIMS):
        modifiers(arguments, alibi, local, 5, max(lengths), batch=4)
        qkv = torch.randn(sum(lengths), 3, 5, dim).to(dtype)
        check_varlen(
            flash_attn_varlen_qkvpacked_func, split, (qkv,), (starts(lengths), max(lengths)),
            (lengths, lengths), arguments, extra,
        )  # fmt: skip


@by_dtype
@pytest.mark.parametrize("page", [16, 7])
@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("lengths", list(zip(QUERIES, KEYS, strict=True)), ids=str)
def test_flash_attn_varlen_func_paged(
    lengths: Any, local: bool, page: int, dtype: torch.dtype
) -> None:
    """Keys in pages, in any order; what no sequence holds is NaN and is not read."""
    torch.manual_seed(2)
    window = (int(torch.randint(3, 20, ())), 0) if local else (-1, -1)
    arguments: dict[str, Any] = {"causal": True, "window_size": window}
    q = torch.randn(sum(lengths[0]), 6, 40).to(dtype)
    k, v = torch.randn(2, sum(lengths[1]), 2, 40).to(dtype)
    columns = -(-max(lengths[1]) // page)
    free = torch.randperm(4 * columns + 3)
    table = free[: 4 * columns].view(4, columns).int()
    pages_of = (table[b].long().repeat_interleave(page)[:n] for b, n in enumerate(lengths[1]))
    at = torch.cat(list(pages_of)), torch.cat([torch.arange(n) % page for n in lengths[1]])
    for b, n in enumerate(lengths[1]):
        table[b, -(-n // page) :] = -1
    boundaries = (*map(starts, lengths), *map(max, lengths))

    def shim(q: Tensor, *kv: Tensor) -> Any:
        pages = torch.full((len(free), page, *k.shape[1:]), torch.nan, dtype=dtype)
        caches = [pages.index_put(at, x) for x in kv]
        with llmops.use_backend("cpu"):
            out, lse, _ = flash_attn_varlen_func(
                q, *caches, *boundaries, **arguments, return_attn_probs=True, block_table=table
            )
        return out, lse

    check(shim, lambda *x: plain(lengths, arguments, [], *x), (q, k, v), f"{arguments}")


def test_flash_attn_varlen_one_slope_per_head() -> None:
    torch.manual_seed(0)
    q = torch.randn(40, 3, 3, 16)
    cu, slopes = starts((17, 23)), torch.rand(3)
    got, want = (
        flash_attn_varlen_qkvpacked_func(q, cu, 23, causal=True, alibi_slopes=s)
        for s in (slopes, slopes.expand(2, -1))
    )
    assert torch.equal(got, want)


Q, K, CU = torch.zeros(6, 4, 8), torch.zeros(6, 2, 8), starts((4, 2))
PAGES, TABLE = torch.zeros(3, 4, 2, 8), torch.tensor([[0], [1]])


@pytest.mark.parametrize(
    ("error", "match", "args", "kwargs"),
    [
        (ValueError, "q must be", (Q[0], K, K, CU, CU, 4, 4), {}),
        (ValueError, "k must be", (Q, K[0], K, CU, CU, 4, 4), {}),
        (TypeError, "v has dtype", (Q, K, K.half(), CU, CU, 4, 4), {}),
        (ValueError, "head dim", (Q, K[..., :4], K[..., :4], CU, CU, 4, 4), {}),
        (TypeError, "cu_seqlens_q", (Q, K, K, [0, 6], CU, 4, 4), {}),
        (ValueError, "cu_seqlens_q", (Q, K, K, starts((4, 1)), CU, 4, 4), {}),
        (ValueError, "cu_seqlens_k", (Q, K, K, CU, starts((4, 3)), 4, 4), {}),
        (ValueError, "cu_seqlens_k", (Q, K, K, CU, starts((6,)), 4, 6), {}),
        (ValueError, "max_seqlen_q", (Q, K, K, CU, CU, 3, 4), {}),
        (ValueError, "max_seqlen_k", (Q, K, K, CU, CU, 4, 3), {}),
        (ValueError, "softcap", (Q, K, K, CU, CU, 4, 4), {"softcap": -1.0}),
        (ValueError, "alibi_slopes", (Q, K, K, CU, CU, 4, 4), {"alibi_slopes": torch.ones(3, 4)}),
        (ValueError, "k must be .* block_table", (Q, K, K, CU, CU, 4, 4), {"block_table": TABLE}),
        (ValueError, "block_table", (Q, PAGES, PAGES, CU, CU, 4, 4), {"block_table": TABLE[:1]}),
        (IndexError, "block_table", (Q, PAGES, PAGES, CU, CU, 4, 4), {"block_table": TABLE + 2}),
        (IndexError, "block_table", (Q, PAGES, PAGES, CU, CU, 4, 4), {"block_table": TABLE - 1}),
        (ValueError, "has 1", (Q, PAGES, PAGES, CU, starts((5, 1)), 4, 5), {"block_table": TABLE}),
    ],
)  # fmt: skip
def test_flash_attn_varlen_func_refuses(error: Any, match: str, args: Any, kwargs: Any) -> None:
    with pytest.raises(error, match=match):
        flash_attn_varlen_func(*args, **kwargs)
