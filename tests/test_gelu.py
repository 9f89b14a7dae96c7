"""gelu: the conformance kit, and what is particular to it."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import llmops
from llmops.testing import Target, suite, targets
from llmops.testing.specs.gelu import SPEC

globals().update(suite(SPEC))

TARGETS = pytest.mark.parametrize("target", targets("gelu"), ids=str)


@TARGETS
def test_gelu_error_over_the_whole_range(target: Target) -> None:
    """The stated bounds, for the function, its derivative and the normal distribution beneath."""
    x = torch.cat((torch.linspace(-8, 8, 400001), torch.linspace(-100, 100, 20001)))
    wide = x.double().requires_grad_()
    for approximate in ("none", "tanh"):
        exact = F.gelu(wide, approximate=approximate)
        if approximate == "none":  # without the cancellation of 1 + erf
            exact = wide * 0.5 * torch.special.erfc(-wide / math.sqrt(2))
        (slope,) = torch.autograd.grad(exact.sum(), wide)
        given = x.clone().requires_grad_()
        with target.active():
            y = llmops.gelu(given, approximate=approximate, backend=target.backend)
            (dx,) = torch.autograd.grad(y.sum(), given)
        y, exact = y.detach(), exact.detach()
        error = (y - exact).abs() / x.abs().clamp(min=1)
        assert float(error.max()) < 3e-7, approximate
        assert float((dx - slope).abs().max()) < (4e-7 if approximate == "none" else 3e-6)
        assert not bool((y[x < -6].abs() > 1e-6).any()), "does not vanish far out"
        near = (x < 0) & (x > -3)
        relative = ((y - exact).abs() / exact.abs().clamp(min=1e-30))[near]
        assert float(relative.max()) < 3e-4


@TARGETS
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("approximate", ("none", "tanh"))
def test_gelu_of_every_16_bit_value(target: Target, dtype: torch.dtype, approximate: str) -> None:
    """Half a unit of the result's last place, and what the approximations beneath it state."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    x = x[x.abs() < 3e3]
    wide = x.double().requires_grad_()
    # Without the cancellation of 1 + erf and 1 + tanh.
    exact = wide * 0.5 * torch.special.erfc(-wide / math.sqrt(2))
    if approximate == "tanh":
        exact = wide * torch.sigmoid(math.sqrt(8 / math.pi) * (wide + 0.044715 * wide**3))
    (slope,) = torch.autograd.grad(exact.sum(), wide)
    given = x.clone().requires_grad_()
    with target.active():
        y = llmops.gelu(given, approximate=approximate, backend=target.backend)
        (dx,) = torch.autograd.grad(y, given, torch.ones_like(y))
    half = torch.finfo(dtype).eps / 2
    # Where an exponential of the other sign overflows, bf16 is 0, and Phi is beyond -5.35.
    least = half * torch.finfo(dtype).smallest_normal if dtype == torch.float16 else 2.0**-124
    exact, wide = exact.detach(), wide.detach()
    relative = half + torch.where(wide > -3, 3e-4, 7e-3) * (approximate == "none") + 1e-5
    flat = torch.where(wide > -5.3, 3e-6 * wide.abs().clamp(max=6), 3e-7) * (approximate == "none")
    bound = relative * exact.abs() + flat * (wide.abs() > 1e-30) + least
    assert ((y.detach() - exact).abs() <= bound).all()
    assert ((dx - slope).abs() <= (half + 1e-5) * slope.abs() + 2e-5).all()


@TARGETS
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("approximate", ("none", "tanh"))
def test_gelu_special_values(target: Target, approximate: str, dtype: torch.dtype) -> None:
    x = torch.tensor([math.nan, math.inf, -math.inf, 1e20, -1e20, 1e38, -1e38, 0.0, -0.0]).to(dtype)
    with target.active():
        y = llmops.gelu(x, approximate=approximate, backend=target.backend)
        given = x[3:].clone().requires_grad_()
        llmops.gelu(given, approximate=approximate, backend=target.backend).sum().backward()
    assert y[0].isnan() and y[1] == math.inf and y[2].isnan()
    assert y[3:].tolist() == [x[3], 0.0, x[5], 0.0, 0.0, 0.0]
    assert given.grad is not None
    assert given.grad.tolist() == [1.0, 0.0, 1.0, 0.0, 0.5, 0.5]


def test_gelu_rejects_bad_input() -> None:
    with pytest.raises(ValueError, match=r'approximate must be "none" or "tanh"; got \'fast\''):
        llmops.gelu(torch.randn(3), approximate="fast")
    with pytest.raises(TypeError, match="gelu: x has dtype int64"):
        llmops.gelu(torch.ones(3, dtype=torch.int64))
    with pytest.raises(NotImplementedError, match="float64"):
        llmops.gelu(torch.randn(3).double(), backend="cpu")
