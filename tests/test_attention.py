"""attention: the conformance kit, and what is particular to it."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import llmops
from llmops import reference
from llmops.testing import Target, assert_close, suite, targets
from llmops.testing.specs.attention import SPEC, torch_attention

globals().update(suite(SPEC))

TARGETS = pytest.mark.parametrize("target", targets("attention"), ids=str)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def _qkv(*sizes: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Any:
    """q [B, H, Tq, D], k and v [B, Hkv, Tk, D] for sizes B, H, Hkv, Tq, Tk, D."""
    batch, heads, kv_heads, queries, keys, dim = sizes
    shapes = ((batch, heads, queries, dim), *[(batch, kv_heads, keys, dim)] * 2)
    return tuple(torch.randn(s).to(dtype).requires_grad_(grad) for s in shapes)


@TARGETS
@DTYPES
def test_attention_fully_masked_rows(target: Target, dtype: torch.dtype) -> None:
    """Zeros, lse -inf and zero gradients, even where such a row's query and gradient are NaN."""
    for queries in (2, 40):  # decode, tiles
        q, k, v = _qkv(1, 1, 1, queries, 70, 24, dtype=dtype)
        mask = torch.ones(queries, 70, dtype=torch.bool)
        mask[1] = False
        q[:, :, 1] = math.nan
        q, k, v = (t.requires_grad_() for t in (q, k, v))
        for m in (mask, torch.zeros(queries, 70).masked_fill(~mask, -math.inf)):
            with target.active():
                out, lse = llmops.attention(
                    q, k, v, mask=m, return_lse=True, backend=target.backend
                )
                cotangent = torch.randn_like(out)
                cotangent[:, :, 1] = math.nan
                cotangent_lse = torch.randn_like(lse)
                cotangent_lse[:, :, 1] = math.inf
                grads = torch.autograd.grad((out, lse), (q, k, v), (cotangent, cotangent_lse))
            assert bool((out[:, :, 1] == 0).all()) and bool((lse[:, :, 1] == -math.inf).all())
            assert bool((grads[0][:, :, 1] == 0).all())
            for g in grads:
                assert bool(g.isfinite().all())


@TARGETS
@DTYPES
def test_attention_masked_keys_may_hold_anything(target: Target, dtype: torch.dtype) -> None:
    """A key that a boolean mask or -inf drops for a row changes nothing there, NaN included."""
    for queries in (1, 20):
        q, k, v = _qkv(1, 2, 1, queries, 50, 16, dtype=dtype)
        mask = torch.rand(50) < 0.6
        dirty = k.masked_fill(~mask[:, None], math.nan)
        with target.active():
            for m in (mask, torch.zeros(50, dtype=dtype).masked_fill(~mask, -math.inf)):
                want = llmops.attention(q, k, v, mask=m, backend=target.backend)
                got = llmops.attention(q, dirty, v, mask=m, backend=target.backend)
                assert torch.equal(want, got)


@TARGETS
@DTYPES
def test_attention_reads_nothing_past_the_end(target: Target, dtype: torch.dtype) -> None:
    """Rows, heads and batches cut from a larger buffer full of NaN: caches with stride gaps."""
    for queries, keys, dim in ((1, 37, 33), (3, 100, 64), (70, 83, 20)):

        def cut(heads: int, tokens: int, width: int = dim) -> Tensor:
            buffer = torch.full((2, tokens + 5, heads + 1, width + 3), math.nan, dtype=dtype)
            inner = buffer[:, 2 : tokens + 2, :heads, 1 : width + 1]
            inner.copy_(torch.randn(2, tokens, heads, width))
            return inner.transpose(1, 2)

        q, k, v = cut(4, queries), cut(2, keys), cut(2, keys)
        mask = torch.full((2, keys + 9), math.nan)[:, 4 : keys + 4].copy_(torch.randn(2, keys))
        mask = mask[:, None, None]
        leaves = [t.detach().requires_grad_() for t in (q, k, v, mask)]
        plain = [t.detach().clone().contiguous().requires_grad_() for t in (q, k, v, mask)]
        results = []
        with target.active():
            for a, b, c, m in (leaves, plain):
                out = llmops.attention(a, b, c, mask=m, causal=True, backend=target.backend)
                results.append((out, *torch.autograd.grad(out, (a, b, c, m), cut(4, queries))))
        assert bool(results[0][0].isfinite().all())
        torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=0)
        for got in results[0][1:]:
            assert bool(got.isfinite().all())


