"""linear_cross_entropy: the conformance kit, and what is particular to it."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from memory_kit import peak_bytes

import llmops
from llmops.backends import _linear_cross_entropy, cpu
from llmops.testing import Make, assert_close, call, suite
from llmops.testing.specs.linear_cross_entropy import SPEC, samples, torch_linear_cross_entropy

globals().update(suite(SPEC))


def _gradients(fn: Any, tensors: dict[str, torch.Tensor], **kwargs: Any) -> list[torch.Tensor]:
    """Loss, and the gradients of its sum, for input, linear_weight and linear_bias."""
    leaves = {k: v.detach().requires_grad_() for k, v in tensors.items()}
    loss = fn(**leaves, **kwargs)
    return [loss.detach(), *torch.autograd.grad(loss.sum(), list(leaves.values()))]


@settings(deadline=None, max_examples=80)
@given(data=st.data())
def test_linear_cross_entropy_hypothesis(data: st.DataObject) -> None:
    """Shapes, dtypes and every argument at random, against PyTorch in fp64."""
    rows, width, classes = (data.draw(st.integers(1, n)) for n in (150, 20, 60))
    dtype = data.draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16)))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    tensors = {"input": torch.randn(rows, width), "linear_weight": torch.randn(classes, width) / 4}
    if data.draw(st.booleans()):
        tensors["linear_bias"] = torch.randn(classes)
    tensors = {k: v.to(dtype) for k, v in tensors.items()}
    ignore = data.draw(st.sampled_from((-100, 0, classes + 2)))
    kwargs: dict[str, Any] = {
        "ignore_index": ignore,
        "target": torch.randint(classes, (rows,)).masked_fill(torch.rand(rows) < 0.2, ignore),
        "label_smoothing": data.draw(st.sampled_from((0.0, 0.3))),
        "reduction": data.draw(st.sampled_from(("none", "sum", "mean"))),
        "weight": torch.rand(classes).to(dtype) if data.draw(st.booleans()) else None,
    }
    # As they are, or many chunks and runs of few.
    many = data.draw(st.booleans())
    small = {"CLASSES": 7, "FEWEST_ROWS": 32, "MOST_ROWS": 40} if many else {}
    with patch.multiple(_linear_cross_entropy, **small) if many else nullcontext():
        got = _gradients(llmops.linear_cross_entropy, tensors, **kwargs)
        with torch.no_grad():  # in chunks of other rows
            alone = llmops.linear_cross_entropy(**tensors, **kwargs)
    within = 20 * torch.finfo(dtype).eps
    torch.testing.assert_close(alone, got[0], rtol=0, atol=within, equal_nan=True)
    yardstick = _gradients(torch_linear_cross_entropy, tensors, **kwargs)
    wide = {k: v.double() for k, v in tensors.items()}
    if kwargs["weight"] is not None:
        kwargs["weight"] = kwargs["weight"].double()
    oracle = _gradients(torch_linear_cross_entropy, wide, **kwargs)
    # A logit x is held rounded, off by eps |x|: so far can a row's loss be off, and by that share
    # each term of a gradient, whose terms cancel. torch's own may be nearer by luck, in a few rows.
    x, matrix = wide["input"], wide["linear_weight"]
    logits = F.linear(x, matrix, wide.get("linear_bias")).requires_grad_()
    how = {k: v for k, v in kwargs.items() if k != "target"}
    loss = F.cross_entropy(logits, kwargs["target"], **how).nan_to_num().sum()
    grad = torch.autograd.grad(loss, logits)[0].nan_to_num().abs()
    rounding = 2 * torch.finfo(dtype).eps * (1 + float(logits.abs().max()))
    terms = [
        torch.tensor(float(rows) if kwargs["reduction"] == "sum" else 1.0),
        grad @ matrix.abs(),
        grad.t() @ x.abs(),
        grad.sum(0),
    ]
    for i, (g, o, y) in enumerate(zip(got, oracle, yardstick, strict=True)):
        # Rows cancel (one class: to nothing), so the scale is that of the whole tensor.
        flat = [t.reshape(-1) for t in (g, o, y)]
        floor = rounding * float(terms[i].max())
        assert_close(*flat, factor=3.0 if i else 2.0, what=f"linear_cross_entropy {i}", floor=floor)


def test_linear_cross_entropy_bitwise_repeatable() -> None:
    """Run to run always; for any number of threads where torch.mm is (its own few-row sums are
    not)."""
    threads = torch.get_num_threads()
    for dtype in (torch.float32, torch.bfloat16):
        for number, sample in enumerate(samples(Make(dtype))):
            runs = [call(llmops.linear_cross_entropy, sample) for _ in range(2)]
            if number == 0:  # 300 rows
                torch.set_num_threads(1 if threads > 1 else 2)
                try:
                    runs.append(call(llmops.linear_cross_entropy, sample))
                finally:
                    torch.set_num_threads(threads)
            for run in runs[1:]:
                for a, b in zip((*runs[0][0], *runs[0][1]), (*run[0], *run[1]), strict=True):
                    assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)), sample.id


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linear_cross_entropy_peak_memory(reduction: str) -> None:
    """2048 x 50257 logits would be 412 MB: the peak stays far below, with all gradients."""
    rows, width, classes = 2048, 32, 50257
    x = torch.randn(rows, width, requires_grad=True)
    w = torch.randn(classes, width, requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    ids = torch.randint(classes, (rows,))

    def run() -> Any:
        loss = llmops.linear_cross_entropy(x, w, ids, linear_bias=bias, reduction=reduction)
        return torch.autograd.grad(loss.sum(), (x, w, bias))

    with torch.no_grad():  # whatever a first call loads
        llmops.linear_cross_entropy(x[:8], w, ids[:8])
    gradients = 3 * w.numel() * 4  # as a sum, scaled, and a product's buffer
    assert peak_bytes(run) < 4 * _linear_cross_entropy.CHUNK + gradients + (16 << 20)


def test_linear_cross_entropy_chunks() -> None:
    chunk_rows = _linear_cross_entropy.chunk_rows
    for rows in (0, 1, 256, 257, 1000, 100_000):
        for classes in (1, 50257, 10**9):
            step = chunk_rows(rows, classes)
            assert 0 <= step <= rows and (rows == 0 or step > 0)
            assert step <= 256 or step <= -(-rows // 2)
            assert step <= 16 or step * classes <= _linear_cross_entropy.CHUNK
    assert chunk_rows(512, 50257) == 256 and chunk_rows(16384, 50257) == 656


def test_linear_cross_entropy_computes_what_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    """No gradient under no_grad; else once, in the forward; with "none" in the backward."""
    calls: list[int] = []
    kernel = cpu.cross_entropy_bwd_
    monkeypatch.setattr(cpu, "cross_entropy_bwd_", lambda *a: calls.append(1) or kernel(*a))
    x, w = torch.randn(9, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    ids = torch.randint(5, (9,))
    with torch.no_grad():
        llmops.linear_cross_entropy(x, w, ids)
    llmops.linear_cross_entropy(x.detach(), w.detach(), ids)
    assert not calls
    loss = llmops.linear_cross_entropy(x, w, ids)
    assert len(calls) == 1
    first = torch.autograd.grad(loss, (x, w), torch.tensor(3.0), retain_graph=True)
    second = torch.autograd.grad(loss, (x, w))
    assert len(calls) == 1
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, 3 * b)
    loss = llmops.linear_cross_entropy(x, w, ids, reduction="none")
    assert len(calls) == 1
    loss.sum().backward()
    assert len(calls) == 2
    assert x.grad is not None and w.grad is not None
    torch.testing.assert_close(w.grad, 9 * second[1])


def test_linear_cross_entropy_gradients_of_a_loss_as_it_is() -> None:
    """Under loss.backward() the forward's gradients are the answer: not copied, and guarded."""
    x, w = torch.randn(9, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    ids = torch.randint(5, (9,))
    loss = llmops.linear_cross_entropy(x, w, ids)
    once = torch.autograd.grad(loss, (x, w), retain_graph=True)
    twice = torch.autograd.grad(loss, (x, w), torch.tensor(2.0), retain_graph=True)
    for a, b in zip(once, twice, strict=True):
        torch.testing.assert_close(2 * a, b)
    loss.backward(retain_graph=True)
    loss.backward(retain_graph=True)  # into .grad, which is therefore no alias
    torch.testing.assert_close(w.grad, twice[1])
    once[1].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, (x, w))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_linear_cross_entropy_of_few_rows_holds_no_gradient_of_the_weight(reduction: str) -> None:
    """The logits' instead, and what comes of it for any incoming gradient, again and again."""
    rows, width, classes = 6, 512, 5000
    x = torch.randn(rows, width, requires_grad=True)
    w = (torch.randn(classes, width) * width**-0.5).requires_grad_()
    ids = torch.randint(classes, (rows,))
    ids[2] = -100
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss = llmops.linear_cross_entropy(x, w, ids, reduction=reduction)
    own = [t for t in saved if t.data_ptr() not in (x.data_ptr(), w.data_ptr())]
    assert sum(t.numel() for t in own) < 2 * rows * classes < w.numel() / 10
    want = torch.autograd.grad(
        torch_linear_cross_entropy(x, w, ids, reduction=reduction), (x, w), torch.tensor(0.7)
    )
    for factor in (0.7, 1.0, 0.7):
        got = torch.autograd.grad(loss, (x, w), torch.tensor(factor), retain_graph=True)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a * 0.7 / factor, b, rtol=1e-4, atol=1e-6)


