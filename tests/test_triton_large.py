"""Tensors of more than 2^31 elements in the Triton kernels: offsets are 64-bit, in what is read and
in what is written. The kit's check `far_strides` has rows that far apart; here are dense tensors of
that size, and the other axes.

Of a large grid the interpreter runs the first and the last programs alone; what they do not touch
of a tensor takes no memory."""

from __future__ import annotations

import builtins
import operator
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import llmops

pytest.importorskip("triton")
import triton
import triton.language as tl
from llmops.kernels.triton._rows import begin_of

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

# `large`: a part of them is run for each commit, as of the kit.
pytestmark = [pytest.mark.slow, pytest.mark.large]
DTYPE = torch.bfloat16


@pytest.fixture
def edge(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A function that says how many programs run at either end of a large grid."""
    from llmops.kernels.triton import _norm_bwd
    from triton.runtime import interpreter

    programs = [4]

    def ends(*bounds: int) -> Iterator[int]:
        if len(bounds) > 1 or bounds[0] <= 1000:
            yield from builtins.range(*bounds)
        else:
            yield from builtins.range(programs[0])
            yield from builtins.range(bounds[0] - programs[0], bounds[0])

    monkeypatch.setattr(interpreter, "range", ends, raising=False)
    # No program walks over all rows: each has rows of its own.
    monkeypatch.setattr(_norm_bwd, "processors", lambda: 2**21)
    return lambda number: programs.__setitem__(0, number)


def checked(rows: int) -> list[int]:
    return [0, rows - 2, rows - 1]


def rows_of(width: int, seed: int = 0) -> Tensor:
    """[rows, width] of just more than 2^31 elements, whose last two lie beyond."""
    rows = 2**31 // width + 2
    x = torch.empty(rows, width, dtype=DTYPE)
    generator = torch.Generator().manual_seed(seed)
    for row in checked(rows):
        x[row] = torch.randn(width, generator=generator).to(DTYPE)
    return x


def _rotated(x: Tensor) -> Tensor:
    heads = x.view(1, -1, 1, 1024)  # [B, H, T, D]
    out: Tensor = llmops.rope(heads, *llmops.rope_tables(1, 1024))
    return out.view(x.shape)


def _rotated_tokens(x: Tensor) -> Tensor:
    tokens = x.view(1, 1, -1, 1024)
    cos, sin = (t.expand(tokens.shape[2], -1) for t in llmops.rope_tables(1, 64))
    out: Tensor = llmops.rope(tokens, cos, sin, interleaved=True)
    return out.view(x.shape)


def _masked(x: Tensor) -> Tensor:
    mask = torch.zeros(1, x.shape[1], dtype=DTYPE)
    return llmops.softmax(x, mask=mask.expand(x.shape[0], -1), scale=0.5)


def _loss(x: Tensor) -> Tensor:
    target = torch.full((x.shape[0],), x.shape[1] - 1)
    return llmops.cross_entropy(x, target, reduction="none", label_smoothing=0.1)


def _merged(x: Tensor) -> Any:
    lse = torch.zeros(x.shape[0])
    return llmops.merge_attention(x, lse, x.detach(), lse)[0]


ROWWISE: dict[str, Callable[[Tensor], Any]] = {
    "softmax": lambda x: llmops.softmax(x),
    "softmax-mask": _masked,
    "rms_norm": lambda x: llmops.rms_norm(x, x.shape[1]),
    "layer_norm": lambda x: llmops.layer_norm(x, x.shape[1]),
    "add_rms_norm": lambda x: llmops.add_rms_norm(x, x.detach(), x.shape[1]),
    "add_layer_norm": lambda x: llmops.add_layer_norm(x, x.detach(), x.shape[1]),
    "gelu": lambda x: llmops.gelu(x),
    "swiglu": lambda x: llmops.swiglu(x, x.detach()),
    "swiglu-fused": lambda x: llmops.swiglu(x),
    "geglu": lambda x: llmops.geglu(x, x.detach()),
    "rope-heads": _rotated,
    "rope-tokens": _rotated_tokens,
    "cross_entropy": _loss,
    "merge_attention": _merged,
}
# Rows in registers, and longer ones.
WIDTHS = [(op, width) for op in ROWWISE for width in (4096, 20480)]


@pytest.mark.parametrize(("op", "width"), WIDTHS, ids=lambda value: str(value))
def test_triton_large_dense(op: str, width: int, edge: Callable[[int], None]) -> None:
    """Result and gradient of the rows at the ends, the bits of those rows alone."""
    if op == "rope-heads":
        edge(24)
    elif op.startswith(("gelu", "swiglu", "geglu", "cross")):
        edge(2 * width // 1024 + 4)  # their programs have parts of a row
    x, results = rows_of(width), []
    rows = checked(len(x))
    for given in (x, x[rows]):
        leaf = given.requires_grad_()
        with llmops.use_backend("triton"):
            found = ROWWISE[op](leaf)
            outputs = found if isinstance(found, tuple) else (found,)
            last = outputs[0]
            grad = torch.empty(1, dtype=last.dtype).fill_(0.5).expand(last.shape)
            if last.dim() > 1 and last.is_contiguous():
                grad = given.detach()[:, : last.shape[1]]
            (dx,) = torch.autograd.grad(last, leaf, grad)
        at = rows if given is x else slice(None)
        results.append([*(y.detach()[at] for y in outputs), dx[at]])
    for large, small in zip(*results, strict=True):
        assert torch.equal(large, small)
        assert bool(small.any())


def test_triton_large_norm_parameters(edge: Callable[[int], None]) -> None:
    """The programs' sums for the weight's gradient, [programs, n], of more than 2^31 elements, as
    rows of millions make them: written by the first program and the last, and added up."""
    from llmops.kernels.triton import _norm_bwd
    from llmops.kernels.triton._launch import cdiv, launch

    edge(1)
    row = torch.randn(1, 20480, generator=torch.Generator().manual_seed(0))
    programs, n = 2**31 // row.shape[1] + 2, row.shape[1]
    sums = torch.empty(programs, n)
    sums[[0, -1]] = 0.0
    launch(
        _norm_bwd.norm_bwd_long_kernel, (programs,), row.expand(programs, n),
        row.expand(programs, n), None, None, None, None, sums, None, programs, n, 0, 0, 0, 1e-5,
        0.0, CENTERED=False, ROWS=1, BLOCK=4096,
    )  # fmt: skip
    assert torch.equal(sums[0], sums[-1]) and bool(sums[0].any())
    del sums
    for programs, n in ((70, 2**31 // 70 + 64), (1, 2**31 + 64)):  # and of one row, that long
        sums, total = torch.empty(programs, n), torch.empty(n)
        ends = [*range(32), *range((n - 1) // 32 * 32, n)]
        sums[:, ends] = torch.randn(programs, len(ends))
        launch(
            _norm_bwd.norm_sum_kernel, (cdiv(n, 32),), sums, None, total, None, programs, n,
            PROGRAMS=32, COLUMNS=32,
        )  # fmt: skip
        torch.testing.assert_close(total[ends], sums[:, ends].sum(0))
        del sums, total


@pytest.mark.parametrize("axis", ("batch", "heads"))
def test_triton_large_attention(axis: str, edge: Callable[[int], None]) -> None:
    """Results and gradients of more than 2^31 elements; all batch items or heads share memory."""
    many, results = 2**31 // (64 * 32) + 2, []
    q, k, v = torch.randn(3, 1, 1, 64, 32).to(DTYPE)
    for count in (many, 3):
        shape = (count, 1, 64, 32) if axis == "batch" else (1, count, 64, 32)
        leaves = [x.expand(shape).requires_grad_() for x in (q, k, v)]
        out = llmops.attention(*leaves, causal=True, backend="triton")
        assert isinstance(out, Tensor)
        found = (out.detach(), *torch.autograd.grad(out, leaves, v.expand(shape)))
        ends = (slice(None),) * (axis == "heads") + ([0, -2, -1],)
        results.append([x[ends] for x in found])
    for large, small in zip(*results, strict=True):
        assert torch.equal(large, small)
        assert bool(small.any())


def test_triton_large_attention_mask(edge: Callable[[int], None]) -> None:
    """A mask of more than 2^31 elements, and so is its gradient."""
    x, mask = torch.randn(16, 16).to(DTYPE), torch.randn(16, 16)
    results = []
    for count in (2**31 // mask.numel() + 2, 3):
        leaf = mask.expand(count, 1, 16, 16).requires_grad_()
        q = x.expand(leaf.shape)
        out = llmops.attention(q, q, q, mask=leaf, backend="triton")
        assert isinstance(out, Tensor)
        (found,) = torch.autograd.grad(out, leaf, q)
        results.append(found[[0, -2, -1]])
    assert torch.equal(*results)
    assert bool(results[0].any())


def far(generator: torch.Generator, *sizes: int, axis: int) -> Tensor:
    """Values along `axis` spread over more than 2^31 elements, the other axes packed. Of three and
    more: one stride alone that is beyond 32 bits makes all that it is multiplied with 64-bit."""
    assert sizes[axis] > 2
    strides, step = [0] * len(sizes), 1
    for i in reversed(range(len(sizes))):
        if i != axis:
            strides[i], step = step, step * sizes[i]
    strides[axis] = 2**31 // (sizes[axis] - 1) + 2**20
    buffer = torch.empty((sizes[axis] - 1) * strides[axis] + step, dtype=DTYPE)
    return buffer.as_strided(sizes, strides).copy_(torch.randn(sizes, generator=generator))


@pytest.mark.parametrize("axis", (0, 1, 2), ids=("batch", "heads", "tokens"))
@pytest.mark.parametrize("form", ("plain", "one-pass", "window"))
def test_triton_large_attention_strides(form: str, axis: int) -> None:
    from llmops.kernels.triton import _config

    generator = torch.Generator().manual_seed(0)
    q = far(generator, 3, 3, 40, 16, axis=axis)
    k, v = (far(generator, 3, 3, 70, 16, axis=axis) for _ in range(2))
    options: dict[str, Any] = {"causal": True}
    if form == "window":
        options = {"window": (30, 5), "softcap": 3.0}
    results = []
    for given in ([q, k, v], [x.contiguous() for x in (q, k, v)]):
        leaves = [x.requires_grad_() for x in given]
        out = llmops.attention(*leaves, **options, backend="triton")
        assert isinstance(out, Tensor)
        grad = far(torch.Generator().manual_seed(1), *out.shape, axis=axis)
        grad = grad if given[0] is q else grad.contiguous()
        with _config.override("attention_bwd", ONE_PASS=form == "one-pass"):
            results.append((out.detach(), *torch.autograd.grad(out, leaves, grad)))
    for spread, packed in zip(*results, strict=True):
        assert torch.equal(spread, packed)


@pytest.mark.parametrize("axis", (0, 1, 2, 3), ids=("batch", "heads", "tokens", "keys"))
def test_triton_large_attention_mask_gradient(axis: int) -> None:
    """The mask with an axis so far apart, and what its gradient is computed from."""
    generator = torch.Generator().manual_seed(0)
    of_tokens = min(axis, 2)
    q = far(generator, 3, 3, 40, 16, axis=of_tokens)
    k, v = (far(generator, 3, 3, 70, 16, axis=of_tokens) for _ in range(2))
    mask = far(generator, 3, 3, 40, 70, axis=axis)
    results = []
    for given in ([q, k, v, mask], [x.contiguous() for x in (q, k, v, mask)]):
        leaves = [x.requires_grad_() for x in given]
        out = llmops.attention(*leaves[:3], mask=leaves[3], window=(30, 5), backend="triton")
        assert isinstance(out, Tensor)
        grad = far(torch.Generator().manual_seed(1), *out.shape, axis=of_tokens)
        grad = grad if given[0] is q else grad.contiguous()
        results.append((out.detach(), *torch.autograd.grad(out, leaves, grad)))
    for spread, packed in zip(*results, strict=True):
        assert torch.equal(spread, packed)
        assert bool(spread.any())


@pytest.mark.parametrize("paged", (False, True), ids=("contiguous", "paged"))
@pytest.mark.parametrize("axis", (0, 1, 2), ids=("blocks", "heads", "tokens"))
def test_triton_large_cache(axis: int, paged: bool) -> None:
    """A cache with any axis so far apart: appended to, and attended over."""
    results = []
    lengths = torch.tensor([20, 9, 3])
    table = torch.tensor([[2, 0, -7], [4, 1, 9], [3, -1, -1]], dtype=torch.int32) if paged else None
    for spread in (True, False):
        generator = torch.Generator().manual_seed(0)
        sizes = (5, 3, 16, 8) if paged else (3, 3, 32, 8)
        caches = [far(generator, *sizes, axis=axis) for _ in range(2)]
        new = [far(generator, 3, 3, 3, 8, axis=axis) for _ in range(2)]
        q = far(generator, 3, 6, 3, 8, axis=axis)
        if not spread:
            caches, q = [x.contiguous() for x in caches], q.contiguous()
        llmops.kv_cache_append_(*caches, *new, lengths, block_table=table, backend="triton")
        out = llmops.attention_kvcache(
            q, *caches, lengths + 3, block_table=table, causal=True, backend="triton"
        )
        results.append((*caches, out))
    for spread_result, packed in zip(*results, strict=True):
        assert torch.equal(spread_result, packed)


def test_triton_large_chunk(edge: Callable[[int], None]) -> None:
    """A chunk of a prompt whose result is that large."""
    q, k = torch.randn(1, 1, 1, 64).to(DTYPE), torch.randn(1, 1, 16, 64).to(DTYPE)
    chunk = q.expand(1, 1, 2**25 + 2, 64)
    out = llmops.attention_kvcache(chunk, k, k, torch.tensor([16]), backend="triton")
    assert isinstance(out, Tensor)
    for token in (0, -2, -1):
        assert torch.equal(out[0, 0, token], out[0, 0, 1]) and bool(out[0, 0, token].any())


@pytest.mark.parametrize("axis", (1, 2, 3), ids=("heads", "tokens", "dim"))
@pytest.mark.parametrize("interleaved", (False, True))
def test_triton_large_rope_strides(interleaved: bool, axis: int) -> None:
    x = far(torch.Generator().manual_seed(0), 2, 3, 5, 12, axis=axis)
    tables = llmops.rope_tables(5, 8)
    turned = [
        llmops.rope(y, *tables, interleaved=interleaved, backend="triton")
        for y in (x, x.contiguous())
    ]
    assert torch.equal(*turned)
    if axis != 3:  # in place it has to be dense
        llmops.rope_qk_(x[:1], x[1:], *tables, interleaved=interleaved, backend="triton")
        assert torch.equal(x, turned[0])


def test_triton_large_class_strides() -> None:
    """Classes, and columns of an embedding's table, that far apart."""
    x = far(torch.Generator().manual_seed(0), 5, 70, axis=1)
    ids = torch.tensor([0, 69, 35, 36, 68], dtype=torch.int32)
    results = []
    for given in (x, x.contiguous()):
        leaf = given.requires_grad_()
        loss = llmops.cross_entropy(leaf, ids, reduction="sum", backend="triton")
        rows = llmops.embedding(ids[:1], leaf, backend="triton")
        results.append((loss, rows, *torch.autograd.grad(loss, leaf)))
    assert all(map(torch.equal, *results))


def test_triton_large_embedding(edge: Callable[[int], None]) -> None:
    """A table of more than 2^31 elements, read and its gradient written at both ends."""
    edge(16)
    table = rows_of(4096)
    rows = checked(len(table))
    leaf = table.requires_grad_()
    out = llmops.embedding(torch.tensor(rows), leaf, backend="triton")
    assert torch.equal(out, table.detach()[rows])
    grad = torch.randn(3, 4096).to(DTYPE)
    (found,) = torch.autograd.grad(out, leaf, grad)
    assert torch.equal(found[rows], grad)


def test_triton_large_logits() -> None:
    logits = far(torch.Generator().manual_seed(0), 3, 50, axis=0)
    for options in ({"temperature": 0.0}, {"top_k": 9, "top_p": 0.9}):
        drawn = [
            llmops.sample(
                x, generator=torch.Generator().manual_seed(1), backend="triton", **options
            )
            for x in (logits, logits.contiguous())
        ]
        assert torch.equal(*drawn)


@triton.jit
def places_kernel(rows, begin, size_b, size_c, stride_a, stride_b, stride_c):
    i = tl.program_id(0)
    place = begin_of(tl.load(rows + i), size_b, size_c, stride_a, stride_b, stride_c)
    tl.store(begin + i, place)


def test_triton_large_places_of_rows() -> None:
    """Of a broadcast tensor whose inner sizes' product is beyond 32 bits."""
    from llmops.kernels.triton._launch import launch

    b, c, strides = 2**16, 2**16, (3, 7, 2**40)
    rows = [0, c + 3, b * c - 1, b * c, 2 * b * c - 1]
    begin = torch.empty(len(rows), dtype=torch.int64)
    launch(places_kernel, (len(rows),), torch.tensor(rows), begin, b, c, *strides)
    places = ((r // (b * c), r // c % b, r % c) for r in rows)
    assert begin.tolist() == [sum(map(operator.mul, at, strides)) for at in places]