@TARGETS
@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_attention_hypothesis(target: Target, data: st.DataObject) -> None:
    """Shapes, strides, masks, groups and dtypes at random."""
    integers = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    batch, kv_heads, group = integers(1, 2), integers(1, 2), integers(1, 4)
    queries, keys = integers(1, 80), integers(1, 120)
    dim, dim_v = integers(1, 40), integers(8, 40)  # in a row of one, any sum may cancel
    dtype = data.draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16)))
    torch.manual_seed(integers(0, 1000))

    def tensor(heads: int, tokens: int, width: int) -> Tensor:
        order = data.draw(st.permutations(range(4)))
        sizes = (batch, heads, tokens, width)
        x = torch.randn([sizes[d] for d in order]).to(dtype)
        return x.permute([order.index(d) for d in range(4)]).requires_grad_()

    q = tensor(kv_heads * group, queries, dim)
    k, v = tensor(kv_heads, keys, dim), tensor(kv_heads, keys, dim_v)
    full = (batch, kv_heads * group, queries, keys)
    kind = data.draw(st.sampled_from(("none", "bool", "float")))
    mask = None
    if kind != "none":
        sizes = [data.draw(st.sampled_from((1, s))) for s in full]
        mask = torch.rand(sizes) < 0.7 if kind == "bool" else torch.randn(sizes).to(dtype)
    arguments = {"causal": data.draw(st.booleans()), "scale": data.draw(st.floats(-1, 1))}
    with target.active():
        out, lse = llmops.attention(
            q, k, v, mask=mask, return_lse=True, backend=target.backend, **arguments
        )
    wide = [t.detach().double() for t in (q, k, v)]
    wide_mask = mask.double() if kind == "float" and mask is not None else mask
    oracle = reference.attention(*wide, mask=wide_mask, return_lse=True, **arguments)
    yardstick = torch_attention(q, k, v, mask=mask, return_lse=True, **arguments)
    # A score's rounding, half an eps of |q| |k|, weighs |v|; that of 16-bit results hides it.
    sizes = wide[0].norm(dim=-1, keepdim=True) * wide[1].norm(dim=-1).amax()
    weighed = reference.attention(*wide[:2], wide[2].abs(), mask=wide_mask, **arguments)
    floor = torch.finfo(torch.float32).eps / 2 * abs(arguments["scale"]) * sizes * weighed
    assert_close(out, oracle[0], yardstick[0], factor=2.0, what="attention", floor=floor)
    torch.testing.assert_close(lse.double(), oracle[1], rtol=1e-5, atol=1e-5)


@TARGETS
def test_attention_bits_do_not_depend_on_threads(target: Target) -> None:
    """Enough work to be spread over threads: tiles, packed rows, split decode, split backward."""
    for sizes in ((1, 2, 1, 200, 300, 64), (2, 4, 2, 40, 700, 64), (1, 8, 1, 1, 4000, 64)):
        q, k, v = _qkv(*sizes, grad=True)
        mask = torch.randn(1, 1, 1, sizes[4], requires_grad=True)
        results = []
        before = torch.get_num_threads()
        try:
            for threads in (1, 2, 3, 2):
                torch.set_num_threads(threads)
                with target.active():
                    out, lse = llmops.attention(
                        q, k, v, mask=mask, causal=True, return_lse=True, backend=target.backend
                    )
                    grads = torch.autograd.grad(out.sum() + lse.sum(), (q, k, v, mask))
                results.append((out, lse, *grads))
        finally:
            torch.set_num_threads(before)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def _with_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    attend: Callable[..., Any],
    dtype: torch.dtype,
    **arguments: Any,
) -> list[Tensor]:
    inputs = [t.to(dtype).requires_grad_() for t in (q, k, v)]
    out = attend(*inputs, **arguments)
    return [out, *torch.autograd.grad(out, inputs, grad.to(dtype))]


