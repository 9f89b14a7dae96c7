"""swiglu and geglu: the conformance kit, and what is particular to them."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, given, settings

import llmops
from llmops import reference
from llmops.testing import Make, Target, assert_close, suite, targets
from llmops.testing.specs.swiglu import SPEC, SPEC_GEGLU, torch_geglu, torch_swiglu

globals().update(suite(SPEC))
globals().update(suite(SPEC_GEGLU))

TARGETS = pytest.mark.parametrize("target", targets("swiglu"), ids=str)


@TARGETS
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_swiglu_hypothesis(target: Target, data: st.DataObject) -> None:
    """Shapes, layouts, forms and dtypes at random."""
    shape = data.draw(st.lists(st.integers(1, 7), max_size=3))
    n = data.draw(st.integers(1, 70))
    dtype = data.draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16)))
    make = Make(dtype, target.device, seed=data.draw(st.integers(0, 1000)))
    step, gap = data.draw(st.integers(1, 2)), data.draw(st.integers(0, 3))
    fused = data.draw(st.booleans())
    width = 2 * n if fused else n
    tensors = []
    for _ in range(1 if fused else 2):
        x = make(*shape, width * step + gap, grad=False)[..., : width * step : step]
        order = data.draw(st.permutations(range(len(shape))))
        inverse = [order.index(i) for i in range(len(shape))]
        x = x.permute(*order, len(shape)).contiguous() if data.draw(st.booleans()) else x
        tensors.append(x.permute(*inverse, len(shape)) if x.shape[:-1] != tuple(shape) else x)
    got_kind = data.draw(st.sampled_from(("swiglu", "none", "tanh")))
    with target.active():
        if got_kind == "swiglu":
            got = llmops.swiglu(*tensors, backend=target.backend)
            oracle = reference.swiglu(*(t.double() for t in tensors))
            yardstick = torch_swiglu(*tensors)
        else:
            got = llmops.geglu(*tensors, approximate=got_kind, backend=target.backend)
            oracle = reference.geglu(*(t.double() for t in tensors), approximate=got_kind)
            yardstick = torch_geglu(*tensors, approximate=got_kind)
    # 1 + erf cancels for negative gates, in torch's too: its error is luck in a few elements.
    assume(got_kind != "none" or got.numel() >= 48)
    flat = (t.reshape(-1) for t in (got, oracle, yardstick))
    assert_close(*flat, factor=2.0, what=got_kind)


@TARGETS
def test_swiglu_far_out_keeps_relative_precision(target: Target) -> None:
    """silu of -80 is -1.4e-33: a product of 80 * log2 e rounded once would be off by 1e-5."""
    x = torch.linspace(-80, 0, 5001)
    with target.active():
        y = llmops.swiglu(x, torch.ones_like(x), backend=target.backend)
    exact = torch.nn.functional.silu(x.double())
    assert float(((y - exact).abs() / exact.abs().clamp(min=1e-37)).max()) < 1.5e-6


@TARGETS
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_swiglu_of_every_16_bit_gate(target: Target, dtype: torch.dtype) -> None:
    """Half a unit of the result's last place, and 1e-5 of it for the exponential beneath."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    up = torch.ones_like(x)
    given = x.clone().requires_grad_()
    with target.active():
        y = llmops.swiglu(given, up, backend=target.backend)
        (dx,) = torch.autograd.grad(y, given, up)
    wide = x.double()
    gate = torch.sigmoid(wide)
    y, exact = y.detach(), wide * gate
    odd = exact.isnan() | exact.isinf()
    assert torch.equal(y[odd].nan_to_num(7.0, 8.0, 9.0).double(),
                       exact[odd].nan_to_num(7.0, 8.0, 9.0))  # fmt: skip
    half = torch.finfo(dtype).eps / 2
    # Exponentials below 2^-126 count as 0.
    least = half * torch.finfo(dtype).smallest_normal + 2.0**-118
    assert ((y - exact).abs() <= (half + 1e-5) * exact.abs() + least)[~odd].all()
    rise = wide * gate * torch.sigmoid(-wide)
    bound = half * (gate + rise).abs() + 1e-5 * (gate + rise.abs()) + least
    assert ((dx - (gate + rise)).abs() <= bound)[~odd].all()


@TARGETS
def test_swiglu_fused_equals_split(target: Target) -> None:
    fused = torch.randn(6, 50, requires_grad=True)
    gate, up = (h.detach().clone().requires_grad_() for h in fused.chunk(2, -1))
    cotangent = torch.randn(6, 25)
    with target.active():
        a = llmops.swiglu(fused, backend=target.backend)
        b = llmops.swiglu(gate, up, backend=target.backend)
        (da,) = torch.autograd.grad(a, fused, cotangent)
        db = torch.autograd.grad(b, (gate, up), cotangent)
    assert torch.equal(a, b) and torch.equal(da, torch.cat(db, -1))


@pytest.mark.parametrize("op", (llmops.swiglu, llmops.geglu))
def test_swiglu_rejects_bad_input(op: object) -> None:
    x = torch.randn(3, 4)
    with pytest.raises(ValueError, match=r"without up, gate is a fused projection.*\(3, 3\)"):
        op(x[:, :3])  # type: ignore[operator]
    with pytest.raises(ValueError, match="up must have gate's shape"):
        op(x, x[:2])  # type: ignore[operator]
    with pytest.raises(TypeError, match="up has dtype bfloat16 and gate float32"):
        op(x, x.bfloat16())  # type: ignore[operator]
    with pytest.raises(TypeError, match="gate has dtype int64"):
        op(x.long())  # type: ignore[operator]
    with pytest.raises(ValueError, match="approximate must be"):
        llmops.geglu(x, approximate="erf")
    with pytest.raises(NotImplementedError, match="float64"):
        op(x.double(), backend="cpu")  # type: ignore[operator]