def test_linear_cross_entropy_ignored_rows_are_not_read() -> None:
    x, w = torch.randn(6, 8), torch.randn(5, 8)
    ids = torch.tensor([1, -100, 0, 4, -100, -100])
    x[1] = math.nan
    got = _gradients(llmops.linear_cross_entropy, {"input": x, "linear_weight": w}, target=ids)
    kept = ids != -100
    some = {"input": x[kept], "linear_weight": w}
    want = _gradients(torch_linear_cross_entropy, some, target=ids[kept])
    torch.testing.assert_close(got[0], want[0])
    torch.testing.assert_close(got[1][kept], want[1])
    assert bool((got[1][~kept] == 0).all())
    torch.testing.assert_close(got[2], want[2])


def test_linear_cross_entropy_hears_float32_matmul_precision() -> None:
    """With AMX two bf16 parts of each value at "high", else all digits."""
    torch.manual_seed(0)
    tensors = {"input": torch.randn(600, 70), "linear_weight": torch.randn(4500, 70) * 0.1}
    ids = torch.randint(4500, (600,))
    whole = _gradients(llmops.linear_cross_entropy, tensors, target=ids, backend="cpu")
    torch.set_float32_matmul_precision("high")
    try:
        found = _gradients(llmops.linear_cross_entropy, tensors, target=ids, backend="cpu")
    finally:
        torch.set_float32_matmul_precision("highest")
    same = [torch.equal(got, want) for got, want in zip(found, whole, strict=True)]
    assert not any(same[1:]) if cpu.own_products(torch.float32) else all(same)
    for got, want in zip(found, whole, strict=True):
        assert (got - want).norm() < 2.0**-12 * want.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_linear_cross_entropy_weights_that_add_up_to_zero(dtype: torch.dtype) -> None:
    """The mean is 0 / 0: NaN in the rows that count, as torch has it, and nothing in the others,
    to which an infinite gradient of the loss gives nothing either."""
    torch.manual_seed(0)
    tensors = {"input": torch.randn(6, 8).to(dtype), "linear_weight": torch.randn(5, 8).to(dtype)}
    ids = torch.tensor([1, -100, 0, 4, -100, 2])
    for how in ({"weight": torch.zeros(5)}, {"reduction": "sum"}):

        def loss(backend: str, how: dict[str, Any] = how) -> list[torch.Tensor]:
            def times(**leaves: torch.Tensor) -> torch.Tensor:
                loss = llmops.linear_cross_entropy(**leaves, target=ids, **how, backend=backend)
                return loss if "weight" in how else loss * math.inf

            return _gradients(times, tensors)

        got, want = loss("cpu"), loss("reference")
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a.isfinite(), b.isfinite())
        assert bool((got[1][ids == -100] == 0).all())
        assert not bool(got[1][ids != -100].isfinite().any())


