"""linear: the conformance kit, and what is particular to it."""

from __future__ import annotations

import itertools
import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import llmops
from llmops import dispatch
from llmops.backends import cpu
from llmops.testing import Target, suite, targets
from llmops.testing.specs.linear import SPEC

globals().update(suite(SPEC))

TARGETS = pytest.mark.parametrize("target", targets("linear"), ids=str)
DTYPES = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)


@pytest.fixture
def fresh_decisions() -> Iterator[None]:
    """Decisions are kept per call, not per instruction set: forget them around a test."""
    dispatch.clear()
    yield
    dispatch.clear()


@TARGETS
@DTYPES
def test_linear_bits_do_not_depend_on_threads(target: Target, dtype: torch.dtype) -> None:
    before = torch.get_num_threads()
    weight, bias = torch.randn(1031, 1100).to(dtype), torch.randn(1031).to(dtype)
    try:
        for rows in (1, 2, 7, 13, 20, 30, 47, 100, 130):
            x = torch.randn(rows, 1100).to(dtype)
            found = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                with target.active():
                    found.append(llmops.linear(x, weight, bias, backend="cpu"))
            assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    finally:
        torch.set_num_threads(before)


@TARGETS
@DTYPES
def test_linear_matmul_of_any_layout(target: Target, dtype: torch.dtype) -> None:
    """Tiles, blocks and panels that end anywhere, sums in several parts, and a dimension that is
    dense in neither operand, either or both."""
    matmul = torch.ops.llmops_cpu.matmul
    shapes = [
        (1, 1, 1),
        (4, 0, 5),
        (0, 3, 2),
        (5, 7, 9),
        (97, 300, 33),
        (130, 513, 1030),
        (300, 70, 3),
        (40, 1700, 70),
        (530, 800, 70),
        (2060, 33, 40),
        (1030, 780, 300),
        (70, 2400, 530),
        (530, 1200, 530),
    ]
    for m, k, n in shapes:
        for a in (torch.randn(m, k), torch.randn(k, m).t(), torch.randn(2 * m, 2 * k)[::2, ::2]):
            for b in (torch.randn(k, n), torch.randn(n, k + 3)[:, :k].t()):
                x, w = a.to(dtype), b.to(dtype)
                with target.active():
                    got = matmul(x, w)
                assert got.dtype == dtype and got.shape == (m, n)
                # One rounding of the result, and of each of k fp32 sums.
                most = x.double().abs() @ w.double().abs()
                bound = most * (torch.finfo(dtype).eps / 2 + (k + 1) * 2.0**-24) + 2.0**-24
                assert ((got.double() - x.double() @ w.double()).abs() <= bound).all(), (m, k, n)
    x = torch.ones(3, 2)
    x[1, 1] = float("nan")
    with target.active():
        assert matmul(x, torch.zeros(2, 4)).isnan().any(1).tolist() == [False, True, False]
    for bad in (torch.ones(3, 4), torch.ones(2, 4, dtype=torch.float64), torch.ones(2)):
        with pytest.raises(RuntimeError, match="of one dtype"):
            matmul(x, bad)


@TARGETS
def test_linear_matmul_into(target: Target) -> None:
    """In place of what is there and in addition to it, and nothing beside it."""
    into = torch.ops.llmops_cpu.matmul_into
    for m, k, n in ((3, 5, 7), (70, 900, 65), (300, 40, 33)):
        a, b = torch.randn(m, k), torch.randn(k, n)
        rows = torch.full((m, n + 5), 7.0)
        y = rows[:, 2 : n + 2]
        want = a.double() @ b.double()
        with target.active():
            into(a, b, y)
            assert (y - want).abs().max() < 1e-3
            into(a, b, y, True)
        assert (y - 2 * want).abs().max() < 2e-3
        assert (rows[:, :2] == 7).all() and (rows[:, n + 2 :] == 7).all()
    half = torch.ones(2, 2).half()
    for arguments, match in (
        ((a, b, y[:1]), "y must be"),
        ((a, b, y.double()), "Double is not supported"),
        ((torch.ones(2, 2), torch.ones(2, 2), torch.ones(2, 4)[:, ::2]), "with dense rows"),
        ((half, half, half, True), "must be fp32"),
        ((a, a, y), "of one dtype"),
    ):
        with pytest.raises(RuntimeError, match=match):
            into(*arguments)


