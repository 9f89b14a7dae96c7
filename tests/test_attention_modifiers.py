"""attention's score modifiers, each against what it equals; their samples are in the spec."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import llmops
from llmops import reference
from llmops.testing import Target, targets

TARGETS = pytest.mark.parametrize("target", targets("attention"), ids=str)


def _qkv(queries: int, keys: int, *, heads: int = 4, kv_heads: int = 2, dim: int = 16) -> Any:
    torch.manual_seed(0)
    shapes = ((2, heads, queries, dim), (2, kv_heads, keys, dim), (2, kv_heads, keys, dim))
    return tuple(torch.randn(s, requires_grad=True) for s in shapes)


def _run(target: Target, tensors: Any, **arguments: Any) -> list[Tensor]:
    """out, lse and the gradients of q, k, v and of what else takes one."""
    wanted = [*tensors, *(a for a in arguments.values() if getattr(a, "requires_grad", False))]
    with target.active():
        out, lse = llmops.attention(*tensors, return_lse=True, backend=target.backend, **arguments)
        weights = torch.linspace(-1, 1, out.numel()).view(out.shape)
        loss = (out * weights).sum() + lse.masked_fill(lse.isinf(), 0.0).square().sum()
        return [out.detach(), lse.detach(), *torch.autograd.grad(loss, wanted)]


def _same(got: list[Tensor], want: list[Tensor]) -> None:
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=2e-5, atol=2e-5)


def _distance(queries: int, keys: int) -> Tensor:
    return torch.arange(keys) - torch.arange(queries)[:, None] - (keys - queries)


SIZES = pytest.mark.parametrize(
    "sizes", [(1, 40), (3, 1300), (20, 50), (90, 130), (90, 40)], ids=lambda s: f"{s[0]}x{s[1]}"
)


@TARGETS
@SIZES
@pytest.mark.parametrize("window", [(7, 0), (0, 0), (5, 9), (-1, 2), (30, -1), (10**18, 0)])
@pytest.mark.parametrize("causal", [False, True])
def test_window_is_a_mask(
    target: Target, sizes: tuple[int, int], window: tuple[int, int], causal: bool
) -> None:
    d = _distance(*sizes)
    left, right = window
    keep = torch.ones(sizes, dtype=torch.bool)
    if left >= 0:
        keep &= d >= -left
    if right >= 0:
        keep &= d <= right
    if causal:
        keep &= d <= 0
    tensors = _qkv(*sizes)
    got = _run(target, tensors, window=window, causal=causal)
    _same(got, _run(target, tensors, mask=keep))


@TARGETS
def test_window_work_is_linear(target: Target) -> None:
    """Keys out of every window are not read: NaN there changes nothing, in either direction."""
    for queries in (2, 64):
        q, k, v = _qkv(queries, 2000)
        want = _run(target, (q, k, v), window=(100, 0), causal=True)
        with torch.no_grad():
            k[:, :, :1800] = math.nan
            v[:, :, :1800] = math.nan
        got = _run(target, (q, k, v), window=(100, 0), causal=True)
        for g, w in zip(got, want, strict=True):
            assert torch.equal(g, w)


@TARGETS
@SIZES
def test_alibi_is_an_additive_mask(target: Target, sizes: tuple[int, int]) -> None:
    tensors = _qkv(*sizes)
    slopes = torch.rand(2, 4) / 4
    for given in (slopes, slopes[0]):
        bias = -given[..., None, None] * _distance(*sizes).abs()
        got = _run(target, tensors, alibi_slopes=given, causal=True)
        _same(got, _run(target, tensors, mask=bias, causal=True))


@TARGETS
@SIZES
def test_sinks_are_one_more_key(target: Target, sizes: tuple[int, int]) -> None:
    """A key in front whose logit is the sink and whose value is 0, by a mask that writes it."""
    q, k, v = _qkv(*sizes)
    sinks = torch.randn(4, requires_grad=True)
    longer_k, longer_v = (
        torch.nn.functional.pad(t, (0, 0, 1, 0)).detach().requires_grad_() for t in (k, v)
    )
    hidden = _distance(*sizes) > 0
    mask = torch.zeros(1, 4, *sizes).masked_fill(hidden, -math.inf)
    column = sinks[None, :, None, None].expand(1, 4, sizes[0], 1)
    mask = torch.cat((column, mask), -1).detach().requires_grad_()
    got = _run(target, (q, k, v), sinks=sinks, causal=True)
    out, lse, dq, dk, dv, dmask = _run(target, (q, longer_k, longer_v), mask=mask)
    _same(got, [out, lse, dq, dk[:, :, 1:], dv[:, :, 1:], dmask[..., 0].sum((0, 2))])


@TARGETS
def test_sinks_of_a_row_that_sees_nothing(target: Target) -> None:
    for queries in (2, 40):
        tensors = _qkv(queries, 50)
        mask = torch.ones(queries, 50, dtype=torch.bool)
        mask[1] = False
        sinks = torch.tensor([0.5, -math.inf, 2.0, -3.0])
        out, lse, *grads = _run(target, tensors, sinks=sinks, mask=mask)
        assert bool((out[:, :, 1] == 0).all())
        assert torch.equal(lse[:, :, 1], sinks.expand(2, 4))
        assert all(bool(g.isfinite().all()) for g in grads)
        assert bool((grads[0][:, :, 1] == 0).all())


@TARGETS
def test_softcap_bounds_the_scores(target: Target) -> None:
    q, k, v = _qkv(70, 90)
    _, lse, *_ = _run(target, (q * 100, k, v), softcap=3.0)
    assert bool((lse <= 3.0 + math.log(90) + 1e-4).all())
    # A cap far above the scores changes nothing, to its own third order.
    _same(_run(target, (q, k, v), softcap=1e4), _run(target, (q, k, v)))


# ---- dropout -------------------------------------------------------------------------------------


def _weights(target: Target, queries: int, keys: int, dropout_p: float, seed: int) -> Tensor:
    """The weights [2, 4, Tq, Tk] themselves: equal scores, and values that are unit vectors."""
    q, k = torch.zeros(2, 4, queries, 8), torch.zeros(2, 4, keys, 8)
    v = torch.eye(keys).expand(2, 4, keys, keys)
    with target.active():
        out = llmops.attention(
            q, k, v, dropout_p=dropout_p, backend=target.backend,
            generator=torch.Generator(target.device).manual_seed(seed),
        )  # fmt: skip
    assert isinstance(out, Tensor)
    return out * keys


@TARGETS
@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.85])
def test_dropout_keep_rate(target: Target, dropout_p: float) -> None:
    """Over all, per row, per column and per head, within five standard deviations."""
    weights = _weights(target, 150, 200, dropout_p, 1)
    kept = (weights > 0).double()
    torch.testing.assert_close(weights[weights > 0].amax(), torch.tensor(1 / (1 - dropout_p)))
    for dims in ((0, 1, 2, 3), (0, 1, 2), (0, 1, 3), (2, 3)):
        rate = kept.mean(dims)
        count = kept.numel() // rate.numel()
        deviation = math.sqrt(dropout_p * (1 - dropout_p) / count)
        assert bool(((rate - (1 - dropout_p)).abs() < 5 * deviation).all()), dims
    # No two heads, rows or seeds alike.
    flat = kept.view(8 * 150, 200)
    assert len(torch.unique(flat, dim=0)) == len(flat)
    assert not torch.equal(kept, (_weights(target, 150, 200, dropout_p, 2) > 0).double())


@TARGETS
def test_dropout_drops_what_the_reference_drops(target: Target) -> None:
    """Bit for bit, whatever the tiling: packed rows, tiles, split keys, odd block starts."""
    for queries, keys in ((1, 30), (13, 1100), (70, 130)):
        seed = reference.dropout_seed(target.device, torch.Generator(target.device).manual_seed(7))
        want = reference.dropout_weights((2, 4, queries, keys), 0.3, seed)
        got = _weights(target, queries, keys, 0.3, 7)
        assert torch.equal(got > 0, want > 0)


def test_dropout_philox() -> None:
    """The known answer of Philox-4x32-10 (Random123's kat_vectors): key 0, counter 0."""
    words = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    for word, threshold_above in ((w, (w + 1) / 2**32) for w in words):
        index = words.index(word)
        seed = torch.zeros(1, dtype=torch.int64)
        at = reference.dropout_weights((1, 1, 1, 4), word / 2**32, seed)[0, 0, 0, index]
        above = reference.dropout_weights((1, 1, 1, 4), threshold_above, seed)[0, 0, 0, index]
        assert at > 0 and above == 0


@TARGETS
def test_dropout_expectation(target: Target) -> None:
    """The mean over many seeds is the attention without dropout."""
    q, k, v = (t.detach() for t in _qkv(20, 40))
    generator = torch.Generator(target.device).manual_seed(0)
    with target.active():
        want = llmops.attention(q, k, v, backend=target.backend)
        runs = [
            llmops.attention(q, k, v, dropout_p=0.4, generator=generator, backend=target.backend)
            for _ in range(300)
        ]
    stacked = torch.stack(runs)  # type: ignore[arg-type]
    error = (stacked.mean(0) - want).abs()  # type: ignore[operator]
    assert bool((error < 6 * stacked.std(0) / math.sqrt(300)).all())


@TARGETS
def test_dropout_backward_drops_the_same(target: Target) -> None:
    """out is linear in v, so its gradient shows which weights the backward used; lse is that of all
    weights."""
    q, k, v = _qkv(30, 50)
    with target.active():
        out, lse = llmops.attention(
            q, k, v, dropout_p=0.5, return_lse=True, backend=target.backend,
            generator=torch.Generator(target.device).manual_seed(3),
        )  # fmt: skip
        (dv,) = torch.autograd.grad(out.sum(), v)
        _, plain_lse = llmops.attention(q, k, v, return_lse=True, backend=target.backend)
    torch.testing.assert_close(lse, plain_lse)
    torch.testing.assert_close((dv * v).sum(), out.sum(), rtol=1e-4, atol=1e-4)


def test_dropout_reproducible() -> None:
    q, k, v = _qkv(10, 20)

    def run(generator: torch.Generator | None = None) -> Any:
        return llmops.attention(q, k, v, dropout_p=0.5, generator=generator)

    torch.manual_seed(5)
    first, second = run(), run()
    torch.manual_seed(5)
    assert torch.equal(first, run()) and torch.equal(second, run())
    assert not torch.equal(first, second)
    generator = torch.Generator().manual_seed(5)
    before = torch.get_rng_state()
    given = [run(generator), run(generator)]
    assert torch.equal(given[0], first) and torch.equal(given[1], second)
    assert torch.equal(before, torch.get_rng_state())
    # Without dropout nothing is drawn.
    state = generator.get_state()
    llmops.attention(q, k, v, generator=generator)
    assert torch.equal(state, generator.get_state())


@pytest.mark.parametrize("dynamic", [False, True])
def test_dropout_compiles_fullgraph(dynamic: bool) -> None:
    """Each run of the compiled graph draws anew, the eager bits for the same seed."""
    q, k, v = _qkv(10, 20)

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = llmops.attention(q, k, v, dropout_p=0.5, window=(12, 0), softcap=5.0)
        assert isinstance(out, Tensor)
        return out

    def both(fn: Any) -> list[Tensor]:
        results = []
        for _ in range(2):
            out = fn(q, k, v)
            results += [out.detach(), *torch.autograd.grad(out.square().sum(), (q, k, v))]
        return results

    torch._dynamo.reset()
    torch.manual_seed(1)
    eager = both(step)
    torch.manual_seed(1)
    compiled = both(torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager"))
    assert not torch.equal(eager[0], eager[4])
    for a, b in zip(eager, compiled, strict=True):
        assert torch.equal(a, b)


# ---- arguments -----------------------------------------------------------------------------------


def test_alibi_gradient_is_the_references() -> None:
    q, k, v = _qkv(5, 7)
    slopes = torch.rand(4, requires_grad=True)
    with pytest.raises(NotImplementedError, match="no gradient of alibi_slopes"):
        llmops.attention(q, k, v, alibi_slopes=slopes, backend="cpu")
    with pytest.warns(llmops.FallbackWarning, match="gradient of alibi_slopes"):
        out = llmops.attention(q, k, v, alibi_slopes=slopes)
    assert isinstance(out, Tensor)
    (grad,) = torch.autograd.grad(out.square().sum(), slopes)
    assert bool((grad != 0).any())
    with torch.no_grad():
        llmops.attention(q, k, v, alibi_slopes=slopes, backend="cpu")
    op = torch.ops.llmops.attention
    out, _ = op(q, k, v, None, False, 1.0, -1, -1, slopes, 0.0, None, 0.0, None, "cpu")
    with pytest.raises(NotImplementedError, match="alibi_slopes takes no gradient"):
        out.sum().backward()


def test_modifiers_in_16_bit_parameters() -> None:
    """Slopes and sinks of any floating dtype, the gradient in the sinks' own."""
    q, k, v = (t.detach().bfloat16() for t in _qkv(30, 40))
    sinks = torch.randn(4).bfloat16().requires_grad_()
    slopes = torch.rand(4).half()
    out = llmops.attention(q, k, v, sinks=sinks, alibi_slopes=slopes, causal=True)
    assert isinstance(out, Tensor)
    out.float().sum().backward()
    assert sinks.grad is not None and sinks.grad.dtype == torch.bfloat16


def test_modifiers_fp64_on_the_reference() -> None:
    q, k, v = (t.detach().double().requires_grad_() for t in _qkv(6, 8))
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)

    def fn(*tensors: Tensor) -> Any:
        return llmops.attention(
            *tensors[:3], sinks=tensors[3], softcap=2.0, window=(4, 0), backend="reference"
        )

    assert torch.autograd.gradcheck(fn, (q, k, v, sinks))


def test_modifiers_are_named_by_explain() -> None:
    q, k, v = _qkv(5, 7)
    decision = llmops.explain(
        "attention", q, k, v, window=(3, 0), softcap=1.0, sinks=torch.zeros(4), dropout_p=0.1
    )
    assert decision.backend == "cpu"
    assert decision.call.features == ("window", "softcap", "sinks", "dropout")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 3}, r"window must be \(left, right\).*got 3; a sliding window"),
        ({"window": (3, -2)}, "window must be"),
        ({"window": (1.5, 0)}, "window must be"),
        ({"alibi_slopes": torch.ones(3)}, r"alibi_slopes must be \[Hq\].*got shape \(3,\)"),
        ({"softcap": 0.0}, "softcap must be a finite number > 0; got 0.0; pass None"),
        ({"softcap": math.nan}, "softcap must be"),
        ({"sinks": torch.ones(2)}, r"sinks must be \[Hq\] = \(4,\).*got shape \(2,\)"),
        ({"dropout_p": 1.5}, r"dropout_p must be in \[0, 1\]; got 1.5"),
        ({"dropout_p": -0.1}, r"dropout_p must be in \[0, 1\]"),
    ],
    ids=str,
)
def test_modifiers_rejected(arguments: dict[str, Any], message: str) -> None:
    q, k, v = _qkv(5, 7)
    with pytest.raises(ValueError, match=message):
        llmops.attention(q, k, v, **arguments)
    for name in ("alibi_slopes", "sinks"):
        with pytest.raises(TypeError, match=f"{name} must be a Tensor"):
            llmops.attention(q, k, v, **{name: [1.0] * 4})  # type: ignore[arg-type]