def test_linear_cross_entropy_fp16_with_a_loss_scale() -> None:
    """The mean over many rows must not underflow before the scale comes in."""
    torch.manual_seed(0)
    x, w = torch.randn(4096, 8) / 64, torch.randn(50, 8)
    ids = torch.randint(50, (4096,))
    halves = [t.half().requires_grad_() for t in (x, w)]
    loss = llmops.linear_cross_entropy(*halves, ids, dtype=torch.float32)
    got = torch.autograd.grad(loss * 2.0**14, halves)
    wide = [t.detach().double().requires_grad_() for t in halves]
    want = torch.autograd.grad(torch_linear_cross_entropy(*wide, ids) * 2.0**14, wide)
    for g, o in zip(got, want, strict=True):
        assert float((g.double() - o).norm() / o.norm()) < 4e-3
        assert bool((g[o.abs() > 1e-6] != 0).all())


def test_linear_cross_entropy_dtypes_under_autocast() -> None:
    """The product in autocast's dtype, the loss in fp32, gradients in the leaves' dtype."""
    tensors = {"input": torch.randn(30, 16), "linear_weight": torch.randn(20, 16)}
    ids = torch.randint(20, (30,))
    with torch.autocast("cpu", torch.bfloat16):
        got = _gradients(llmops.linear_cross_entropy, tensors, target=ids)
        want = _gradients(torch_linear_cross_entropy, tensors, target=ids)
    assert [g.dtype for g in got] == [w.dtype for w in want] == [torch.float32] * 3
    # torch's logits are rounded to bf16; ours only where the product is, else they stay in fp32.
    wide = torch_linear_cross_entropy(
        **{name: x.bfloat16().float() for name, x in tensors.items()}, target=ids
    )
    assert min(abs(float(got[0] - loss)) for loss in (want[0], wide)) < 1e-5 * (1 + float(wide))
    for g, w in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(g, w, rtol=0.02, atol=2e-3)


