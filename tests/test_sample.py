"""sample: every drawn token lies where the exact distribution puts it; the distribution itself;
what the filters keep; reproducibility; errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import llmops
from llmops import reference
from llmops.testing import Target, targets
from llmops.testing.specs.sample import SIZES, settings

TARGETS = pytest.mark.parametrize("target", targets("sample"), ids=str)
DTYPES = pytest.mark.parametrize(
    "dtype", (torch.float32, torch.bfloat16, torch.float16), ids=("fp32", "bf16", "fp16")
)


def raw(logits: Tensor, uniform: Tensor, target: Target, **filters: float) -> Tensor:
    with target.active():
        return torch.ops.llmops.sample(  # type: ignore[no-any-return]
            logits,
            uniform,
            filters["temperature"],
            filters["top_k"],
            filters["top_p"],
            filters["min_p"],
            target.backend,
        )


@TARGETS
@DTYPES
@pytest.mark.parametrize("size", SIZES)
def test_sample_matches_exact_distribution(target: Target, dtype: torch.dtype, size: int) -> None:
    """The token's interval of the fp64 cumulative distribution holds the uniform number."""
    torch.manual_seed(size)
    logits = (torch.randn(4, size) * 3).to(dtype)
    chosen = list(settings())
    if target.interpreted:  # slow: each case some of them
        chosen = chosen[(SIZES.index(size) * 6 + dtype.itemsize) % 23 :: 23]
    for filters in chosen:
        uniform = torch.rand(4, dtype=torch.float64)
        drawn = raw(logits, uniform, target, **filters)
        p = reference.sample_probabilities(logits.double(), **filters)
        above = p.cumsum(-1).gather(1, drawn[:, None])[:, 0]
        below = above - p.gather(1, drawn[:, None])[:, 0]
        # fp32 weights: a cumulative sum is off by a few eps, relative to the whole.
        assert bool(((below - 2e-6 <= uniform) & (uniform <= above + 2e-6)).all()), filters
        assert bool((p.gather(1, drawn[:, None]) > 0).all()), f"a filtered token: {filters}"


@TARGETS
def test_sample_distribution(target: Target) -> None:
    """Chi-square of 40000 draws against the exact filtered probabilities.

    A chi-square variable of k degrees of freedom exceeds k + 2 sqrt(k t) + 2 t with probability
    below exp(-t) (Laurent and Massart, 2000); t = 16 makes that 10^-7. The seed is fixed besides.
    """
    draws = 3000 if target.interpreted else 40000
    logits = torch.randn(1, 60, generator=torch.Generator(target.device).manual_seed(5)) * 1.5
    for filters in (
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 20},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 1.0, "min_p": 0.1},
        {"temperature": 0.9, "top_k": 30, "top_p": 0.9, "min_p": 0.05},
    ):
        generator = torch.Generator(target.device).manual_seed(11)
        with target.active():
            drawn = llmops.sample(
                logits.expand(draws, -1), generator=generator, backend=target.backend, **filters
            )
        p = reference.sample_probabilities(logits.double(), **filters)[0]
        counts = torch.bincount(drawn, minlength=60).double()
        assert bool((counts[p == 0] == 0).all()), f"a filtered token was drawn: {filters}"
        kept = p > 0
        expected = draws * p[kept]
        statistic = float(((counts[kept] - expected) ** 2 / expected).sum())
        freedom = int(kept.sum()) - 1
        assert statistic < freedom + 8 * math.sqrt(freedom) + 32, (filters, statistic, freedom)


@TARGETS
@DTYPES
def test_sample_greedy_is_first_maximum(target: Target, dtype: torch.dtype) -> None:
    for size in (1, 15, 16, 17, 1000):
        logits = torch.randn(5, size).to(dtype)
        logits[1] = 2.0
        logits[2, size // 2 :] = 9.0
        logits[3] = -math.inf
        logits[3, -1] = -5.0
        logits[4, size // 3] = math.inf
        with target.active():
            got = llmops.sample(logits, temperature=0.0, backend=target.backend)
            # One token kept is that token, whatever the number drawn.
            unique = logits[:1].float() + torch.linspace(0, 1e-3, size)
            for filters in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
                one = llmops.sample(unique, backend=target.backend, **filters)
                assert torch.equal(one, unique.argmax(-1)), filters
        want = [int((row == row.max()).nonzero()[0]) for row in logits]
        assert got.tolist() == want and got.dtype == torch.int64


@TARGETS
def test_sample_keeps_ties(target: Target) -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]]).expand(3000, -1)
    with target.active():
        for filters, kept in (
            ({"top_k": 2}, {1, 2, 3, 4}),
            ({"top_p": 0.5}, {1, 2, 3, 4}),
            ({"top_k": 1}, {1}),
            ({"top_k": 6}, {0, 1, 2, 3, 4, 5}),
            ({"top_k": 100}, {0, 1, 2, 3, 4, 5}),
            ({"min_p": 0.3}, {1, 2, 3, 4}),
        ):
            drawn = llmops.sample(logits, backend=target.backend, **filters)
            assert set(drawn.tolist()) == kept, filters


