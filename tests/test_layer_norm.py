"""layer_norm and add_layer_norm: the conformance kit, and what is particular to them."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

import llmops
import llmops.nn
from llmops import reference
from llmops.testing import Target, assert_close, suite, targets
from llmops.testing._core import DTYPES
from llmops.testing.specs.layer_norm import SPEC, SPEC_ADD, torch_add_layer_norm, torch_layer_norm

globals().update(suite(SPEC))
globals().update(suite(SPEC_ADD))

TARGETS = pytest.mark.parametrize("target", targets("layer_norm"), ids=str)
# Only the CPU's kernels have one.
SHORT_WAYS = pytest.mark.parametrize(
    "target", [t for t in targets("layer_norm") if t.backend == "cpu"], ids=str
)


@TARGETS
@pytest.mark.parametrize("n", [7, 100, 4096])
@pytest.mark.parametrize("mean", [25_000.0, -25_000.0])
def test_layer_norm_large_mean(target: Target, mean: float, n: int) -> None:
    """Residual streams reach 25,000: the variance must not drown in the mean's square.

    Two ulp of the deviation are allowed, not of the mean: x - k is exact for x near k.
    """
    torch.manual_seed(0)
    x = (torch.randn(5, n) + mean).requires_grad_()
    dy = torch.randn(5, n)
    wide = x.detach().double().requires_grad_()
    oracle = reference.layer_norm(wide, n)
    oracle.backward(dy.double())
    with target.active():
        y = llmops.layer_norm(x, n, backend=target.backend)
        y.backward(dy)
    assert x.grad is not None and wide.grad is not None
    assert torch.allclose(y.double(), oracle, atol=4e-6, rtol=0)
    assert torch.allclose(x.grad.double(), wide.grad, atol=1e-5, rtol=0)


@TARGETS
@pytest.mark.parametrize("at", ["first", "last"])
def test_layer_norm_outliers(target: Target, at: str) -> None:
    """A few huge values, at the row's begin (from where the shift is taken) or at its end."""
    torch.manual_seed(0)
    x = torch.randn(4, 1000)
    x[:, slice(0, 16) if at == "first" else slice(-3, None)] = 25_000.0
    oracle = reference.layer_norm(x.double(), 1000)
    with target.active():
        y = llmops.layer_norm(x, 1000, backend=target.backend)
    assert torch.allclose(y.double(), oracle, atol=0, rtol=4e-6)


@TARGETS
def test_layer_norm_constant_rows(target: Target) -> None:
    """Deviation zero: y is the bias, whatever the constant; no negative variance, no NaN."""
    x = torch.tensor([0.0, 0.1, -3e4, 1e10])[:, None].expand(4, 77)
    bias = torch.randn(77)
    with target.active():
        y = llmops.layer_norm(x[:3], 77, None, bias, backend=target.backend)
        assert torch.allclose(y, bias.expand(3, 77), atol=1e-4)
        assert bool(llmops.layer_norm(x, 77, backend=target.backend).isfinite().all())


@TARGETS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_layer_norm_normalizes_the_sum_as_returned(target: Target, dtype: torch.dtype) -> None:
    """y is layer_norm of h itself, to the bit: the statistics are those of the rounded sum."""
    x, residual, weight = (torch.randn(s).to(dtype) for s in ((7, 333), (7, 333), (333,)))
    with target.active():
        y, h = llmops.add_layer_norm(x, residual, 333, weight, weight, backend=target.backend)
        assert torch.equal(h, x + residual)
        assert torch.equal(y, llmops.layer_norm(h, 333, weight, weight, backend=target.backend))


@TARGETS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_norm_nan_stays_in_row(target: Target, dtype: torch.dtype) -> None:
    x, dy = torch.randn(9, 70).to(dtype), torch.randn(9, 70).to(dtype)
    clean = x.clone().requires_grad_()
    dirty = x.clone()
    dirty[4, 69], dirty[6, 0] = float("nan"), float("inf")
    dirty.requires_grad_()
    with target.active():
        want = llmops.layer_norm(clean, 70, backend=target.backend)
        got = llmops.layer_norm(dirty, 70, backend=target.backend)
        want.backward(dy)
        got.backward(dy)
    others = [0, 1, 2, 3, 5, 7, 8]
    assert clean.grad is not None and dirty.grad is not None
    assert torch.equal(got[others], want[others])
    assert torch.equal(dirty.grad[others], clean.grad[others])
    assert bool(got[4].isnan().all()) and bool(got[6].isnan().all())