@TARGETS
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_linear_matmul_into_fp32(target: Target, dtype: torch.dtype) -> None:
    """By AMX products of 16 bits are added to fp32 without a rounding in between; else refused."""
    into = torch.ops.llmops_cpu.matmul_into
    for m, k, n in ((3, 5, 7), (70, 2400, 65), (600, 40, 33)):
        for a in (torch.randn(m, k).to(dtype), torch.randn(k, m).to(dtype).t()):
            b, y = torch.randn(k, n).to(dtype), torch.zeros(m, n + 3)[:, :n]
            with target.active():
                if target.isa != "amx":
                    with pytest.raises(RuntimeError, match="a's dtype, or be fp32 where AMX"):
                        into(a, b, y)
                    return
                into(a, b, y)
                into(a, b, y, True)
            most = a.double().abs() @ b.double().abs()
            assert ((y - 2 * (a.double() @ b.double())).abs() <= (k + 1) * 2.0**-24 * most).all()


@pytest.fixture
def precision() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")


@TARGETS
@pytest.mark.usefixtures("precision", "fresh_decisions")
@pytest.mark.parametrize("setting", ("high", "medium"))
def test_linear_hears_float32_matmul_precision(target: Target, setting: str) -> None:
    """On AMX products of many fp32 rows, gradients' too, count 16 bits at "high", 8 at "medium",
    and no fewer; elsewhere and of few rows all 24."""
    for rows in (8, 70, 1100):
        leaves = [torch.randn(rows, 300), torch.randn(90, 300), torch.randn(90)]
        for t in leaves:
            t.requires_grad_()
        grad = torch.randn(rows, 90)

        def results(leaves: list[torch.Tensor], grad: torch.Tensor) -> list[torch.Tensor]:
            with torch.no_grad():
                alone = llmops.linear(*leaves, backend="cpu")
            y = llmops.linear(*leaves, backend="cpu")
            assert torch.equal(y, alone)
            return [y, *torch.autograd.grad(y, leaves[:2], grad)]

        with target.active():
            whole = results(leaves, grad)
            torch.set_float32_matmul_precision(setting)
            found = results(leaves, grad)
            with torch.no_grad():
                assert torch.equal(llmops.linear(*leaves, backend="cpu"), found[0])
            torch.set_float32_matmul_precision("highest")
        x, w, bias, dy = (t.detach().double() for t in (*leaves, grad))
        factors = ((x, w.t()), (dy, w), (dy.t(), x))
        for got, same, (a, b) in zip(found, whole, factors, strict=True):
            if target.isa != "amx" or rows == 8:
                # Gradients are torch's own products there, which hear "medium" themselves.
                assert torch.equal(got, same) or (setting == "medium" and got is not found[0])
                continue
            want = a @ b + (bias if got is found[0] else 0.0)
            # What is left out of a b, in the worst case; 2^-8 of each factor at "medium".
            most = (a.abs() @ b.abs()) * (2.0**-13 if setting == "high" else 2.0**-6.9) + 2.0**-20
            error = (got - want).abs()
            assert (error <= most).all()
            assert error.mean() > (2.0**-20 if setting == "high" else 2.0**-12)
            assert error.mean() < 0.05 * most.mean()


@pytest.mark.usefixtures("precision")
def test_linear_precision_of_either_form() -> None:
    assert cpu.fp32_parts() == 3
    for setting, parts in (("high", 2), ("medium", 1), ("highest", 3)):
        torch.set_float32_matmul_precision(setting)
        assert cpu.fp32_parts() == parts
    mkldnn: Any = torch.backends.mkldnn
    before = mkldnn.matmul.fp32_precision
    for setting, parts in (("tf32", 2), ("bf16", 1), ("ieee", 3)):
        mkldnn.matmul.fp32_precision = setting
        assert cpu.fp32_parts() == parts
    mkldnn.matmul.fp32_precision = before
    torch.set_float32_matmul_precision("highest")