@TARGETS
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_attention_of_long_sequences(target: Target, dtype: torch.dtype) -> None:
    """Several blocks of queries and of keys, whole and cut, and heads that share them: fp32 is as
    exact as torch's also where it is made of three bf16 parts (AMX)."""
    generator = torch.Generator().manual_seed(3)
    for heads, kv_heads, queries, keys, dim, dim_v, causal, window in (
        (2, 1, 515, 515, 64, 64, True, None),
        (1, 1, 130, 700, 33, 20, False, None),
        (7, 1, 40, 529, 80, 100, True, None),
        # A key block begins where one of two vectors of queries has ended.
        (2, 2, 321, 521, 130, 16, True, None),
        # Blocks of keys that begin before a block of queries does.
        (1, 1, 300, 530, 40, 64, True, (50, 0)),
    ):
        shapes = ((heads, queries, dim), (kv_heads, keys, dim), (kv_heads, keys, dim_v))
        q, k, v = (torch.randn(1, *s, generator=generator).to(dtype) for s in shapes)
        grad = torch.randn(1, heads, queries, dim_v, generator=generator).to(dtype)
        mask = torch.rand(1, 1, queries, keys, generator=generator) < 0.7
        mask[:, :, 7] = False
        for added in (None, mask):
            arguments = {"causal": causal, "window": window, "mask": added}
            run = partial(_with_gradients, q, k, v, grad, **arguments)
            exact, theirs = run(reference.attention, torch.float64), run(torch_attention, dtype)
            with target.active():
                got = run(partial(llmops.attention, backend=target.backend), dtype)
            assert_close(got[0], exact[0], theirs[0], factor=2.0, what="out")
            # P comes from lse, which fp32 rounds by up to 2^-22 where it is 4 to 8, and by exp2,
            # 1.6 ULP (csrc/cpu/simd_math.h): a row of P is off by up to 2^-21, and so is all that
            # it adds to gradients, most of which may cancel.
            eps = max(torch.finfo(dtype).eps, 2.0**-21)
            for i, name in enumerate(("dq", "dk", "dv"), 1):
                g, o, y = (results[i].flatten() for results in (got, exact, theirs))
                assert_close(g, o, y, factor=2.0, what=name, eps=eps)


def assert_forward(target: Target, qkv: tuple[Tensor, ...], what: str, **arguments: Any) -> None:
    """out is as close to fp64 as the error rule asks."""
    exact = reference.attention(*(t.double() for t in qkv), **arguments)
    theirs = torch_attention(*qkv, **arguments)
    with target.active():
        got = llmops.attention(*qkv, backend=target.backend, **arguments)
    assert isinstance(got, Tensor)
    assert_close(got, exact, theirs, factor=2.0, what=what)


@pytest.mark.parametrize("target", [t for t in targets("attention") if t.backend == "cpu"], ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_attention_of_blocks_that_share_keys(target: Target, dtype: torch.dtype) -> None:
    """So many blocks of queries that four read a block of keys together (AMX), some of them of two
    heads; their tokens far apart."""
    generator = torch.Generator().manual_seed(5)
    shapes = ((1, 515, 8, 64), (1, 530, 2, 64), (1, 530, 2, 32))
    q, k, v = (torch.randn(*s, generator=generator).to(dtype).transpose(1, 2) for s in shapes)
    for window in (None, (70, 0)):
        assert_forward(target, (q, k, v), f"out, window {window}", causal=True, window=window)


@TARGETS
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_attention_of_scores_that_grow(target: Target, dtype: torch.dtype) -> None:
    """By 300 from the first key to the last, or the other way round: exponentials are taken of one
    block of keys after another, each with a maximum far above, or below, the one before."""
    generator = torch.Generator().manual_seed(4)
    for last in (300.0, -300.0):
        q, k, v = (torch.randn(1, 2, 520, 40, generator=generator) * 0.1 for _ in range(3))
        q[..., 0], k[..., 0] = 1.0, torch.linspace(0, last, 520)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        for causal in (False, True):
            what = f"out, {last}, causal {causal}"
            assert_forward(target, (q, k, v), what, causal=causal, scale=1.0)


@TARGETS
def test_attention_reads_nothing_that_a_call_left(target: Target) -> None:
    """Scratch is kept between calls: after one of NaN alone, any form gives what it gave before."""
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(1, 2, 290, 40, generator=generator) for _ in range(3))
    grad = torch.randn(1, 2, 290, 40, generator=generator)
    nan = [torch.full((1, 2, 290, 96), math.nan) for _ in range(4)]
    for arguments in (
        {},
        {"causal": True},
        {"window": (30, 0)},
        {"causal": True, "dropout_p": 0.3},
        {"causal": True, "softcap": 5.0, "mask": torch.rand(290, 290, generator=generator) < 0.8},
    ):

        def run(*inputs: Tensor, arguments: dict[str, Any] = arguments) -> list[Tensor]:
            seeded = dict(arguments)
            if "dropout_p" in arguments:
                seeded["generator"] = torch.Generator().manual_seed(6)
            attend = partial(llmops.attention, backend=target.backend)
            return _with_gradients(*inputs, attend, torch.float32, **seeded)

        with target.active():
            before = run(q, k, v, grad)
            _with_gradients(*nan, partial(llmops.attention, backend=target.backend), torch.float32)
            after = run(q, k, v, grad)
        for x, y in zip(before, after, strict=True):
            assert torch.equal(x, y) and bool(x.isfinite().all()), arguments