@pytest.mark.parametrize("which", ["y", "h", "both"])
def test_add_layer_norm_gradient_of_each_output(which: str) -> None:
    """A gradient for one output alone, or both; parameters that ask for none get none."""
    torch.manual_seed(0)
    x, residual = (torch.randn(6, 50, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(50, requires_grad=which != "h") for _ in range(2))

    def loss(y: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(())
        if which != "h":
            total = total + (y * y.detach().cos()).sum()
        return total + (h.sin()).sum() if which != "y" else total

    wanted = [x, residual] + ([weight, bias] if which != "h" else [])
    arguments = (x, residual, 50, weight, bias)
    got = torch.autograd.grad(loss(*llmops.add_layer_norm(*arguments)), wanted)
    want = torch.autograd.grad(loss(*torch_add_layer_norm(*arguments)), wanted)
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, atol=1e-5, rtol=1e-5)


@TARGETS
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_layer_norm_hypothesis(target: Target, data: st.DataObject) -> None:
    """Shapes, strides, residuals and dtypes at random."""
    shape = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    n = data.draw(st.integers(2, 90))
    dtype = data.draw(st.sampled_from(DTYPES))
    step, gap = data.draw(st.integers(1, 2)), data.draw(st.integers(0, 3))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    x = torch.randn(*shape, n * step + gap).to(dtype)[..., : n * step : step]
    order = data.draw(st.permutations(range(x.dim() - 1)))
    x = x.permute(*order, x.dim() - 1)
    parameters = [torch.randn(n).to(data.draw(st.sampled_from(DTYPES))) for _ in range(2)]
    wide = [p.double() for p in parameters]
    eps = 10 ** data.draw(st.floats(-7, 0))
    if data.draw(st.booleans()):
        residual = torch.randn(x.shape).to(data.draw(st.sampled_from(DTYPES)))
        with target.active():
            got = llmops.add_layer_norm(x, residual, n, *parameters, eps, backend=target.backend)
        oracle = reference.add_layer_norm(x.double(), residual.double(), n, *wide, eps)
        yardstick = torch_add_layer_norm(x, residual, n, *parameters, eps)
    else:
        with target.active():
            got = (llmops.layer_norm(x, n, *parameters, eps, backend=target.backend),)
        oracle = (reference.layer_norm(x.double(), n, *wide, eps),)
        yardstick = (torch_layer_norm(x, n, *parameters, eps),)
    for g, o, y in zip(got, oracle, yardstick, strict=True):
        assert g.dtype == y.dtype
        assert_close(g, o, y, factor=2.0, what="layer_norm")


@pytest.mark.usefixtures("common_cache")
def test_layer_norm_beyond_the_cache() -> None:
    """Outputs larger than the last-level cache are written past it: the same values."""
    x, residual, weight = torch.randn(4200, 2064), torch.randn(4200, 2064), torch.randn(2064)
    y, h = llmops.add_layer_norm(x, residual, 2064, weight)
    assert torch.equal(h, x + residual)
    parts = [llmops.layer_norm(part, 2064, weight) for part in h.split(500)]
    assert torch.equal(y, torch.cat(parts))
    assert torch.equal(llmops.layer_norm(h, 2064, weight), y)


def test_layer_norm_rejects_bad_input() -> None:
    x, weight = torch.randn(3, 4), torch.randn(4)
    with pytest.raises(TypeError, match=r"llmops.layer_norm: x has dtype int64.*x\.float\(\)"):
        llmops.layer_norm(torch.ones(3, 4, dtype=torch.int64), 4)
    with pytest.raises(ValueError, match=r"normalized_shape must be x's last.*got 3.*\(3, 4\)"):
        llmops.layer_norm(x, 3)
    with pytest.raises(TypeError, match=r"got a Tensor of shape \(4,\); as in torch, the weight"):
        llmops.layer_norm(torch.ones(3, 4), torch.ones(4))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"bias must have normalized_shape \(4,\); got \(1,\)"):
        llmops.layer_norm(x, 4, weight, torch.ones(1))
    with pytest.raises(TypeError, match="bias must be a Tensor; got float"):
        llmops.layer_norm(x, 4, weight, 1e-5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="bias is on meta and x on cpu; move one"):
        llmops.layer_norm(x, 4, weight, weight.to("meta"))
    with pytest.raises(ValueError, match=r"residual must have x's shape \(3, 4\); got \(3, 1\)"):
        llmops.add_layer_norm(x, x[:, :1], 4)
    with pytest.raises(TypeError, match="residual has dtype int64"):
        llmops.add_layer_norm(x, x.long(), 4)
    with pytest.raises(NotImplementedError, match=r"float64.*Use backend="):
        llmops.add_layer_norm(x, x.double(), 4, backend="cpu")


def test_layer_norm_module() -> None:
    """As torch.nn.LayerNorm: constructor, state dict, values."""
    torch.manual_seed(0)
    theirs = torch.nn.LayerNorm((4, 6), eps=1e-4)
    for p in theirs.parameters():
        torch.nn.init.normal_(p)
    ours = llmops.nn.LayerNorm((4, 6), eps=1e-4)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 4, 6)
    assert torch.allclose(ours(x), theirs(x), atol=1e-6)
    assert list(llmops.nn.LayerNorm(8, bias=False).state_dict()) == ["weight"]
    assert not llmops.nn.LayerNorm(8, elementwise_affine=False).state_dict()


def test_layer_norm_without_gradients_refuses_a_list_by_name() -> None:
    """The short way, which checks nothing itself, leaves the words to the checks."""
    x = torch.randn(2, 4)
    with torch.no_grad(), pytest.raises(TypeError, match="weight must be a Tensor; got list"):
        llmops.layer_norm(x, (4,), [1.0] * 4)  # type: ignore[arg-type]


@SHORT_WAYS
@pytest.mark.parametrize("eps", [1e-5, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layer_norm_short_way_is_the_long_way(
    target: Target, dtype: torch.dtype, eps: float
) -> None:
    """A call that names no backend goes past the checks: the same bits, whatever is left out."""
    x, residual = torch.randn(2, 3, 37, dtype=dtype)
    weight, bias = torch.randn(2, 37, dtype=dtype)
    with target.active(), torch.no_grad():
        for parameters in ((None, None), (weight, None), (None, bias), (weight, bias)):
            want, got = (
                (
                    llmops.layer_norm(x, 37, *parameters, eps, backend=way),
                    *llmops.add_layer_norm(x, residual, 37, *parameters, eps, backend=way),
                )
                for way in ("cpu", None)
            )
            assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
