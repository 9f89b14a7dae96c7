"""rope, rope_qk and rope_qk_: the conformance kit, and what is particular to them."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import llmops
from llmops import reference
from llmops.testing import Make, Sample, Target, assert_close, call, suite, targets
from llmops.testing.specs.rope import (
    SPEC,
    SPEC_QK,
    samples_qk,
    tables,
    token_major,
    torch_rope,
)

globals().update(suite(SPEC))
globals().update(suite(SPEC_QK))

TARGETS = pytest.mark.parametrize("target", targets("rope"), ids=str)
DTYPES = pytest.mark.parametrize(
    "dtype", (torch.float32, torch.bfloat16, torch.float16), ids=("fp32", "bf16", "fp16")
)


@TARGETS
@DTYPES
def test_rope_qk_in_place_equals_rope_qk(target: Target, dtype: torch.dtype) -> None:
    for sample in samples_qk(Make(dtype, target.device)):
        q, k = (x.detach().clone(memory_format=torch.preserve_format) for x in sample.args[:2])
        with target.active():
            kept = {**sample.kwargs, "backend": target.backend}
            want = llmops.rope_qk(q, k, *sample.args[2:], **kept)
            versions = q._version, k._version
            got = llmops.rope_qk_(q, k, *sample.args[2:], **kept)
        assert got[0] is q and got[1] is k
        assert (q._version, k._version) == (versions[0] + 1, versions[1] + 1)
        assert torch.equal(q, want[0]) and torch.equal(k, want[1]), sample.id


@TARGETS
def test_rope_qk_in_place_on_a_fused_projection(target: Target) -> None:
    """q and k as slices of one [B, T, (Hq + 2 Hk) D] buffer: v between them is not touched."""
    fused = torch.randn(2, 5, 8, 16)
    cos, sin = tables(Make(torch.float32, target.device), 5, 8)
    q, v, k = fused.split((4, 2, 2), 2)
    before = v.clone()
    want = llmops.rope_qk(q.transpose(1, 2), k.transpose(1, 2), cos, sin, backend="reference")
    with target.active():
        llmops.rope_qk_(q.transpose(1, 2), k.transpose(1, 2), cos, sin, backend=target.backend)
    assert torch.allclose(q.transpose(1, 2), want[0], atol=1e-6)
    assert torch.allclose(k.transpose(1, 2), want[1], atol=1e-6)
    assert torch.equal(v, before)


@TARGETS
def test_rope_qk_of_no_heads(target: Target) -> None:
    """Where one of the two has nothing in it the other is turned, and its rest copied."""
    x, none = torch.randn(2, 3, 5, 12), torch.empty(2, 0, 5, 12)
    cos, sin = tables(Make(torch.float32, target.device), 5, 4)
    with target.active():
        want = llmops.rope(x, cos, sin, backend=target.backend)
        _, k = llmops.rope_qk(none, x, cos, sin, backend=target.backend)
        q, _ = llmops.rope_qk(x, none, cos, sin, backend=target.backend)
        assert torch.equal(k, want) and torch.equal(q, want)
        llmops.rope_qk_(none, x, cos, sin, backend=target.backend)
    assert torch.equal(x, want)


def test_rope_qk_in_place_refuses_shared_memory() -> None:
    cos, sin = tables(Make(torch.float32), 4, 4)
    q, k = torch.randn(2, 2, 4, 8), torch.randn(2, 2, 4, 8)
    with pytest.raises(RuntimeError, match="q's elements share memory.*use llmops.rope_qk"):
        llmops.rope_qk_(q[:1].expand(2, 2, 4, 8), k, cos, sin)
    with pytest.raises(RuntimeError, match="k's elements share memory"):
        llmops.rope_qk_(q, torch.randn(100).as_strided((2, 2, 4, 8), (8, 4, 16, 1)), cos, sin)
    with pytest.raises(RuntimeError, match="q and k share memory"):
        llmops.rope_qk_(q, q, cos, sin)
    fused = torch.randn(2, 4, 6, 8).transpose(1, 2)
    with pytest.raises(RuntimeError, match="q and k share memory"):
        llmops.rope_qk_(fused[:, :3], fused[:, 2:4], cos, sin)
    with pytest.raises(RuntimeError, match="stride 2 in its last dimension"):
        llmops.rope_qk_(torch.randn(2, 2, 4, 16)[..., ::2], k, cos, sin)


def test_rope_qk_in_place_refuses_gradients() -> None:
    cos, sin = tables(Make(torch.float32), 4, 4)
    q, k = torch.randn(1, 2, 4, 8, requires_grad=True), torch.randn(1, 2, 4, 8)
    for operator in (
        lambda: llmops.rope_qk_(k, q, cos, sin),
        lambda: llmops.rope_qk_(q * 1, k, cos, sin),
        lambda: torch.ops.llmops.rope_qk_(q * 1, k, cos, sin, None, False, False, "cpu"),
    ):
        with pytest.raises(RuntimeError, match=r"requires a gradient.*use llmops.rope_qk,"):
            operator()
    with torch.no_grad():
        llmops.rope_qk_(q, k, cos, sin)
    # What autograd saved before must not be read after.
    w = torch.randn(1, 2, 4, 8, requires_grad=True)
    loss = (w * k).sum()
    llmops.rope_qk_(k, torch.randn(1, 2, 4, 8), cos, sin)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_rope_qk_in_place_refuses_transforms() -> None:
    """What is written in place would keep an old tangent, or meet no batching rule."""
    q, k = torch.randn(3, 2, 4, 5, 8), torch.randn(3, 2, 2, 5, 8)
    cos, sin = llmops.rope_tables(5, 8)

    def turned(q: Tensor, k: Tensor) -> Tensor:
        return llmops.rope_qk_(q.clone(), k.clone(), cos, sin)[0]

    with pytest.raises(NotImplementedError, match=r"vmap does not follow; use llmops.rope_qk$"):
        torch.func.vmap(turned)(q, k)
    with pytest.raises(NotImplementedError, match=r"forward-mode AD .* use llmops.rope_qk$"):
        torch.func.jvp(turned, (q[0], k[0]), (q[0], k[0]))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q[0], q[0])
        with pytest.raises(NotImplementedError, match="forward-mode AD"):
            llmops.rope_qk_(dual, k[0], cos, sin)
        llmops.rope_qk_(q[1], k[1], cos, sin)  # without tangents it goes on


def test_rope_qk_in_place_compiles() -> None:
    cos, sin = tables(Make(torch.float32), 4, 4)
    q, k = torch.randn(1, 2, 4, 8), torch.randn(1, 1, 4, 8)

    def step(q: Tensor, k: Tensor) -> Tensor:
        q, k = q * 2, k * 2
        llmops.rope_qk_(q, k, cos, sin)
        return q.sum(1) + k[:, 0]

    torch._dynamo.reset()
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(q, k)
    assert torch.equal(got, step(q, k))


@TARGETS
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_rope_hypothesis(target: Target, data: st.DataObject) -> None:
    """Shapes, layouts, table forms and dtypes at random."""
    b, h, t = (data.draw(st.integers(1, 5)) for _ in range(3))
    half, rest = data.draw(st.integers(0, 40)), data.draw(st.integers(0, 5))
    dtype = data.draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16)))
    make = Make(dtype, target.device, seed=data.draw(st.integers(0, 1000)))
    d = max(2 * half + rest, 1)
    x = make(b, h, t, d, grad=False)
    order = data.draw(st.permutations(range(4)))
    inverse_order = [order.index(i) for i in range(4)]
    x = x.permute(*order).contiguous().permute(*inverse_order)
    form = data.draw(st.sampled_from(("table", "ids", "ids2", "gathered", "gathered1")))
    ids = None
    if form.startswith("gathered"):
        cos, sin = tables(make, 1 if form == "gathered1" else b, t, half)
    else:
        cos, sin = tables(make, t + 3, half)
        if form != "table":
            shape = (t,) if form == "ids" else (b, t)
            kind = data.draw(st.sampled_from((torch.int32, torch.int64)))
            ids = make.ints(*shape, high=t + 3, dtype=kind)
    flags = {"interleaved": data.draw(st.booleans()), "inverse": data.draw(st.booleans())}
    with target.active():
        got = llmops.rope(x, cos, sin, ids, backend=target.backend, **flags)
    oracle = reference.rope(x.double(), cos, sin, ids, **flags)
    assert_close(got, oracle, torch_rope(x, cos, sin, ids, **flags), factor=2.0, what="rope")


@TARGETS
def test_rope_keeps_lengths_and_turns_back(target: Target) -> None:
    """A rotation: every pair keeps its length; scores depend on the distance of positions only."""
    cos, sin = llmops.rope_tables(64, 32)
    x = torch.randn(1, 2, 64, 32)
    with target.active():
        y = llmops.rope(x, cos, sin, backend=target.backend)
        back = llmops.rope(y, cos, sin, inverse=True, backend=target.backend)
        q = llmops.rope(x[:, :, :1].expand(1, 2, 64, 32), cos, sin, backend=target.backend)
        k = llmops.rope(x[:, :, 1:2].expand(1, 2, 64, 32), cos, sin, backend=target.backend)
    length = (x[..., :16] ** 2 + x[..., 16:] ** 2).sqrt()
    assert torch.allclose((y[..., :16] ** 2 + y[..., 16:] ** 2).sqrt(), length, atol=1e-5)
    assert torch.allclose(back, x, atol=1e-5)
    scores = q @ k.transpose(-1, -2)
    for offset in (0, 3, 20):
        along = scores.diagonal(offset, -2, -1)
        assert torch.allclose(along, along[..., :1].expand_as(along), atol=1e-4)


def test_rope_layout_follows_input() -> None:
    """Results and gradients lie in memory as the input does, in eager and under compile."""
    make = Make(torch.float32)
    cos, sin = tables(make, 5, 4)
    x = token_major(make, 2, 3, 5, 8)
    for fn in (llmops.rope, torch.compile(llmops.rope, fullgraph=True, backend="aot_eager")):
        y = fn(x, cos, sin)
        (dx,) = torch.autograd.grad(y, x, torch.ones(2, 3, 5, 8))
        assert y.transpose(1, 2).is_contiguous() and dx.transpose(1, 2).is_contiguous()
        assert fn(x.detach().contiguous(), cos, sin).is_contiguous()


def test_rope_float_tables_of_any_dtype() -> None:
    make = Make(torch.float32)
    x = make(1, 2, 5, 8, grad=False)
    cos, sin = tables(make, 5, 4, dtype=torch.bfloat16)
    assert torch.equal(llmops.rope(x, cos, sin), llmops.rope(x, cos.float(), sin.float()))


def test_rope_gradient_of_tables() -> None:
    make = Make(torch.float32)
    x, (cos, sin) = make(1, 2, 5, 8), tables(make, 5, 4)
    cos.requires_grad_()
    with pytest.raises(NotImplementedError, match=r'cos or sin requires a gradient.*"reference"'):
        llmops.rope(x, cos, sin)
    y = torch.ops.llmops.rope(x, cos, sin, None, False, False, False, "cpu")
    with pytest.raises(NotImplementedError, match="compute no gradient of cos and sin"):
        y.sum().backward()
    llmops.rope(x, cos, sin, backend="reference").sum().backward()
    assert cos.grad is not None and bool(cos.grad.any())
    with torch.no_grad():
        llmops.rope(x, cos, sin)


@pytest.mark.parametrize("backend", ("cpu", "reference"))
def test_rope_rejects_positions_outside_the_tables(backend: str) -> None:
    cos, sin = tables(Make(torch.float32), 6, 4)
    x = torch.randn(1, 2, 3, 8)
    for bad in (-1, 6, 2**40):
        ids = torch.tensor([0, bad, 1])
        for fn in (
            lambda ids: llmops.rope(x, cos, sin, ids, backend=backend),
            lambda ids: llmops.rope_qk(x, x, cos, sin, ids, backend=backend),
            lambda ids: llmops.rope_qk_(x.clone(), x.clone(), cos, sin, ids, backend=backend),
        ):
            with pytest.raises(IndexError, match=rf"position_ids holds {bad}.*6 rows.*rope_tables"):
                fn(ids)
    empty = torch.empty(0, 4)
    with pytest.raises(IndexError, match="position_ids holds 0"):
        llmops.rope(x, empty, empty, torch.zeros(3, dtype=torch.int64), backend=backend)


def test_rope_rejects_bad_input() -> None:
    make = Make(torch.float32)
    cos, sin = tables(make, 6, 4)
    x = torch.randn(1, 2, 3, 8)
    with pytest.raises(TypeError, match="rope: x has dtype int64"):
        llmops.rope(x.long(), cos, sin)
    with pytest.raises(ValueError, match=r"x must be \[B, H, T, D\]; got shape \(2, 3, 8\)"):
        llmops.rope(x[0], cos, sin)
    with pytest.raises(ValueError, match=r"cos and sin must both be.*\(6, 4\) and \(6, 3\)"):
        llmops.rope(x, cos, sin[:, :3])
    with pytest.raises(ValueError, match="5 columns, which turn 10 elements.*head dim is 8"):
        llmops.rope(x, *tables(make, 6, 5))
    with pytest.raises(ValueError, match="3 tokens need as many rows.*have 2"):
        llmops.rope(x, cos[:2], sin[:2])
    with pytest.raises(ValueError, match="already gathered"):
        llmops.rope(x, *tables(make, 1, 3, 4), torch.arange(3))
    with pytest.raises(ValueError, match=r"B 1 or 1 and T 3; got \(2, 3, 4\)"):
        llmops.rope(x, *tables(make, 2, 3, 4))
    with pytest.raises(TypeError, match="position_ids must be an int64 or int32 Tensor"):
        llmops.rope(x, cos, sin, torch.zeros(3))
    with pytest.raises(ValueError, match=r"position_ids must be \[T\] or \[B, T\].*got \(4,\)"):
        llmops.rope(x, cos, sin, torch.arange(4))
    with pytest.raises(ValueError, match="must agree in B, T and D"):
        llmops.rope_qk(x, torch.randn(1, 2, 4, 8), cos, sin)
    with pytest.raises(TypeError, match="q has dtype float32 and k bfloat16"):
        llmops.rope_qk(x, x.bfloat16(), cos, sin)
    with pytest.raises(TypeError, match="cos has dtype int64"):
        llmops.rope(x, cos.long(), sin)


def test_rope_raw_operator_checks_memory() -> None:
    """The compiled operator by itself never reads outside its tensors."""
    raw = torch.ops.llmops_cpu.rope
    x, (cos, sin) = torch.randn(1, 2, 3, 8), tables(Make(torch.float32), 6, 4)
    for args in (
        (x[0], cos, sin, None),
        (x, cos, sin[:3], None),
        (x, cos[:2], sin[:2], None),
        (x, *tables(Make(torch.float32), 6, 5), None),
        (x, *tables(Make(torch.float32), 2, 3, 4), None),
        (x, cos.double(), sin.double(), None),
        (x, cos, sin, torch.arange(4)),
        (x, cos, sin, torch.zeros(3)),
        (x, cos, sin, torch.tensor([0, 6, 1])),
    ):
        with pytest.raises((RuntimeError, IndexError), match="llmops.rope"):
            raw(*args, False, False, False)


def test_rope_double_and_reference_agree() -> None:
    """fp64 runs on the reference, in fp64."""
    make = Make(torch.float64)
    x = make(1, 2, 3, 8)
    cos, sin = tables(make, 3, 4, dtype=torch.float64)
    results, _ = call(llmops.rope, Sample("", (x, cos, sin)), backend="reference")
    assert results[0].dtype == torch.float64
    with pytest.raises(NotImplementedError, match="float64"):
        llmops.rope(x, cos, sin, backend="cpu")
