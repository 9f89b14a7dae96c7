"""rms_norm and add_rms_norm: the conformance kit, and what is particular to them."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

import llmops
import llmops.nn
from llmops import reference
from llmops.testing import Target, assert_close, suite, targets
from llmops.testing._core import DTYPES
from llmops.testing.specs.rms_norm import SPEC, SPEC_ADD, torch_add_rms_norm, torch_rms_norm

globals().update(suite(SPEC))
globals().update(suite(SPEC_ADD))

TARGETS = pytest.mark.parametrize("target", targets("rms_norm"), ids=str)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_rms_norm_default_eps_is_that_of_torch(dtype: torch.dtype) -> None:
    x = torch.full((2, 8), 1e-4).to(dtype)  # x^2 is below the epsilons in question
    got = llmops.rms_norm(x, 8, backend="reference" if dtype == torch.float64 else None)
    assert torch.allclose(got, F.rms_norm(x, (8,)), rtol=2 * torch.finfo(dtype).eps)


@TARGETS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_rms_norm_normalizes_the_sum_as_returned(target: Target, dtype: torch.dtype) -> None:
    """y is rms_norm of h itself, to the bit: the statistics are those of the rounded sum."""
    x, residual, weight = (torch.randn(s).to(dtype) for s in ((7, 333), (7, 333), (333,)))
    with target.active():
        y, h = llmops.add_rms_norm(x, residual, 333, weight, 1e-6, backend=target.backend)
        assert torch.equal(h, x + residual)
        assert torch.equal(y, llmops.rms_norm(h, 333, weight, 1e-6, backend=target.backend))


@TARGETS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm_nan_stays_in_row(target: Target, dtype: torch.dtype) -> None:
    x, dy = torch.randn(9, 70).to(dtype), torch.randn(9, 70).to(dtype)
    clean = x.clone().requires_grad_()
    dirty = x.clone()
    dirty[4, 69], dirty[6, 0] = float("nan"), float("inf")
    dirty.requires_grad_()
    with target.active():
        want = llmops.rms_norm(clean, 70, eps=1e-6, backend=target.backend)
        got = llmops.rms_norm(dirty, 70, eps=1e-6, backend=target.backend)
        want.backward(dy)
        got.backward(dy)
    others = [0, 1, 2, 3, 5, 7, 8]
    assert clean.grad is not None and dirty.grad is not None
    assert torch.equal(got[others], want[others])
    assert torch.equal(dirty.grad[others], clean.grad[others])
    assert bool(got[4].isnan().all()) and bool(got[6, 0].isnan())


@pytest.mark.parametrize("which", ["y", "h", "both"])
def test_add_rms_norm_gradient_of_each_output(which: str) -> None:
    """A gradient for one output alone, or both; parameters that ask for none get none."""
    torch.manual_seed(0)
    x, residual = (torch.randn(6, 50, requires_grad=True) for _ in range(2))
    weight = torch.randn(50, requires_grad=which != "h")

    def loss(y: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(())
        if which != "h":
            total = total + (y * y.detach().cos()).sum()
        return total + (h.sin()).sum() if which != "y" else total

    wanted = [x, residual] + ([weight] if which != "h" else [])
    got = torch.autograd.grad(loss(*llmops.add_rms_norm(x, residual, 50, weight, 1e-6)), wanted)
    want = torch.autograd.grad(loss(*torch_add_rms_norm(x, residual, 50, weight, 1e-6)), wanted)
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, atol=1e-5, rtol=1e-5)


def test_rms_norm_backward_computes_only_what_is_asked() -> None:
    x, weight = torch.randn(6, 50), torch.randn(50, requires_grad=True)
    full = torch.autograd.grad(
        llmops.rms_norm(x.requires_grad_(), 50, weight, 1e-6).sum(), (x, weight)
    )
    only_weight = llmops.rms_norm(x.detach(), 50, weight, 1e-6).sum()
    assert torch.equal(torch.autograd.grad(only_weight, weight)[0], full[1])
    only_x = llmops.rms_norm(x, 50, weight.detach(), 1e-6).sum()
    assert torch.equal(torch.autograd.grad(only_x, x)[0], full[0])


@TARGETS
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_rms_norm_hypothesis(target: Target, data: st.DataObject) -> None:
    """Shapes, strides, residuals and dtypes at random."""
    shape = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    n = data.draw(st.integers(2, 90))
    dtype = data.draw(st.sampled_from(DTYPES))
    step, gap = data.draw(st.integers(1, 2)), data.draw(st.integers(0, 3))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    x = torch.randn(*shape, n * step + gap).to(dtype)[..., : n * step : step]
    order = data.draw(st.permutations(range(x.dim() - 1)))
    x = x.permute(*order, x.dim() - 1)
    offset = data.draw(st.sampled_from((0.0, 1.0)))
    weight = torch.randn(n).to(data.draw(st.sampled_from(DTYPES)))
    how = {"eps": 10 ** data.draw(st.floats(-8, 0)), "weight_offset": offset}
    wide = (weight.double(),)
    if data.draw(st.booleans()):
        residual = torch.randn(x.shape).to(data.draw(st.sampled_from(DTYPES)))
        with target.active():
            got = llmops.add_rms_norm(x, residual, n, weight, backend=target.backend, **how)
        oracle = reference.add_rms_norm(x.double(), residual.double(), n, *wide, **how)
        yardstick = torch_add_rms_norm(x, residual, n, weight, **how)
    else:
        with target.active():
            got = (llmops.rms_norm(x, n, weight, backend=target.backend, **how),)
        oracle = (reference.rms_norm(x.double(), n, *wide, **how),)
        yardstick = (torch_rms_norm(x, n, weight, **how),)
    for g, o, y in zip(got, oracle, yardstick, strict=True):
        assert g.dtype == y.dtype
        assert_close(g, o, y, factor=2.0, what="rms_norm")


@pytest.mark.usefixtures("common_cache")
def test_rms_norm_beyond_the_cache() -> None:
    """Outputs larger than the last-level cache are written past it: the same values."""
    x, residual, weight = torch.randn(4200, 2064), torch.randn(4200, 2064), torch.randn(2064)
    y, h = llmops.add_rms_norm(x, residual, 2064, weight, 1e-6)
    assert torch.equal(h, x + residual)
    parts = [llmops.rms_norm(part, 2064, weight, 1e-6) for part in h.split(500)]
    assert torch.equal(y, torch.cat(parts))
    assert torch.equal(llmops.rms_norm(h, 2064, weight, 1e-6), y)


def test_rms_norm_rejects_bad_input() -> None:
    x, weight = torch.randn(3, 4), torch.randn(4)
    with pytest.raises(TypeError, match=r"llmops.rms_norm: x has dtype int64.*x\.float\(\)"):
        llmops.rms_norm(torch.ones(3, 4, dtype=torch.int64), 4)
    with pytest.raises(TypeError, match="x must be a Tensor; got list"):
        llmops.rms_norm([1.0, 2.0], 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"normalized_shape must be x's last.*got 3.*\(3, 4\)"):
        llmops.rms_norm(x, 3)
    with pytest.raises(ValueError, match="normalized_shape must be x's last"):
        llmops.rms_norm(x, ())
    with pytest.raises(ValueError, match=r"weight must have normalized_shape \(4,\); got \(3,\)"):
        llmops.rms_norm(x, 4, torch.ones(3))
    with pytest.raises(TypeError, match="weight has dtype int64"):
        llmops.rms_norm(x, 4, torch.ones(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="weight is on meta and x on cpu; move one"):
        llmops.rms_norm(x, 4, weight.to("meta"))
    with pytest.raises(ValueError, match=r"residual must have x's shape \(3, 4\); got \(4,\)"):
        llmops.add_rms_norm(x, weight, 4)
    with pytest.raises(ValueError, match="residual is on meta"):
        llmops.add_rms_norm(x, x.to("meta"), 4)
    with pytest.raises(NotImplementedError, match=r"float64.*Use backend="):
        llmops.rms_norm(x, 4, weight.double(), backend="cpu")
    with pytest.raises(ValueError, match="backend is one of"):
        llmops.rms_norm(x, 4, backend="gpu")


def test_rms_norm_module() -> None:
    """As torch.nn.RMSNorm: constructor, state dict, values; Gemma's form starts at weight zero."""
    torch.manual_seed(0)
    theirs = torch.nn.RMSNorm((4, 6), eps=1e-4, dtype=torch.float32)
    torch.nn.init.normal_(theirs.weight)
    ours = llmops.nn.RMSNorm((4, 6), eps=1e-4, dtype=torch.float32)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 4, 6)
    assert torch.allclose(ours(x), theirs(x), atol=1e-6)
    assert list(ours.state_dict()) == ["weight"]
    assert llmops.nn.RMSNorm(8, elementwise_affine=False).weight is None
    gemma = llmops.nn.RMSNorm(6, weight_offset=1.0)
    assert bool((gemma.weight == 0).all()) and "weight_offset=1.0" in repr(gemma)
    assert torch.allclose(gemma(x), torch.nn.RMSNorm(6)(x), atol=1e-6)