def test_linear_cross_entropy_rare_forms_on_the_reference() -> None:
    x, w, several = torch.randn(4, 6), torch.randn(5, 6), torch.randn(5, 2, 3, 6)
    probabilities = torch.rand(4, 5).softmax(1)
    forms: tuple[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor | None], ...] = (
        ("probability targets", w, probabilities, None),
        (
            "multi-dimensional linear_weight",
            several,
            torch.randint(5, (4, 2, 3)),
            torch.randn(5, 2, 3),
        ),
    )
    for feature, weight, target, bias in forms:
        decision = llmops.explain("linear_cross_entropy", x, weight, target, linear_bias=bias)
        assert decision.backend == "reference" and feature in decision.rejected["cpu"]
        for reduction in ("none", "mean"):
            kwargs: dict[str, Any] = {"linear_bias": bias, "reduction": reduction}
            got = llmops.linear_cross_entropy(x, weight, target, **kwargs)
            flat = F.linear(x, weight.flatten(0, -2), None if bias is None else bias.flatten())
            logits = flat.reshape(4, *weight.shape[:-1])
            torch.testing.assert_close(got, F.cross_entropy(logits, target, reduction=reduction))
            if hasattr(F, "linear_cross_entropy"):  # torch 2.13
                want = F.linear_cross_entropy(x, weight, target, **kwargs)
                torch.testing.assert_close(got, want)


def test_linear_cross_entropy_rejects_bad_input() -> None:
    x, w, ids = torch.randn(3, 4), torch.randn(5, 4), torch.zeros(3, dtype=torch.int64)
    for backend in ("cpu", "reference"):
        for bad in (5, -1):
            with pytest.raises(
                IndexError,
                match=rf"linear_cross_entropy: target holds {bad}, but linear_weight has 5",
            ):
                llmops.linear_cross_entropy(x, w, torch.tensor([0, bad, 1]), backend=backend)
    refused: list[tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = [
        (ValueError, r"input must be \[N, D\] or \[D\]; got.*flatten", (x[None], w, ids), {}),
        (ValueError, r"linear_weight must be \[V, 4\]", (x, w[:, :3], ids), {}),
        (ValueError, r"needs input \[N, D\]", (x[0], w[:, None], ids), {}),
        (TypeError, "linear_weight must be float32, as input is; got", (x, w.half(), ids), {}),
        (ValueError, r"linear_bias must be \[5\]", (x, w, ids), {"linear_bias": torch.ones(4)}),
        (TypeError, "linear_bias must be float32", (x, w, ids),
         {"linear_bias": torch.ones(5).half()}),
        (ValueError, r"shape \(3,\), or probabilities of shape \(3, 5\)", (x, w, ids[:2]), {}),
        (ValueError, r"weight must be \[5\]", (x, w, ids), {"weight": torch.ones(4)}),
        (ValueError, "label_smoothing must be in", (x, w, ids), {"label_smoothing": -0.1}),
        (ValueError, 'reduction must be "none"', (x, w, ids), {"reduction": "batchmean"}),
        (NotImplementedError, "float64", (x.double(), w.double(), ids), {"backend": "cpu"}),
        (NotImplementedError, "weight takes no gradient", (x, w, ids),
         {"weight": torch.ones(5, requires_grad=True)}),
    ]  # fmt: skip
    for error, match, args, kwargs in refused:
        with pytest.raises(error, match=match):
            llmops.linear_cross_entropy(*args, **kwargs)
    assert torch.equal(  # torch's default for class indices
        llmops.linear_cross_entropy(x, w, ids, ignore_index=None),
        llmops.linear_cross_entropy(x, w, ids),
    )