@TARGETS
def test_sample_extremes(target: Target) -> None:
    """Tiny and huge temperatures and logits, excluded tokens, both ends of the uniform numbers."""
    none = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    logits = torch.tensor([[0.0, -math.inf, 1.0, 2.0, -math.inf]])
    lowest = raw(logits, torch.zeros(1, dtype=torch.float64), target, **none)
    highest = raw(logits, torch.full((1,), 1 - 2**-53, dtype=torch.float64), target, **none)
    assert (lowest.item(), highest.item()) == (0, 3)
    with target.active():
        for temperature in (1e-300, 1e-30, 1e-3):
            assert llmops.sample(logits, temperature=temperature, backend=target.backend) == 3
        many = logits.expand(2000, -1)
        drawn = llmops.sample(many, temperature=1e30, backend=target.backend)
        assert set(drawn.tolist()) == {0, 2, 3}
        huge = torch.tensor([[3e38, -3e38, 2.9e38]])
        assert llmops.sample(huge, backend=target.backend).item() == 0


@TARGETS
def test_sample_reproducible(target: Target) -> None:
    logits = torch.randn(8, 3001) if target.interpreted else torch.randn(64, 3001)
    filters = {"temperature": 0.8, "top_k": 200, "top_p": 0.95}

    def draw(threads: int) -> Tensor:
        generator = torch.Generator(target.device).manual_seed(3)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            with target.active():
                return torch.stack(
                    [
                        llmops.sample(
                            logits, generator=generator, backend=target.backend, **filters
                        )
                        for _ in range(3)
                    ]
                )
        finally:
            torch.set_num_threads(before)

    first = draw(1)
    assert torch.equal(first, draw(1)) and torch.equal(first, draw(2))
    assert not torch.equal(first[0], first[1]), "the generator does not advance"
    torch.manual_seed(9)
    a = llmops.sample(logits)
    torch.manual_seed(9)
    assert torch.equal(a, llmops.sample(logits))
    state = torch.get_rng_state()
    llmops.sample(logits, temperature=0.0)
    assert torch.equal(state, torch.get_rng_state()), "greedy draws nothing"
    # The same state gives the reference's ids too, but where a number falls between two tokens.
    torch.manual_seed(9)
    assert (llmops.sample(logits, backend="reference") == a).double().mean() > 0.98


