"""cross_entropy: the conformance kit, and what is particular to it."""

from __future__ import annotations

import math
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from memory_kit import peak_bytes

import llmops
from llmops import nn, reference
from llmops.testing import Target, assert_close, suite, targets
from llmops.testing.specs.cross_entropy import SPEC, torch_cross_entropy

globals().update(suite(SPEC))

TARGETS = pytest.mark.parametrize("target", targets("cross_entropy"), ids=str)
# Only the CPU's kernels have one.
SHORT_WAYS = pytest.mark.parametrize(
    "target", [t for t in targets("cross_entropy") if t.backend == "cpu"], ids=str
)


def _both(fn: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss, and the gradient of its sum."""
    x = x.detach().requires_grad_()
    loss = fn(x, *args, **kwargs)
    return loss.detach(), torch.autograd.grad(loss.sum(), x)[0]


@TARGETS
@settings(deadline=None, max_examples=120)
@given(data=st.data())
def test_cross_entropy_hypothesis(target: Target, data: st.DataObject) -> None:
    """Shapes, strides, dtypes and every argument at random, against PyTorch in fp64."""
    classes = data.draw(st.integers(1, 90))
    rows = data.draw(st.lists(st.integers(1, 7), max_size=3))
    dtype = data.draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16)))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    shape = [*rows[:1], classes, *rows[1:]]
    step, gap = data.draw(st.integers(1, 2)), data.draw(st.integers(0, 3))
    wide = torch.randn(*shape[:-1], shape[-1] * step + gap) * data.draw(st.floats(0.1, 8))
    x = wide.to(dtype)[..., : shape[-1] * step : step]
    if data.draw(st.booleans()):
        order = data.draw(st.permutations(range(x.dim())))
        x = x.permute(order).contiguous().permute([order.index(d) for d in range(x.dim())])
    indices = torch.randint(classes, rows)
    ignore = data.draw(st.sampled_from((-100, -1, 0, classes + 3)))
    if rows:
        indices = indices.masked_fill(torch.rand(rows) < 0.2, ignore)
    kwargs: dict[str, Any] = {
        "ignore_index": ignore,
        "label_smoothing": data.draw(st.sampled_from((0.0, 0.1, 0.7, 1.0))),
        "reduction": data.draw(st.sampled_from(("none", "sum", "mean"))),
        "z_loss": data.draw(st.sampled_from((0.0, 0.01))),
        "weight": torch.rand(classes).to(dtype) if data.draw(st.booleans()) else None,
    }
    ids = indices.int() if data.draw(st.booleans()) else indices
    with target.active():
        got = _both(llmops.cross_entropy, x, ids, backend=target.backend, **kwargs)
    exact = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    oracle = _both(torch_cross_entropy, x.double(), indices, **exact)
    yardstick = _both(torch_cross_entropy, x, indices, **kwargs)
    assert_close(got[0], oracle[0], yardstick[0], factor=2.0, what="cross_entropy")
    # The gradient is softmax less target, terms of about weight / divisor that may cancel (two
    # classes, all smoothed): the error rule takes its floor from the terms, which stand beside.
    weight, kept = exact["weight"], indices[indices != ignore]
    own = torch.ones(len(kept)) if weight is None else weight[kept]
    terms = torch.ones(1) if weight is None else weight.max()[None]
    if kwargs["reduction"] == "mean" and len(kept):
        terms = terms / own.sum()
    flat = [torch.cat((g.reshape(-1), terms.to(g))) for g in (got[1], oracle[1], yardstick[1])]
    # softmax is exp(x - lse), the saved lse off by half of its last place in fp32, which PyTorch's
    # own need not be: it keeps softmax.
    lse = x.double().logsumexp(-1 if x.dim() == 1 else 1).abs().max()
    floor = float(2.0**-24 * lse * (1 + 2 * kwargs["z_loss"] * lse) * terms)
    assert_close(*flat, factor=3.0, what="cross_entropy gradient", floor=floor)


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_cross_entropy_reference_is_torch(data: st.DataObject) -> None:
    """The specification itself, in fp64, against PyTorch."""
    classes, rows = data.draw(st.integers(1, 9)), data.draw(st.lists(st.integers(1, 4), max_size=2))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    x = torch.randn([*rows[:1], classes, *rows[1:]], dtype=torch.float64)
    kwargs: dict[str, Any] = {
        "label_smoothing": data.draw(st.sampled_from((0.0, 0.3))),
        "reduction": data.draw(st.sampled_from(("none", "sum", "mean"))),
        "weight": torch.rand(classes).double() if data.draw(st.booleans()) else None,
    }
    ids = torch.softmax(torch.randn_like(x), min(x.dim() - 1, 1))
    if data.draw(st.booleans()):
        ids = torch.randint(classes, rows)
    for a, b in zip(
        _both(reference.cross_entropy, x, ids, **kwargs),
        _both(F.cross_entropy, x, ids, **kwargs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.usefixtures("common_cache")
@pytest.mark.parametrize(
    ("classes", "dtype", "weighted"),
    [(16384, torch.float32, False), (16387, torch.float32, True), (16387, torch.bfloat16, False)],
    ids=str,
)
def test_cross_entropy_backward_past_the_caches(
    classes: int, dtype: torch.dtype, weighted: bool
) -> None:
    """Over 32 MiB the gradient is written by non-temporal stores, wherever rows begin."""
    rows = (33 << 20) // classes // dtype.itemsize + 1
    x, ids = torch.randn(rows, classes).to(dtype), torch.randint(classes, (rows,))
    how: dict[str, Any] = {"label_smoothing": 0.1, "reduction": "none"}
    weight = torch.rand(classes).to(dtype) if weighted else None
    got = _both(llmops.cross_entropy, x, ids, weight, **how)
    exact = None if weight is None else weight.double()
    oracle = _both(F.cross_entropy, x.double(), ids, exact, **how)
    yardstick = _both(F.cross_entropy, x, ids, weight, **how)
    assert_close(got[0], oracle[0], yardstick[0], factor=2.0, what="cross_entropy")
    assert_close(got[1], oracle[1], yardstick[1], factor=3.0, what="cross_entropy gradient")


@TARGETS
def test_cross_entropy_of_a_long_row_keeps_fp32_precision(target: Target) -> None:
    """256,000 classes: fp32 sums of that many terms would be off by far more than an ulp."""
    torch.manual_seed(0)
    x, ids = torch.randn(2, 256000) * 2 + 50, torch.tensor([7, 255999])
    with target.active():
        loss, dx = _both(llmops.cross_entropy, x, ids, reduction="none", label_smoothing=0.1)
    want, want_dx = _both(F.cross_entropy, x.double(), ids, reduction="none", label_smoothing=0.1)
    assert float(((loss - want) / want).abs().max()) < 2e-7
    assert float((dx - want_dx).abs().max()) < 1e-7


@TARGETS
@pytest.mark.parametrize("weighted", (False, True))
@pytest.mark.parametrize("order", ("rising", "falling", "late", "masked first", "huge"))
def test_cross_entropy_wherever_the_largest_logit_is(
    target: Target, order: str, weighted: bool
) -> None:
    """A row is summed relative to the largest logit so far, which may grow with every step."""
    classes = 20011
    x = torch.randn(5, classes) * 3
    if order == "rising":
        x = x.sort(dim=-1).values
    elif order == "falling":
        x = x.sort(dim=-1, descending=True).values
    elif order == "late":
        # In each of four streams, and in what is left after whole steps: exp(200) is infinite.
        x[torch.arange(5), [4000, 9000, 14000, 19000, classes - 3]] = 200.0
    elif order == "masked first":
        x[:, : classes // 2] = -math.inf
    else:
        # At the beginning of what is summed at once, of vectors of 1, 8 and 16 lanes.
        x[:] = -3e38
        x[torch.arange(3), [128, 1024, 2048]] = 3e38
    ids = torch.tensor([classes - 1, 12000, 17000, 3, 19000])
    weight = torch.rand(classes) + 0.1 if weighted else None
    exact = None if weight is None else weight.double()
    for smoothing in (0.0, 0.1):
        how: dict[str, Any] = {"label_smoothing": smoothing, "reduction": "none"}
        with target.active():
            got = llmops.cross_entropy(x, ids, weight, backend=target.backend, **how)
        oracle = F.cross_entropy(x.double(), ids, exact, **how)
        assert not bool(got.isnan().any())
        if order != "huge" or smoothing == 0.0:  # 1e4 such numbers add up to infinity in fp32
            torch.testing.assert_close(got, oracle.float(), rtol=3e-7, atol=0.0)


@TARGETS
def test_cross_entropy_infinities_and_nan(target: Target) -> None:
    """-inf apart from the target is a class that cannot be; NaN and +inf stay in their row."""
    x = torch.randn(6, 40)
    ids = torch.arange(6)
    x[0, 5:] = -math.inf
    x[1, 1] = -math.inf  # the target itself: infinite loss
    x[2, 30] = math.nan
    x[3] = -math.inf
    x[4, 9] = math.inf
    with target.active():
        loss, dx = _both(llmops.cross_entropy, x, ids, reduction="none")
    want, want_dx = _both(F.cross_entropy, x, ids, reduction="none")
    torch.testing.assert_close(loss, want, equal_nan=True)
    torch.testing.assert_close(dx, want_dx, equal_nan=True)
    assert loss.isnan().tolist() == [False, False, True, True, True, False]
    # fp32's lowest value, a common mask, must not overflow on the way.
    low = torch.full((2, 40), torch.finfo(torch.float32).min)
    low[0, 3] = 1.0
    with target.active():
        loss, _ = _both(llmops.cross_entropy, low, torch.tensor([3, 3]), reduction="none")
    torch.testing.assert_close(loss, torch.tensor([0.0, math.log(40)]))


@TARGETS
@pytest.mark.parametrize("shape", [(3, 5, 0), (0, 5, 4), (3, 5, 0, 2), (2, 5, 3, 0, 4)])
def test_cross_entropy_of_no_rows(target: Target, shape: tuple[int, ...]) -> None:
    """Whichever of several leading dimensions it is that has none."""
    x = torch.randn(shape, requires_grad=True)
    ids = torch.empty(shape[:1] + shape[2:], dtype=torch.int64)
    for reduction in ("none", "sum", "mean"):
        with target.active():
            loss = llmops.cross_entropy(x, ids, reduction=reduction, backend=target.backend)
            (dx,) = torch.autograd.grad(loss.sum(), x)
        expected = F.cross_entropy(x, ids, reduction=reduction)
        torch.testing.assert_close(loss, expected, equal_nan=True)
        assert dx.shape == x.shape


@TARGETS
def test_cross_entropy_ignored_rows_are_not_read(target: Target) -> None:
    x, ids = torch.randn(4, 30), torch.tensor([1, -100, 2, -100])
    x[1] = math.nan
    with target.active():
        for kwargs in ({}, {"label_smoothing": 0.1, "z_loss": 0.1}):
            loss, dx = _both(llmops.cross_entropy, x, ids, **kwargs)
            same, _ = _both(llmops.cross_entropy, x[::2], ids[::2], **kwargs)
            assert torch.equal(loss, same)
            assert bool((dx[1::2] == 0).all()) and bool(dx.isfinite().all())


def test_cross_entropy_z_loss_speaks_of_rows() -> None:
    """Class weights do not touch it, and its mean is over the rows that are not ignored."""
    x, ids = torch.randn(5, 12), torch.tensor([3, -100, 0, 11, 3])
    weight, kept = torch.rand(12), torch.tensor([0, 2, 3, 4])
    for backend in ("cpu", "reference"):
        for reduction, of in (("mean", torch.Tensor.mean), ("sum", torch.Tensor.sum)):
            got = llmops.cross_entropy(
                x, ids, weight, z_loss=0.25, reduction=reduction, backend=backend
            )
            want = F.cross_entropy(x, ids, weight, reduction=reduction)
            want = want + 0.25 * of(x[kept].logsumexp(1).square())
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_cross_entropy_rejects_targets_out_of_range(backend: str) -> None:
    x = torch.randn(3, 5, requires_grad=True)
    for bad in (5, -1, 2**40):
        ids = torch.tensor([0, bad, 1])
        with pytest.raises(
            IndexError, match=rf"target holds {bad}, but input has 5 classes \(0 to 4\); ignore_in"
        ):
            llmops.cross_entropy(x, ids, backend=backend)
    with pytest.raises(IndexError, match="target holds 7"):
        llmops.cross_entropy(x, torch.tensor([0, 7, 1], dtype=torch.int32), backend=backend)
    # The raw backward checks for itself: its target may have changed since the forward.
    lse = torch.zeros(1, dtype=torch.float64)
    how = (-100, 0.0, 0.0, 1)
    with pytest.raises(IndexError, match="target holds 5"):
        torch.ops.llmops_cpu.cross_entropy_bwd(
            torch.ones(()), None, x[:1].detach(), torch.tensor([5]), None, lse, *how
        )


def test_cross_entropy_probability_targets() -> None:
    """On the reference, which explain says, and auto gets right."""
    x, p = torch.randn(4, 9, 2), torch.rand(4, 9, 2).softmax(1)
    decision = llmops.explain("cross_entropy", x, p)
    assert decision.backend == "reference" and "probability targets" in decision.rejected["cpu"]
    with pytest.raises(NotImplementedError, match="probability targets"):
        llmops.cross_entropy(x, p, backend="cpu")
    weight = torch.rand(9)
    for kwargs in ({}, {"reduction": "none", "label_smoothing": 0.2, "weight": weight}):
        leaves = [t.clone().requires_grad_() for t in (x, p, x, p)]
        got = llmops.cross_entropy(*leaves[:2], **kwargs)
        want = F.cross_entropy(*leaves[2:], **kwargs)
        torch.testing.assert_close(got, want)
        for g, w in zip(
            torch.autograd.grad(got.sum(), leaves[:2]),
            torch.autograd.grad(want.sum(), leaves[2:]),
            strict=True,
        ):
            torch.testing.assert_close(g, w)
    squares = x.logsumexp(1).square().mean()
    got = llmops.cross_entropy(x, p, z_loss=0.5)
    torch.testing.assert_close(got, F.cross_entropy(x, p) + 0.5 * squares)


@pytest.mark.parametrize("transposed", [False, True])
def test_cross_entropy_peak_memory(transposed: bool) -> None:
    """Forward: nothing of the logits' size. Backward: the gradient alone. Also for [B, T, V] logits
    seen as [B, V, T]."""
    x = torch.randn(2, 256, 50257)
    ids = torch.randint(50257, (2, 256))
    size = x.numel() * 4
    x, ids = (x.transpose(1, 2), ids) if transposed else (x.flatten(0, 1), ids.flatten())
    llmops.cross_entropy(x[:1], ids[:1])  # whatever a first call loads
    assert peak_bytes(lambda: llmops.cross_entropy(x, ids)) < size // 20
    x.requires_grad_()
    loss = llmops.cross_entropy(x, ids, label_smoothing=0.1, z_loss=1e-4)
    assert peak_bytes(lambda: torch.autograd.grad(loss, x)) < size + size // 20


def test_cross_entropy_keeps_one_number_per_row() -> None:
    x, ids = torch.randn(64, 300, requires_grad=True), torch.randint(300, (64,))
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        llmops.cross_entropy(x, ids)
    mine = [t for t in kept if t.data_ptr() not in (x.data_ptr(), ids.data_ptr())]
    assert [t.shape for t in mine] == [(64,)]


def test_cross_entropy_autocast_and_dtype() -> None:
    """16 bits under autocast, or where dtype says so, give an fp32 loss and a 16-bit gradient."""
    x, ids = torch.randn(6, 50).bfloat16(), torch.randint(50, (6,))
    weight = torch.rand(50)
    want, _ = _both(F.cross_entropy, x.float(), ids, weight)
    with torch.autocast("cpu", torch.bfloat16):
        got, dx = _both(llmops.cross_entropy, x, ids, weight)
        assert F.cross_entropy(x, ids, weight).dtype == torch.float32
    assert got.dtype == torch.float32 and dx.dtype == torch.bfloat16
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(llmops.cross_entropy(x, ids, weight, dtype=torch.float32), want)
    assert llmops.cross_entropy(x, ids).dtype == torch.bfloat16


def test_cross_entropy_gradient_through_lse() -> None:
    """The operator's second result is differentiable, alone and with the loss."""
    x, ids = torch.randn(5, 20, requires_grad=True), torch.tensor([0, 4, -100, 19, 2])
    operator = torch.ops.llmops.cross_entropy
    loss, lse = operator(x, ids, None, -100, 0.0, 0.0, "mean", torch.float32, "cpu")
    kept = (ids != -100).double()
    want_lse = torch.logsumexp(x.double(), 1) * kept
    torch.testing.assert_close(lse, want_lse)
    for total, want in (
        (lse.square().sum(), want_lse.square().sum()),
        (loss + lse.sum(), F.cross_entropy(x, ids) + want_lse.sum()),
    ):
        (got,) = torch.autograd.grad(total, x, retain_graph=True)
        torch.testing.assert_close(got, torch.autograd.grad(want, x, retain_graph=True)[0])


def test_cross_entropy_in_place_gradient() -> None:
    """The raw operator that writes the gradient over the logits."""
    x, ids = torch.randn(7, 65), torch.tensor([1, -100, 3, 4, 5, 64, 0])
    how = (None, -100, 0.1, 0.01, 0, torch.float32)
    _, lse = torch.ops.llmops_cpu.cross_entropy_fwd(x, ids, *how)
    grad = torch.randn(7)
    arguments = (ids, None, lse, *how[1:-1])
    want = torch.ops.llmops_cpu.cross_entropy_bwd(grad, None, x, *arguments)
    torch.ops.llmops_cpu.cross_entropy_bwd_(grad, x, *arguments)
    assert torch.equal(x, want)


def test_cross_entropy_one_target_in_a_list() -> None:
    x = torch.randn(9)
    for reduction in ("none", "mean"):
        got = llmops.cross_entropy(x, torch.tensor([4]), reduction=reduction)
        torch.testing.assert_close(got, F.cross_entropy(x, torch.tensor([4]), reduction=reduction))


def test_cross_entropy_rejects_bad_input() -> None:
    x, ids = torch.randn(3, 4), torch.zeros(3, dtype=torch.int64)
    refused: list[tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = [
        (TypeError, "input has dtype int64", (ids[:, None], ids), {}),
        (ValueError, "got a scalar", (x[0, 0], ids), {}),
        (TypeError, "target must be a Tensor", (x, [0, 1, 2]), {}),
        (TypeError, "target must be an int64 or int32 Tensor; got dtype float", (x, x[:, 0]), {}),
        (
            TypeError,
            "target must be an int64 or int32 Tensor; got dtype uint8",
            (x, ids.byte()),
            {},
        ),
        (TypeError, "means class probabilities", (x, x.long()), {}),
        (ValueError, r"shape \(3,\), or probabilities of shape \(3, 4\); got", (x, ids[:2]), {}),
        (ValueError, "ignore_index is for class indices", (x, x.softmax(1)), {"ignore_index": 2}),
        (ValueError, r"weight must be \[4\], one per class", (x, ids, x[0, :3]), {}),
        (TypeError, "weight has dtype int64", (x, ids, torch.ones(4).long()), {}),
        (
            ValueError,
            r"label_smoothing must be in \[0, 1\]; got 1.5",
            (x, ids),
            {"label_smoothing": 1.5},
        ),
        (ValueError, "got nan", (x, ids), {"label_smoothing": math.nan}),
        (ValueError, "z_loss must be finite", (x, ids), {"z_loss": -1.0}),
        (ValueError, 'reduction must be "none"', (x, ids), {"reduction": "average"}),
        (TypeError, "dtype must be a floating-point", (x, ids), {"dtype": torch.int32}),
        (NotImplementedError, "float64", (x.double(), ids), {"backend": "cpu"}),
        (
            NotImplementedError,
            "weight takes no gradient",
            (x, ids, torch.ones(4, requires_grad=True)),
            {},
        ),
    ]
    for error, match, args, kwargs in refused:
        with pytest.raises(error, match=match):
            llmops.cross_entropy(*args, **kwargs)


def test_cross_entropy_module_replaces_torch() -> None:
    weight = torch.rand(11)
    arguments = {"weight": weight, "ignore_index": 3, "label_smoothing": 0.1, "reduction": "sum"}
    theirs, ours = torch.nn.CrossEntropyLoss(**arguments), nn.CrossEntropyLoss(**arguments)
    assert list(ours.state_dict()) == list(theirs.state_dict()) == ["weight"]
    ours.load_state_dict(theirs.state_dict())
    x, ids = torch.randn(8, 11, 2), torch.randint(11, (8, 2))
    torch.testing.assert_close(ours(x, ids), theirs(x, ids))
    assert nn.CrossEntropyLoss(z_loss=1.0)(x, ids) > nn.CrossEntropyLoss()(x, ids)
    with pytest.raises(NotImplementedError, match="triton"):
        nn.CrossEntropyLoss(backend="triton")(x, ids)


@SHORT_WAYS
def test_cross_entropy_short_way_is_the_long_way(target: Target) -> None:
    """A call that names no backend goes past the checks: the same bits, whatever is left out."""
    x, classes = torch.randn(5, 37), torch.tensor([3, -100, 36, 0, 7])
    with target.active(), torch.no_grad():
        for values in (x, x.bfloat16(), x.t().contiguous().t()):
            for options in (
                {},
                {"reduction": "sum"},
                {"reduction": "none"},
                {"dtype": torch.float32},
            ):
                want, got = (
                    llmops.cross_entropy(values, classes, **options, backend=way)  # type: ignore[arg-type]
                    for way in ("cpu", None)
                )
                assert got.dtype == want.dtype and torch.equal(got, want)
            ignoring = llmops.cross_entropy(values, classes.clamp(0), ignore_index=0)
            want = llmops.cross_entropy(values, classes.clamp(0), ignore_index=0, backend="cpu")
            assert torch.equal(ignoring, want)
    with pytest.raises(IndexError, match="0 classes"):
        llmops.cross_entropy(torch.zeros(2, 0), torch.tensor([0, 0]))
    assert bool(llmops.cross_entropy(torch.zeros(0, 5), torch.zeros(0, dtype=torch.long)).isnan())