def test_attention_layout_follows_q() -> None:
    """[B, T, H, D] in memory in, the same out: a model's transpose and reshape copies nothing."""
    base = [torch.randn(2, 30, 4, 8, requires_grad=True) for _ in range(3)]
    out = llmops.attention(*(t.transpose(1, 2) for t in base))
    assert isinstance(out, Tensor) and out.transpose(1, 2).is_contiguous()
    out.sum().backward()
    assert all(t.grad is not None and t.grad.is_contiguous() for t in base)
    q, k, v = _qkv(2, 4, 4, 30, 30, 8)
    plain = llmops.attention(q, k, v)
    assert isinstance(plain, Tensor) and plain.is_contiguous()


def test_attention_only_the_lse_is_differentiated() -> None:
    q, k, v = _qkv(1, 2, 2, 10, 20, 8, grad=True)
    _, lse = llmops.attention(q, k, v, return_lse=True)
    got = torch.autograd.grad(lse.sum(), (q, k, v), allow_unused=True)
    scores = q @ k.transpose(-1, -2) / math.sqrt(8)
    want = torch.autograd.grad(torch.logsumexp(scores, -1).sum(), (q, k))
    torch.testing.assert_close(got[:2], want)
    assert got[2] is None or bool((got[2] == 0).all())


def test_attention_holds_no_square_buffer() -> None:
    """4 heads x 6000 x 6000 scores would be 576 MB: the peak stays far below, in both passes."""
    import resource

    q, k, v = _qkv(1, 4, 4, 6000, 6000, 16, grad=True)
    llmops.attention(q[:, :, :64], k[:, :, :64], v[:, :, :64])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out = llmops.attention(q, k, v, mask=torch.zeros(6000, requires_grad=True))
    assert isinstance(out, Tensor)
    out.sum().backward()
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert growth < 100_000, f"{growth} KiB"


