"""scaled_dot_product_attention: the conformance kit, and torch argument for argument."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import llmops
from llmops.testing import Target, assert_close, suite, targets
from llmops.testing.specs.scaled_dot_product_attention import SPEC

globals().update(suite(SPEC))

TARGETS = pytest.mark.parametrize("target", targets("scaled_dot_product_attention"), ids=str)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def _inputs(
    query: tuple[int, ...], key: tuple[int, ...], dtype: torch.dtype, dim_v: int = 0
) -> list[Tensor]:
    torch.manual_seed(0)
    value = (*key[:-1], dim_v or key[-1])
    return [torch.randn(s).to(dtype).requires_grad_() for s in (query, key, value)]


def _check(target: Target, inputs: list[Tensor], *, factor: float = 3.0, **arguments: Any) -> None:
    """Values and gradients against torch in fp64, by torch's own error in this dtype."""

    def run(fn: Any, tensors: list[Tensor], **extra: Any) -> list[Tensor]:
        out = fn(*tensors, **arguments, **extra)
        if not out.requires_grad:
            return [out]
        generator = torch.Generator(target.device).manual_seed(1)
        cotangent = torch.randn(out.shape, generator=generator).bfloat16()
        return [out, *torch.autograd.grad(out, tensors, cotangent.to(out.dtype))]

    with target.active():
        got = run(llmops.scaled_dot_product_attention, inputs, backend=target.backend)
    yardstick = run(F.scaled_dot_product_attention, inputs)
    mask = arguments.get("attn_mask")
    if mask is not None and mask.is_floating_point():
        arguments["attn_mask"] = mask.double()
    oracle = run(
        F.scaled_dot_product_attention,
        [t.detach().double().requires_grad_(t.requires_grad) for t in inputs],
    )
    # With a mask torch leaves its flash kernel for plain matrix products, whose gradient loses less
    # to cancellation in a row with one dominant key than a flash kernel's can; test_attention.py
    # holds the kernels to the usual factor of 3.
    for i, (g, o, y) in enumerate(zip(got, oracle, yardstick, strict=True)):
        assert g.dtype == y.dtype and g.shape == y.shape
        assert_close(g, o, y, factor=6.0 if i else 2.0, what=f"sdpa output {i}")


@TARGETS
@DTYPES
def test_sdpa_matches_torch(target: Target, dtype: torch.dtype) -> None:
    _check(target, _inputs((2, 3, 20, 16), (2, 3, 30, 16), dtype))
    _check(target, _inputs((2, 4, 20, 16), (2, 2, 30, 16), dtype), enable_gqa=True)
    # Unequal head dims: torch computes them in fp32 whatever the dtype, no yardstick for gradients.
    narrow = [t.detach() for t in _inputs((2, 3, 20, 16), (2, 3, 30, 16), dtype, 8)]
    _check(target, narrow, scale=0.5)
    _check(target, _inputs((4, 20, 16), (4, 30, 16), dtype))
    _check(target, _inputs((20, 16), (30, 16), dtype))
    mask = torch.rand(20, 30) < 0.7
    _check(target, _inputs((2, 3, 20, 16), (2, 3, 30, 16), dtype), attn_mask=mask)
    bias = torch.randn(2, 1, 20, 30).to(dtype)
    _check(target, _inputs((2, 3, 20, 16), (2, 3, 30, 16), dtype), attn_mask=bias)
    bias = torch.randn(4, 20, 30).to(dtype)
    _check(target, _inputs((4, 20, 16), (4, 30, 16), dtype), attn_mask=bias)


@TARGETS
@DTYPES
@pytest.mark.parametrize("tokens", [(25, 25), (20, 33), (33, 20), (1, 20)], ids=str)
def test_sdpa_causal_is_top_left(
    target: Target, dtype: torch.dtype, tokens: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    q, k, v = _inputs((1, 2, tokens[0], 16), (1, 2, tokens[1], 16), dtype)
    with target.active():
        got = llmops.scaled_dot_product_attention(q, k, v, is_causal=True, backend=target.backend)
    keep = torch.ones(tokens, dtype=torch.bool).tril()
    oracle = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=keep)
    yardstick = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert_close(got, oracle, yardstick, factor=2.0, what="causal")