@TARGETS
@DTYPES
def test_sample_agrees_with_the_reference_token_for_token(
    target: Target, dtype: torch.dtype
) -> None:
    """At the same uniform numbers; those that fall between two tokens, by their rounding, aside."""
    generator = torch.Generator(target.device).manual_seed(2)
    logits = (torch.randn(96, 700, generator=generator) * 3).to(dtype)
    logits[::3, ::5] = -math.inf
    uniform = torch.linspace(0, 1, 97, dtype=torch.float64)[:-1]
    for top_k, top_p, min_p in ((0, 1.0, 0.0), (40, 1.0, 0.0), (0, 0.9, 0.0), (300, 0.8, 0.01)):
        filters = {"temperature": 0.7, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        drawn = raw(logits, uniform, target, **filters)
        want = reference.sample_at(logits.double(), uniform, **filters)
        p = reference.sample_probabilities(logits.double(), **filters)
        edge = (p.cumsum(-1) - uniform[:, None]).abs().amin(-1) < 2e-6
        assert torch.equal(drawn[~edge], want[~edge]) and edge.sum() < 5, filters


@TARGETS
def test_sample_any_strides_and_empty(target: Target) -> None:
    wide = torch.full((9, 260), math.nan)
    wide[:, 1:260:2] = torch.randn(9, 130)
    uniform = torch.rand(9, dtype=torch.float64)
    filters = {"temperature": 1.0, "top_k": 40, "top_p": 0.9, "min_p": 0.0}
    for view in (wide[:, 1:260:2], wide.T.contiguous().T[:, 1:260:2]):
        got = raw(view, uniform, target, **filters)
        assert torch.equal(got, raw(view.contiguous(), uniform, target, **filters))
    with target.active():
        assert llmops.sample(torch.randn(0, 5), backend=target.backend).shape == (0,)


@pytest.mark.parametrize("backend", ("cpu", "reference"))
def test_sample_rejects_rows_without_distribution(backend: str) -> None:
    for size in (3, 40):
        logits = torch.randn(4, size)
        for value, why in (
            (math.nan, "row 2 of logits holds NaN"),
            (math.inf, "holds \\+inf"),
        ):
            bad = logits.clone()
            bad[2, size - 1] = value
            with pytest.raises(ValueError, match=why):
                llmops.sample(bad, backend=backend)
        bad = logits.clone()
        bad[3] = -math.inf
        with pytest.raises(ValueError, match="row 3 of logits is -inf in every place"):
            llmops.sample(bad, top_p=0.5, backend=backend)
        bad[3] = math.nan
        with pytest.raises(ValueError, match="row 3 of logits holds NaN"):
            llmops.sample(bad, temperature=0.0, backend=backend)


@pytest.mark.parametrize("target", [t for t in targets("sample") if t.backend == "triton"], ids=str)
def test_sample_triton_marks_rows_without_distribution(target: Target) -> None:
    """A GPU cannot report them without being waited for: their id is -1, the others' are right."""
    for size in (3, 40):
        logits = torch.randn(6, size)
        logits[1, 0], logits[2, size - 1], logits[4] = math.nan, math.inf, -math.inf
        for filters in ({}, {"top_k": 2, "top_p": 0.5, "min_p": 0.1}):
            with target.active():
                drawn = llmops.sample(logits, backend="triton", **filters)
            assert (drawn == -1).tolist() == [False, True, True, False, True, False]
        with target.active():
            drawn = llmops.sample(logits, temperature=0.0, backend="triton")
        want = logits.argmax(-1)
        want[1] = want[4] = -1
        assert torch.equal(drawn, want)


def test_sample_rejects_bad_arguments() -> None:
    x = torch.randn(2, 5)
    for arguments, text in (
        ({"temperature": -1.0}, "temperature must be >= 0; got -1.0"),
        ({"temperature": math.nan}, "temperature must be >= 0"),
        ({"top_k": -1}, "top_k must be an int >= 0"),
        ({"top_k": 2.5}, "top_k must be an int >= 0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]; got 0.0"),
        ({"top_p": 1.5}, "top_p must be in"),
        ({"min_p": -0.1}, r"min_p must be in \[0, 1\]"),
    ):
        with pytest.raises(ValueError, match=text):
            llmops.sample(x, **arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"logits must be \[B, V\] with V > 0; got shape \(5,\)"):
        llmops.sample(x[0])
    with pytest.raises(ValueError, match="V > 0"):
        llmops.sample(torch.randn(2, 0))
    with pytest.raises(TypeError, match="logits has dtype int64"):
        llmops.sample(x.long())
    with pytest.raises(NotImplementedError, match="float64"):
        llmops.sample(x.double(), backend="cpu")
    assert llmops.sample(x.double(), backend="reference").shape == (2,)


def test_sample_opcheck_and_compile() -> None:
    logits, uniform = torch.randn(3, 9), torch.rand(3, dtype=torch.float64)
    operator = torch.ops.llmops.sample.default
    torch.library.opcheck(operator, (logits, uniform, 0.8, 4, 0.9, 0.1, "cpu"))
    torch.library.opcheck(operator, (logits, None, 0.0, 0, 1.0, 0.0, "cpu"))
    torch._dynamo.reset()
    for dynamic in (False, True):
        compiled = torch.compile(
            llmops.sample, fullgraph=True, dynamic=dynamic, backend="aot_eager"
        )
        torch.manual_seed(4)
        got = compiled(logits, temperature=0.7, top_k=5)
        torch.manual_seed(4)
        assert torch.equal(got, llmops.sample(logits, temperature=0.7, top_k=5))


def test_sample_takes_no_gradient() -> None:
    logits = torch.randn(3, 9, requires_grad=True)
    assert not llmops.sample(logits).requires_grad