def test_attention_autocast_of_mixed_dtypes() -> None:
    q, k, v = _qkv(1, 2, 2, 10, 20, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = llmops.attention(q, k.bfloat16(), v)
    assert isinstance(out, Tensor) and out.dtype == torch.bfloat16
    want = llmops.attention(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert isinstance(want, Tensor) and torch.equal(out, want)


def _far_apart(target: Target, q: Tensor, k: Tensor, v: Tensor, scale: float) -> list[Tensor]:
    """Checks out and lse of logits that are far apart; the gradients of out."""
    with target.active():
        got = llmops.attention(q, k, v, scale=scale, return_lse=True, backend=target.backend)
        grads = torch.autograd.grad(got[0].sum(), (q, k, v))
    wide = [x.detach().double() for x in (q, k, v)]
    oracle = reference.attention(*wide, scale=scale, return_lse=True)
    yardstick = reference.attention(q, k, v, scale=scale, return_lse=True)
    for name, g, o, y in zip(("out", "lse"), got, oracle, yardstick, strict=True):
        assert_close(g, o, y, factor=2.0, what=name)
    return list(grads)


@pytest.mark.parametrize(
    ("target", "dtype"),
    [
        pytest.param(target, dtype, id=f"{target}-{dtype}")
        for target in targets("attention", partial=True)
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        if target.serves("attention", dtype)
    ],
)
@pytest.mark.parametrize("queries", [1, 70])
def test_attention_extreme_scales(target: Target, dtype: torch.dtype, queries: int) -> None:
    """However far apart the logits are, the largest weighs 1, also where a fused scale * x - max
    would be off by more than fp32's range of exponents. dq and dk are rounding times the scale."""
    torch.manual_seed(1)
    q, k, v = _qkv(1, 2, 1, queries, 600 if queries == 1 else 110, 40, dtype=dtype, grad=True)
    for scale in (1e30, -(2.0**40), 1e4, 1e-30, 0.0):
        dq, dk, dv = _far_apart(target, q, k, v, scale)
        if target.backend != "cpu" and abs(scale) > 1e6:
            continue  # no other order of summing up q . k gives the forward's logits: so is torch's
        assert bool(dv.isfinite().all())
        if dtype != torch.float16 or abs(scale) < 1e6:  # whose range ends at 65504
            assert bool(dq.isfinite().all()) and bool(dk.isfinite().all())


@TARGETS
@pytest.mark.parametrize("queries", [1, 70])
def test_attention_far_products(target: Target, queries: int) -> None:
    """The same of an ordinary scale and products of 2^40."""
    torch.manual_seed(1)
    q, k, v = _qkv(1, 2, 1, queries, 600 if queries == 1 else 110, 40)
    q = (q * 2.0**40).requires_grad_()
    grads = _far_apart(target, q, k.requires_grad_(), v.requires_grad_(), 0.25)
    assert target.backend != "cpu" or all(bool(g.isfinite().all()) for g in grads)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("kv_heads", [0, 1, 2])
def test_attention_of_no_query_heads(backend: str, kv_heads: int) -> None:
    """No multiple of Hkv but the empty one: nothing out, and zeros for the keys' gradients."""
    q = torch.randn(2, 0, 5, 8, requires_grad=True)
    k, v = (torch.randn(2, kv_heads, 7, d, requires_grad=True) for d in (8, 6))
    mask, empty = torch.randn(2, 1, 5, 7, requires_grad=True), torch.randn(0, requires_grad=True)
    for more in ({}, {"mask": mask, "sinks": empty, "dropout_p": 0.1, "softcap": 2.0}):
        how: dict[str, Any] = {"causal": True, "return_lse": True, "backend": backend, **more}
        out, lse = llmops.attention(q, k, v, **how)
        assert out.shape == (2, 0, 5, 6) and lse.shape == (2, 0, 5) and lse.dtype == torch.float32
        leaves = (q, k, v, *((mask, empty) if more else ()))
        for grad, x in zip(torch.autograd.grad(out.sum() + lse.sum(), leaves), leaves, strict=True):
            assert grad.shape == x.shape and not bool(grad.any())
    # The backward by formula, of the operator that a compiled graph holds.
    grads = reference.attention_bwd(
        out, lse, q, k, v, mask, out, lse, True, 0.3, True, sinks=empty, softcap=2.0
    )
    for found, x in zip(grads, (q, k, v, mask, empty), strict=True):
        assert found is not None and found.shape == x.shape and not bool(found.any())


def test_attention_rejects_bad_input() -> None:
    q, k, v = _qkv(2, 4, 2, 5, 7, 8)
    attention: Any = llmops.attention
    with pytest.raises(TypeError, match="q must be a Tensor; got list"):
        attention([1.0], k, v)
    with pytest.raises(TypeError, match=r"llmops.attention: q has dtype int64.*q\.float\(\)"):
        attention(q.long(), k, v)
    with pytest.raises(TypeError, match=r"k has dtype bfloat16 and q float32.*k\.to\(q\.dtype\)"):
        attention(q, k.bfloat16(), v)
    with pytest.raises(
        ValueError, match=r"q must be \[batch, heads, tokens, head_dim\].*unsqueeze"
    ):
        attention(q[0], k, v)
    with pytest.raises(ValueError, match=r"k must be \[B, Hkv, Tk, D\] with q's B=2 and D=8"):
        attention(q, k[..., :4], v)
    with pytest.raises(ValueError, match=r"v must be .*\(2, 2, 7\); got shape \(2, 2, 6, 8\)"):
        attention(q, k, v[:, :, :6])
    with pytest.raises(ValueError, match="q has 4 heads, which is no multiple of k's 3"):
        attention(q, *(torch.randn(2, 3, 7, 8) for _ in range(2)))
    with pytest.raises(ValueError, match=r"mask of shape \(5, 6\) does not broadcast"):
        attention(q, k, v, mask=torch.ones(5, 6, dtype=torch.bool))
    with pytest.raises(TypeError, match="mask must be a bool"):
        attention(q, k, v, mask=torch.ones(5, 7, dtype=torch.int32))
    for wrong in (True, False, "0.5", [0.5]):
        for more in ({}, {"softcap": 1.0}, {"backend": "reference"}):  # and the shortcut
            with pytest.raises(TypeError, match=r"scale must be a number, or None.*; pass what"):
                attention(q, k, v, scale=wrong, **more)
    for wrong in ((True, False), [3, True]):
        with pytest.raises(TypeError, match=r"window must be \(left, right\), two ints.*True"):
            attention(q, k, v, window=wrong)
    with pytest.raises(NotImplementedError, match='backend "cuda" cannot serve'):
        attention(q, k, v, backend="cuda")
    with pytest.raises(NotImplementedError, match=r"float64.*Use backend="):
        attention(*(t.double() for t in (q, k, v)), backend="cpu")
