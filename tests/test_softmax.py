"""softmax: the conformance kit, and what is particular to it."""

from __future__ import annotations

import itertools
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

import llmops
from llmops import reference
from llmops.testing import Target, assert_close, suite, targets
from llmops.testing.specs.softmax import SPEC, torch_softmax

globals().update(suite(SPEC))

TARGETS = pytest.mark.parametrize("target", targets("softmax"), ids=str)
# Only the CPU's kernels have one.
SHORT_WAYS = pytest.mark.parametrize(
    "target", [t for t in targets("softmax") if t.backend == "cpu"], ids=str
)


@TARGETS
def test_softmax_fully_masked_rows(target: Target) -> None:
    x = torch.randn(4, 33, requires_grad=True)
    mask = torch.ones(4, 33, dtype=torch.bool)
    mask[1] = False
    with target.active():
        y = llmops.softmax(x, mask=mask, backend=target.backend)
        y.square().sum().backward()
    assert x.grad is not None
    assert bool((y[1] == 0).all()) and bool((x.grad[1] == 0).all())
    assert bool(x.grad.isfinite().all())
    # Without a mask a row of -inf is NaN, as in torch; infinity in the row too.
    hopeless = torch.full((1, 20), -math.inf)
    with target.active():
        assert bool(llmops.softmax(hopeless, backend=target.backend).isnan().all())
        hopeless[0, 3] = math.inf
        assert bool(llmops.softmax(hopeless, backend=target.backend).isnan().any())


@TARGETS
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_softmax_hypothesis(target: Target, data: st.DataObject) -> None:
    """Shapes, strides, masks and dtypes at random."""
    shape = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    n = data.draw(st.integers(1, 90))
    dtype = data.draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16)))
    step, gap = data.draw(st.integers(1, 2)), data.draw(st.integers(0, 3))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    x = torch.randn(*shape, n * step + gap).to(dtype)[..., : n * step : step]
    order = data.draw(st.permutations(range(x.dim() - 1)))
    x = x.permute(*order, x.dim() - 1)
    mask = None
    kind = data.draw(st.sampled_from(("none", "bool", "float")))
    if kind != "none":
        mask_shape = [data.draw(st.sampled_from((1, s))) for s in x.shape]
        mask = torch.rand(mask_shape) < 0.7 if kind == "bool" else torch.randn(mask_shape).to(dtype)
    causal = data.draw(st.booleans())
    scale = data.draw(st.floats(-3, 3))
    arguments = {"scale": scale, "mask": mask, "causal": causal}
    with target.active():
        got = llmops.softmax(x, backend=target.backend, **arguments)
    wide = mask.double() if mask is not None and mask.is_floating_point() else mask
    oracle = reference.softmax(x.double(), scale=scale, mask=wide, causal=causal)
    assert_close(got, oracle, torch_softmax(x, **arguments), factor=2.0, what="softmax")


@pytest.mark.usefixtures("common_cache")
@pytest.mark.parametrize("n", [2048, 2050])
def test_softmax_backward_past_the_caches(n: int) -> None:
    """Over 32 MiB the gradient is written by non-temporal stores where rows are aligned."""
    x = torch.randn(2048, n, requires_grad=True)
    grad = torch.randn(2048, n)
    (got,) = torch.autograd.grad(llmops.softmax(x), x, grad)
    wide = x.detach().double().requires_grad_()
    (oracle,) = torch.autograd.grad(torch.softmax(wide, -1), wide, grad.double())
    (yardstick,) = torch.autograd.grad(torch.softmax(x, -1), x, grad)
    assert_close(got, oracle, yardstick, factor=3.0, what="softmax gradient")


@pytest.mark.filterwarnings("ignore::llmops.dispatch.FallbackWarning")
@SHORT_WAYS
@pytest.mark.parametrize("shape", [(37,), (1, 37), (3, 1, 37), (2, 3, 37), (0, 37)], ids=str)
def test_softmax_short_way_is_the_long_way(target: Target, shape: tuple[int, ...]) -> None:
    """A call that names no backend goes past the checks: the same bits, with every option."""
    x = torch.randn(*shape, 2)[..., 0]  # strided; a single row's stride is nobody's
    keep = torch.rand(shape[-1]) < 0.6
    every = itertools.product(
        (x, x.contiguous(), x.bfloat16()),
        (None, keep, torch.randn(shape), torch.randn(()), torch.zeros(shape[-1]).bfloat16()),
        (False, True) if len(shape) > 1 else (False,),
        (None, torch.float32, torch.bfloat16, torch.float64),
        (1.0, -0.3),
    )
    with target.active(), torch.no_grad():
        for values, mask, causal, dtype, scale in every:
            backend = "reference" if dtype == torch.float64 else "cpu"  # fp64: by either way
            want, got = (
                llmops.softmax(
                    values, scale=scale, mask=mask, causal=causal, dtype=dtype, backend=way
                )
                for way in (backend, None)
            )
            assert got.dtype == want.dtype and got.shape == want.shape
            assert torch.equal(got.nan_to_num(), want.nan_to_num())