@TARGETS
@pytest.mark.usefixtures("fresh_decisions")
def test_linear_bf16_gradient_of_the_weight_beside_torchs_product(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On AMX of many rows: ours where nobody chose torch's, and rounded once as torch's is."""
    made: list[int] = []
    whole = cpu.matmul

    def counted(*args: torch.Tensor, parts: int) -> torch.Tensor:
        made.append(parts)
        return whole(*args, parts)  # type: ignore[no-any-return]

    monkeypatch.setattr(cpu, "matmul", counted)
    rows = cpu.WEIGHT_GRADIENT_ROWS
    for many, turned in ((rows, False), (rows, True), (rows - 1, False)):
        x = torch.randn(many, 70).bfloat16().requires_grad_()
        weight = torch.randn(70, 40).bfloat16().t() if turned else torch.randn(40, 70).bfloat16()
        weight.requires_grad_()
        grad = torch.randn(many, 40).bfloat16()
        with target.active():
            y = llmops.linear(x, weight)
            got = torch.autograd.grad(y, (x, weight), grad, retain_graph=True)
            own = target.isa == "amx" and many == rows
            if target.isa != "avx2":  # there of any number of rows, and both
                assert len(made) == own
            made.clear()
            twice = torch.autograd.grad(y, (x, weight), grad, create_graph=True)
            assert twice[1].grad_fn is not None
            for context in (llmops.use_backend("reference"), torch.autocast("cpu", torch.bfloat16)):
                with context:
                    torch.autograd.grad(llmops.linear(x, weight), weight, grad)
            if target.isa != "avx2":
                assert not made
            made.clear()
        want = torch.autograd.grad(F.linear(x, weight), (x, weight), grad)
        for ours, theirs in zip(got, want, strict=True):
            assert ours.stride() == theirs.stride()
        exact = grad.double().t() @ x.double()
        bound = exact.abs() * 2.0**-8 + 2.0**-12 * (grad.double().abs().t() @ x.double().abs())
        for ours in (got[1], twice[1]):
            assert ((ours - exact).abs() <= bound).all()


@TARGETS
@pytest.mark.parametrize("rows", (1, 20, 70, 300, 1100))
def test_linear_of_empty_sums_is_the_bias(target: Target, rows: int) -> None:
    x, weight, bias = torch.ones(rows, 0), torch.ones(70, 0), torch.randn(70)
    with target.active():
        assert torch.equal(torch.ops.llmops_cpu.linear(x, weight, bias), bias.expand(rows, 70))
        assert not torch.ops.llmops_cpu.matmul(x, weight.t()).any()


@TARGETS
@pytest.mark.parametrize("parts", (3, 2))
def test_linear_matmul_of_extreme_values(target: Target, parts: int) -> None:
    """What fp32 makes of infinities, NaN, zeros, huge and tiny values, but for parts below 2^-126
    where it is made of bf16; with two parts of those the same, less the third part's digits."""
    inf, nan = float("inf"), float("nan")
    # 3 is one bf16, 1/3 is not: its parts are not zero.
    values = torch.tensor([inf, -inf, nan, 0.0, -0.0, 1.0, -3.0, 1 / 3, 3e38, -2e38, 1e-30, 1e-36])
    a = torch.where(torch.arange(40) == 7, values[:, None], torch.zeros(()))
    b = torch.ones(40, len(values))
    b[7] = values
    want = values[:, None] * values
    size = values[:, None].abs() + values.abs()
    lost = 2.0**-22 if parts == 3 or target.isa != "amx" else 2.0**-14
    bound = lost * want.abs() + 2.0**-123 * size.clamp(max=3.4e38)
    # A signalling NaN, whose payload is in the lower half.
    signal = torch.tensor([0x7F800001], dtype=torch.int32).view(torch.float32)
    with target.active():
        for x, w in ((a, b), (a.t().contiguous().t(), b.t().contiguous().t())):
            got = torch.ops.llmops_cpu.matmul(x, w, parts)
            finite = want.isfinite()
            assert torch.equal(got[~finite].nan_to_num(7.0), want[~finite].nan_to_num(7.0))
            assert ((got - want).abs() <= bound)[finite].all()
            assert (got[3:5, 3:] == 0).all()
        for count in (parts, 1):
            assert torch.ops.llmops_cpu.matmul(signal[None], torch.ones(1, 2), count).isnan().all()
        zeros = torch.ops.llmops_cpu.matmul(torch.zeros(3, 50), torch.randn(50, 4))
    assert torch.equal(zeros, torch.zeros(3, 4))


@TARGETS
@DTYPES
@pytest.mark.parametrize("rows", (1, 10, 15, 30, 50, 70))
def test_linear_of_infinite_weights(target: Target, dtype: torch.dtype, rows: int) -> None:
    """An infinity or NaN shows in its column alone, and as it should where x is zero."""
    x, weight, bias = torch.randn(rows, 123), torch.randn(75, 123), torch.randn(75)
    x[:, 122] = torch.arange(rows) % 3 - 1.0
    weight[40, 122], weight[41, 7], weight[74, 122] = float("inf"), float("nan"), float("-inf")
    x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    want = x.double() @ weight.double().t() + bias.double()
    with target.active():
        got = llmops.linear(x, weight, bias, backend="cpu")
        clean = llmops.linear(x, weight.nan_to_num(0.5, 0.5, 0.5), bias, backend="cpu")
    for column in (40, 41, 74):
        assert torch.equal(got[:, column].double().nan_to_num(7.0, 8.0, 9.0),
                           want[:, column].nan_to_num(7.0, 8.0, 9.0))  # fmt: skip
        got[:, column] = clean[:, column]
        want[:, column] = clean[:, column].double()
    assert torch.equal(got, clean)
    most = x.double().abs() @ weight.double().nan_to_num(1.0, 1.0, 1.0).abs().t() + 5
    bound = most * 2.0**-20 + want.abs() * torch.finfo(dtype).eps / 2
    assert ((got.double() - want).abs() <= bound).all()


@TARGETS
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_linear_matmul_of_extreme_16_bit_values(target: Target, dtype: torch.dtype) -> None:
    inf, nan, tiny = float("inf"), float("nan"), torch.finfo(dtype).smallest_normal
    values = torch.tensor([inf, -inf, nan, 0.0, -0.0, 1.0, -3.0, 6e4])
    if dtype == torch.float16:  # all of its digits, and subnormals, which bf16 pairs have none of
        values = torch.cat((values, torch.tensor([2047.0, tiny, -tiny / 4])))
    values = values.to(dtype)
    a = torch.where(torch.arange(40) == 7, values[:, None], torch.zeros((), dtype=dtype))
    b = torch.ones(40, len(values), dtype=dtype)
    b[7] = values
    want = values[:, None].float() * values.float()
    with target.active():
        for x, w in ((a, b), (a.t().contiguous().t(), b.t().contiguous().t())):
            got = torch.ops.llmops_cpu.matmul(x, w)
            assert torch.equal(got.nan_to_num(7.0), want.to(dtype).nan_to_num(7.0))


@TARGETS
@pytest.mark.usefixtures("fresh_decisions")
def test_linear_of_many_rows_and_its_gradients(target: Target) -> None:
    """As exact as torch's product in fp32, by whichever product the table names, and for weights
    that lie transposed, whose gradient lies as they do."""
    for turned, tokens in itertools.product((False, True), (35, 50, 150)):
        weight = torch.randn(70, 130).t() if turned else torch.randn(130, 70)
        x, bias, grad = torch.randn(2, tokens, 70), torch.randn(130), torch.randn(2, tokens, 130)
        leaves = [t.requires_grad_() for t in (x, weight, bias)]
        assert target.isa is not None
        ahead = cpu.LINEAR_AHEAD[target.isa].get(torch.float32, 0)
        own = ahead == cpu.ANY_ROWS or (2 * tokens <= ahead and not turned)
        with target.active():
            found = llmops.explain("linear", *leaves)
            assert (found.backend == "cpu") == own
            y = llmops.linear(*leaves)
            got = (y, *torch.autograd.grad(y, leaves, grad, retain_graph=True))
            twice = torch.autograd.grad(y, leaves, grad, create_graph=True)
        y = F.linear(*leaves)
        theirs = (y, *torch.autograd.grad(y, leaves, grad))
        wide = [t.detach().double().requires_grad_() for t in leaves]
        y = F.linear(*wide)
        want = (y, *torch.autograd.grad(y, wide, grad.double()))
        for ours, torchs, exact in zip(got, theirs, want, strict=True):
            assert ours.stride() == torchs.stride()
            error = (torchs - exact).abs().max()
            assert (ours - exact).abs().max() < 2 * error + 2.0**-20
        assert twice[0].grad_fn is not None
        torch.testing.assert_close(twice[1], got[2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_linear_gradients_are_rounded_once(dtype: torch.dtype) -> None:
    x, weight = torch.randn(70, 300).to(dtype), torch.randn(40, 300).to(dtype)
    bias, grad = torch.randn(40).to(dtype), torch.randn(70, 40).to(dtype)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    y = llmops.linear(*leaves, backend="cpu")
    got = torch.autograd.grad(y, leaves, grad, retain_graph=True)
    twice = torch.autograd.grad(y, leaves, grad, create_graph=True)
    assert twice[0].grad_fn is not None and twice[1].grad_fn is not None
    wide = [t.detach().double().requires_grad_() for t in leaves]
    want = torch.autograd.grad(F.linear(*wide), wide, grad.double())
    for a, b, w in zip(got, twice, want, strict=True):
        assert a.dtype == b.dtype == dtype
        step = torch.finfo(dtype).eps * w.abs() / 2 + 1e-5
        assert ((a.double() - w).abs() <= step).all() and ((b.double() - w).abs() <= step).all()


@TARGETS
def test_linear_accumulates_in_fp32(target: Target) -> None:
    """Partial sums beyond fp16's range, and a bf16 sum of more terms than its digits can count."""
    x, weight = torch.full((1, 4096), 16.0).half(), torch.full((2, 4096), 16.0).half()
    weight[:, 2048:] = -16.0
    ones = torch.ones(1, 4096, dtype=torch.bfloat16)
    with target.active():
        assert llmops.linear(x, weight, backend="cpu").tolist() == [[0.0, 0.0]]
        assert llmops.linear(ones, ones, backend="cpu").item() == 4096.0


@TARGETS
@DTYPES
@pytest.mark.usefixtures("fresh_decisions")
def test_linear_auto_follows_the_table(target: Target, dtype: torch.dtype) -> None:
    weight = torch.randn(12, 20).to(dtype)
    assert target.isa is not None
    ahead = cpu.LINEAR_AHEAD[target.isa].get(dtype, 0)
    with target.active():
        for rows in (1, 8, 9, 64, 65, 128, 129):
            x = torch.randn(rows, 20).to(dtype)
            ours = rows <= ahead
            found = llmops.explain("linear", x, weight)
            if ours:
                assert found.kernel == f"C++ linear [{target.isa}]" and not found.rejected
            else:
                assert found.kernel == "torch's own matrix product"
                assert "torch's own product is as fast" in found.rejected["cpu"]
                assert (f"beyond {ahead} rows" in found.rejected["cpu"]) == (ahead > 0)
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # torch's own product is nothing to warn of
                y = llmops.linear(x, weight)
            kernel = llmops.linear(x, weight, backend="cpu" if ours else "reference")
            assert torch.equal(y, kernel)
            assert llmops.explain("linear", x, weight, backend="cpu").backend == "cpu"


@TARGETS
@pytest.mark.usefixtures("fresh_decisions")
def test_linear_transposed_weight_goes_to_torch(target: Target) -> None:
    x, weight = torch.randn(1, 20).bfloat16(), torch.randn(20, 12).bfloat16().t()
    with target.active():
        found = llmops.explain("linear", x, weight)
        assert found.backend == "reference" and "not dense" in found.rejected["cpu"]
        assert torch.equal(llmops.linear(x, weight), F.linear(x, weight))
        forced = llmops.linear(x, weight, backend="cpu")
    torch.testing.assert_close(forced.double(), F.linear(x.double(), weight.double()), rtol=1e-2,
                               atol=1e-2)  # fmt: skip


@pytest.mark.parametrize("backend", (None, "cpu", "reference"))
@pytest.mark.parametrize("stored", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.usefixtures("fresh_decisions")
def test_linear_autocasts_as_torch(backend: str | None, stored: torch.dtype) -> None:
    x = torch.randn(3, 40, requires_grad=True)
    weight = torch.randn(21, 40).to(stored).requires_grad_()
    bias = torch.randn(21, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = llmops.linear(x, weight, bias, backend=backend)
        want = F.linear(x, weight, bias)
        wide = llmops.linear(x.double(), weight.double(), backend="reference")
    assert got.dtype == want.dtype == torch.bfloat16 and wide.dtype == torch.float64
    torch.testing.assert_close(got, want, rtol=2**-7, atol=2**-5)
    grads = torch.autograd.grad(got.float().square().sum(), (x, weight, bias))
    wanted = torch.autograd.grad(want.float().square().sum(), (x, weight, bias))
    for g, w in zip(grads, wanted, strict=True):
        assert g.dtype == w.dtype
        assert (g - w).float().norm() < 0.01 * w.float().norm()


@pytest.mark.usefixtures("fresh_decisions")
def test_linear_autocast_leaves_the_cast_of_weights_to_torch() -> None:
    x, weight = torch.randn(1, 40), torch.randn(21, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = llmops.explain("linear", x, weight)
        assert found.backend == "reference" and "once per autocast" in found.rejected["cpu"]
        assert found.call.dtype == torch.bfloat16


def test_linear_float64_and_gradients_of_a_few_inputs() -> None:
    x, weight = torch.randn(2, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    assert torch.equal(llmops.linear(x, weight), F.linear(x, weight))
    with pytest.raises(NotImplementedError, match="float64"):
        llmops.linear(x, weight, backend="cpu")
    bias = torch.randn(3, requires_grad=True)
    llmops.linear(x.float(), weight.float(), bias, backend="cpu").sum().backward()
    assert bias.grad is not None and bias.grad.tolist() == [2.0, 2.0, 2.0]


def test_linear_rejects_bad_input() -> None:
    x, weight = torch.randn(2, 5), torch.randn(3, 5)
    for arguments, error, match in (
        ((x, weight.half()), TypeError, r"weight has dtype float16 and x float32; .*x.to\(weight"),
        ((x, weight, torch.ones(3).half()), TypeError, "bias has dtype float16 and x float32"),
        ((x, weight.long()), TypeError, "weight has dtype int64"),
        ((x.int(), weight), TypeError, "x has dtype int32"),
        ((x, None), TypeError, "weight must be a Tensor; got NoneType"),
        ((x, weight[0]), ValueError, r"weight must be \[N, K\]; got shape \(5,\)"),
        ((x, weight.t()), ValueError, r"x must be \[..., 3\] .*got shape \(2, 5\)"),
        ((torch.tensor(1.0), weight), ValueError, r"x must be \[..., 5\] .*got shape \(\)"),
        ((x, weight, torch.ones(4)), ValueError, r"bias must be \[3\].*got shape \(4,\)"),
        ((x, weight, torch.ones(3, 1)), ValueError, r"bias must be \[3\]"),
        ((x, weight.to("meta")), ValueError, "weight is on meta and x on cpu"),
    ):
        with pytest.raises(error, match=match):
            llmops.linear(*arguments)
    with pytest.raises(NotImplementedError, match='backend "triton" cannot serve'):
        llmops.linear(x, weight, backend="triton")
    with pytest.raises(RuntimeError, match="of one dtype"):
        torch.ops.llmops_cpu.linear(x, weight.half())
    for parts in (0, 4):
        with pytest.raises(RuntimeError, match=f"parts must be 1, 2 or 3; got {parts}"):
            torch.ops.llmops_cpu.linear(x, weight, None, parts)
        with pytest.raises(RuntimeError, match=f"parts must be 1, 2 or 3; got {parts}"):
            torch.ops.llmops_cpu.matmul(x, weight.t(), parts)


GUARDED = """
import ctypes, mmap, sys
import torch, llmops
from llmops.backends import _extension
_extension.select_isa(sys.argv[1])
libc, page = ctypes.CDLL(None), mmap.PAGESIZE
kept = []
def at_the_end(x):  # the same values, followed by a page that must not be touched
    size = x.numel() * x.element_size()
    buffer = mmap.mmap(-1, 16 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    assert libc.mprotect(ctypes.c_void_p(start + 15 * page), page, 0) == 0
    place = torch.frombuffer(buffer, dtype=x.dtype, count=x.numel(), offset=15 * page - size)
    kept.append(buffer)
    return place.view(x.shape).copy_(x)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for rows, k, n in ((1, 67, 3), (2, 33, 5), (3, 65, 19), (5, 31, 17), (9, 1, 1), (17, 81, 35),
                       (40, 45, 33)):
        x, w, b = (torch.randn(s).to(dtype) for s in ((rows, k), (n, k), (n,)))
        got = llmops.linear(at_the_end(x), at_the_end(w), at_the_end(b), backend="cpu")
        assert torch.equal(got, llmops.linear(x, w, b, backend="cpu"))
print("done")
"""


@TARGETS
def test_linear_reads_nothing_past_its_inputs(target: Target) -> None:
    """A read beyond x, weight or bias hits a protected page and ends the process."""
    run = subprocess.run(
        [sys.executable, "-c", GUARDED, str(target.isa)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout == "done\n", (run.returncode, run.stderr)


def test_linear_kernel_in_a_forked_child_waits_for_nobody() -> None:
    """torch's own product does wait there for ever (the kit's reason to leave linear out); ours,
    with work enough for several threads, must not."""
    code = """
import os, signal, torch, llmops
torch.set_num_threads(2)
x, w = torch.randn(8, 1024), torch.randn(1024, 1024)
llmops.softmax(x)  # loads the extension
kernel = torch.ops.llmops_cpu.linear
want = kernel(x, w)
child = os.fork()
if child == 0:
    signal.alarm(20)
    os._exit(0 if torch.equal(kernel(x, w), want) else 3)
print("child", os.waitpid(child, 0)[1])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["child", "0"], done.stdout + done.stderr