def test_sdpa_what_attention_has_no_form_for() -> None:
    """Computed by torch, or refused where a backend is named."""
    rare = {
        "float64": _inputs((1, 2, 5, 8), (1, 2, 7, 8), torch.float64),
        "batch dimensions broadcast": _inputs((3, 2, 5, 8), (1, 2, 7, 8), torch.float32),
        "dimensions": _inputs((2, 3, 2, 5, 8), (2, 3, 2, 7, 8), torch.float32),
    }
    for reason, tensors in rare.items():
        got = llmops.scaled_dot_product_attention(*tensors)
        torch.testing.assert_close(got, F.scaled_dot_product_attention(*tensors))
        with pytest.raises(NotImplementedError, match=reason):
            llmops.scaled_dot_product_attention(*tensors, backend="cpu")
    # One key/value head broadcasts without enable_gqa, as in torch; other numbers do not.
    q, k, v = _inputs((1, 4, 5, 8), (1, 1, 7, 8), torch.float32)
    got = llmops.scaled_dot_product_attention(q, k, v, backend="cpu")
    torch.testing.assert_close(got, F.scaled_dot_product_attention(q, k, v))
    q, k, v = _inputs((1, 4, 5, 8), (1, 2, 7, 8), torch.float32)
    for fn in (F.scaled_dot_product_attention, llmops.scaled_dot_product_attention):
        with pytest.raises(RuntimeError):
            fn(q, k, v)


def test_sdpa_fully_masked_rows_are_zeros() -> None:
    q, k, v = _inputs((1, 1, 4, 8), (1, 1, 6, 8), torch.float32)
    mask = torch.zeros(4, 6).masked_fill(torch.tensor([0, 1, 0, 0]).bool()[:, None], -math.inf)
    out = llmops.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert bool((out[:, :, 1] == 0).all()) and bool(out.isfinite().all())


@TARGETS
@pytest.mark.parametrize("tokens", [(20, 30), (30, 20)], ids=str)
def test_sdpa_dropout(target: Target, tokens: tuple[int, int]) -> None:
    """The mean over many seeds is the attention without dropout; torch.manual_seed repeats it."""
    q, k, v = (
        t.detach() for t in _inputs((1, 2, tokens[0], 8), (1, 2, tokens[1], 8), torch.float32)
    )

    def run(dropout_p: float) -> Tensor:
        return llmops.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout_p, is_causal=True, backend=target.backend
        )

    torch.manual_seed(0)
    with target.active():
        runs = torch.stack([run(0.3) for _ in range(200)])
        torch.manual_seed(0)
        assert torch.equal(runs[0], run(0.3)) and not torch.equal(runs[0], runs[1])
        error = (runs.mean(0) - run(0.0)).abs()
        assert bool((run(1.0) == 0).all())
    assert bool((error <= 6 * runs.std(0) / math.sqrt(200) + 1e-6).all())


def test_sdpa_compiles_fullgraph() -> None:
    q, k, v = _inputs((1, 2, 9, 8), (1, 2, 5, 8), torch.float32)
    step = torch.compile(
        lambda *t: llmops.scaled_dot_product_attention(*t, is_causal=True),
        fullgraph=True,
        backend="aot_eager",
    )
    torch.testing.assert_close(
        step(q, k, v), F.scaled_dot_product_attention(q, k, v, is_causal=True)
    )


def test_sdpa_rejects_bad_input() -> None:
    q, k, v = _inputs((1, 2, 5, 8), (1, 2, 5, 8), torch.float32)
    with pytest.raises(RuntimeError, match="attn_mask must be None when is_causal"):
        llmops.scaled_dot_product_attention(q, k, v, torch.ones(5, 5).bool(), is_causal=True)
    with pytest.raises(ValueError, match=r"dropout_p must be in \[0, 1\]; got 1.5"):
        llmops.scaled_dot_product_attention(q, k, v, dropout_p=1.5)
    with pytest.raises(TypeError, match="query must be a Tensor"):
        llmops.scaled_dot_product_attention(1.0, k, v)  # type: ignore[arg-type]