def test_softmax_rows_sum_to_one_and_shift_invariant() -> None:
    x = torch.randn(50, 777) * 5
    y = llmops.softmax(x)
    assert torch.allclose(y.sum(-1), torch.ones(50), atol=1e-6)
    # exp amplifies the rounding of x + 100 (half an ulp of 100) into a relative error of y.
    assert torch.allclose(llmops.softmax(x + 100), y, rtol=2 * 64 * torch.finfo(x.dtype).eps)


def test_softmax_rejects_bad_input() -> None:
    x = torch.randn(3, 4)
    with pytest.raises(TypeError, match=r"llmops.softmax: x has dtype int64.*x\.float\(\)"):
        llmops.softmax(torch.ones(3, 4, dtype=torch.int64))
    with pytest.raises(TypeError, match="x must be a Tensor; got list"):
        llmops.softmax([1.0, 2.0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"dim must be in \[-2, 1\].*got 2"):
        llmops.softmax(x, 2)
    with pytest.raises(ValueError, match="causal=True needs"):
        llmops.softmax(x, 0, causal=True)
    with pytest.raises(ValueError, match=r"mask of shape \(5,\) does not broadcast"):
        llmops.softmax(x, mask=torch.ones(5, dtype=torch.bool))
    with pytest.raises(TypeError, match="mask must be a bool"):
        llmops.softmax(x, mask=torch.ones(3, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="backend is one of"):
        llmops.softmax(x, backend="gpu")
    with pytest.raises(NotImplementedError, match='backend "triton" cannot serve'):
        llmops.softmax(x, backend="triton")
    with pytest.raises(TypeError, match="dtype must be a floating-point"):
        llmops.softmax(x, dtype=torch.int32)
    with pytest.raises(NotImplementedError, match=r"float64.*Use backend="):
        llmops.softmax(x.double(), backend="cpu")


def test_softmax_refuses_jvp() -> None:
    x = torch.randn(3)
    with pytest.raises(NotImplementedError):
        torch.func.jvp(llmops.softmax, (x,), (x,))


EXTREMES = pytest.mark.parametrize("scale", [1e30, -(2.0**40), 1e12, 1e4, 1e-30, -1e-30, 0.0])


@TARGETS
@EXTREMES
@pytest.mark.parametrize("kind", ["plain", "causal", "added"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_softmax_extreme_scales(
    target: Target, scale: float, kind: str, dtype: torch.dtype
) -> None:
    """However far apart the logits are, the largest weighs 1 and nothing is infinite or NaN."""
    x = torch.randn(5, 77, generator=torch.Generator().manual_seed(1)).to(dtype)
    more = {"causal": {"causal": True}, "added": {"mask": x.flip(0)}, "plain": {}}[kind]
    wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in more.items()}
    with target.active():
        got = llmops.softmax(x, scale=scale, backend=target.backend, **more)
    oracle = reference.softmax(x.double(), scale=scale, **wide)
    yardstick = reference.softmax(x, scale=scale, **more)
    assert_close(got, oracle, yardstick, factor=2.0, what="softmax")


@TARGETS
def test_softmax_rows_that_a_mask_lowers_alike(target: Target) -> None:
    """The lowest finite number in all of a row, as transformers gives padding, drops nothing: the
    logits round to it, and the weights are equal. log2 e times it would be -inf."""
    x, mask = torch.randn(3, 40), torch.zeros(3, 40)
    mask[1] = torch.finfo(torch.float32).min
    with target.active():
        got = llmops.softmax(x, mask=mask, backend=target.backend)
    torch.testing.assert_close(got, torch.softmax(x + mask, -1))


@TARGETS
@pytest.mark.parametrize(
    "shape", [(4, 1, 5, 1, 2, 1), (1, 5, 1, 2, 1), (5, 1, 2, 1), (5, 1, 2, 33)]
)
@pytest.mark.parametrize("causal", [False, True])
def test_softmax_mask_that_many_strides_walk(
    target: Target, shape: tuple[int, ...], causal: bool
) -> None:
    """Broadcast along every other dimension of x, of as many dimensions as x has and of fewer."""
    x, mask = torch.randn(4, 3, 5, 3, 2, 33), torch.randn(shape)
    with target.active():
        got = llmops.softmax(x, mask=mask, causal=causal, backend=target.backend)
    oracle = reference.softmax(x.double(), mask=mask.double(), causal=causal)
    yardstick = reference.softmax(x, mask=mask, causal=causal)
    assert_close(got, oracle, yardstick, factor=2.0, what="softmax")
