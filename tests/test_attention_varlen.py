"""attention_varlen: the conformance kit, and what is particular to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import llmops
from llmops import reference
from llmops.testing import Target, suite, targets
from llmops.testing.specs.attention_varlen import SPEC

globals().update(suite(SPEC))

TARGETS = pytest.mark.parametrize("target", targets("attention_varlen"), ids=str)


def _bounds(*lengths: int) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


@TARGETS
def test_attention_varlen_equals_attention_one_by_one(target: Target) -> None:
    """Each sequence as llmops.attention gives it alone, in values and gradients."""
    q_lengths, k_lengths = (3, 100, 1, 40), (50, 100, 700, 20)
    q = torch.randn(sum(q_lengths), 4, 32, requires_grad=True)
    k, v = (torch.randn(sum(k_lengths), 2, 32, requires_grad=True) for _ in range(2))
    with target.active():
        out, lse = llmops.attention_varlen(
            q, k, v, _bounds(*q_lengths), _bounds(*k_lengths), 100, 700,
            causal=True, return_lse=True, backend=target.backend,
        )  # fmt: skip
        pieces: list[Any] = []
        for a, b, c in zip(q.split(q_lengths), k.split(k_lengths), v.split(k_lengths), strict=True):
            one = (x.transpose(0, 1)[None] for x in (a, b, c))
            pieces.append(
                llmops.attention(*one, causal=True, return_lse=True, backend=target.backend)
            )
    alone = torch.cat([o[0].transpose(0, 1) for o, _ in pieces])
    torch.testing.assert_close(out, alone)
    torch.testing.assert_close(lse, torch.cat([x[0] for _, x in pieces], 1))
    cotangent = torch.randn_like(out)
    got = torch.autograd.grad(out, (q, k, v), cotangent)
    want = torch.autograd.grad(alone, (q, k, v), cotangent)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@TARGETS
def test_attention_varlen_sequences_do_not_mix(target: Target) -> None:
    """A NaN in one sequence's q, k and v reaches no other, in either direction."""
    lengths = (30, 70, 1, 50)
    tensors = [torch.randn(sum(lengths), 2, 16) for _ in range(3)]
    for x in tensors:
        x[30:100] = float("nan")
        x.requires_grad_()
    with target.active():
        out = llmops.attention_varlen(
            *tensors, _bounds(*lengths), _bounds(*lengths), 70, 70, backend=target.backend
        )
        assert isinstance(out, torch.Tensor)
        grads = torch.autograd.grad(out, tensors, torch.ones_like(out))
    for x in (out, *grads):
        clean = torch.cat((x[:30], x[100:]))
        assert bool(clean.isfinite().all()) and bool(x[30:100].isnan().all())


@TARGETS
@pytest.mark.parametrize("dropout_p", [0.3, 1.0])
def test_attention_varlen_dropout(target: Target, dropout_p: float) -> None:
    """The reference drops the same weights for the same generator; so does the backward."""
    q = torch.randn(95, 4, 16, requires_grad=True)
    k, v = (torch.randn(122, 2, 16, requires_grad=True) for _ in range(2))
    results = []
    for backend in (target.backend, "reference"):
        with target.active():
            out = llmops.attention_varlen(
                q, k, v, _bounds(5, 70, 20), _bounds(30, 80, 12), 70, 80, causal=True,
                dropout_p=dropout_p, generator=torch.Generator(target.device).manual_seed(7),
                backend=backend,
            )  # fmt: skip
            results.append((out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(q))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@TARGETS
def test_attention_varlen_bits_do_not_depend_on_threads(target: Target) -> None:
    q_lengths, k_lengths = (600, 1, 40, 3), (600, 5000, 40, 1500)
    q = torch.randn(sum(q_lengths), 2, 64, requires_grad=True)
    k, v = (torch.randn(sum(k_lengths), 1, 64, requires_grad=True) for _ in range(2))
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            with target.active():
                out, lse = llmops.attention_varlen(
                    q, k, v, _bounds(*q_lengths), _bounds(*k_lengths), 600, 5000, causal=True,
                    return_lse=True, backend=target.backend,
                )  # fmt: skip
                grads = torch.autograd.grad(out.sum() + lse.sum(), (q, k, v))
            results.append((out, lse, *grads))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_attention_varlen_rejects_bad_input(backend: str) -> None:
    q, k = torch.randn(9, 4, 8), torch.randn(12, 2, 8)
    good = (_bounds(4, 5), _bounds(6, 6), 5, 6)

    def call(*arguments: Any, **kwargs: Any) -> Any:
        return llmops.attention_varlen(*arguments, backend=backend, **kwargs)

    with pytest.raises(TypeError, match="attention_varlen: scale must be a number"):
        call(q, k, k, *good, scale=True)
    for bounds, what in (
        (torch.tensor([0, 5, 4, 9]), "cu_seqlens_q must not decrease; got 5, 4 at index 1"),
        (torch.tensor([0, 4, 8, 8]), r"cu_seqlens_q must run from 0 to 9.* got 0 to 8"),
        (torch.tensor([1, 4, 8, 9]), "got 1 to 9"),
        (torch.tensor([0, 2**40, -3, 9]), r"must not decrease|max_seqlen_q is 9"),
    ):
        with pytest.raises(ValueError, match=what):
            call(q, k, k, bounds, _bounds(6, 6, 0), 9, 6)
    with pytest.raises(ValueError, match="max_seqlen_k is 5, but sequence 0 has 6 rows"):
        call(q, k, k, *good[:3], 5)
    with pytest.raises(ValueError, match=r"cu_seqlens_k must be \[3\]; got shape \(2,\)"):
        call(q, k, k, good[0], _bounds(12), 5, 12)
    with pytest.raises(TypeError, match="cu_seqlens_q must be an int64 or int32 Tensor.*float32"):
        call(q, k, k, good[0].float(), *good[1:])
    with pytest.raises(ValueError, match=r"beginning with 0; got \[0\]"):
        call(q, k, k, good[0][:0], good[1][:0], 5, 6)
    with pytest.raises(ValueError, match=r"q must be \[total, heads, head_dim\]"):
        call(q[None], k, k, *good)
    with pytest.raises(ValueError, match="q has 4 heads, which is no multiple of k's 3"):
        call(q, *[torch.randn(12, 3, 8)] * 2, *good)
    with pytest.raises(ValueError, match=r"k must be .* D=8"):
        call(q, k[..., :4], k, *good)
    with pytest.raises(ValueError, match=r"v must be .*\(12, 2\)"):
        call(q, k, k[:11], *good)
    with pytest.raises(TypeError, match="k has dtype bfloat16 and q float32"):
        call(q, k.bfloat16(), k, *good)
    with pytest.raises(ValueError, match=r"alibi_slopes must be \[Hq\] or \[B, Hq\] with B=2"):
        call(q, k, k, *good, alibi_slopes=torch.ones(9, 4))
    with pytest.raises(ValueError, match="max_seqlen_q must be an int >= 0; got -1"):
        call(q, k, k, good[0], good[1], -1, 6)


def test_attention_varlen_layouts() -> None:
    """Packed heads-first tensors and lengths with gaps: the same values; out is laid out as q."""
    q, k, v = (torch.randn(4, 60, 16).transpose(0, 1) for _ in range(3))
    bounds = torch.tensor([0, 9, 25, 9, 60, 9])[::2].clone()
    gapped = torch.stack((bounds, bounds + 1000), 1)[:, 0]
    out = llmops.attention_varlen(q, k, v, gapped, gapped.int(), 35, 35, causal=True)
    assert isinstance(out, torch.Tensor) and out.transpose(0, 1).is_contiguous()
    want = reference.attention_varlen(q, k, v, bounds, bounds, 35, 35, causal=True)
    torch.testing.assert_close(out, want)


def test_attention_varlen_autocast_of_mixed_dtypes() -> None:
    q, bounds = torch.randn(20, 2, 8), _bounds(12, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = llmops.attention_varlen(q, q, q, bounds, bounds, 12, 12)
    assert isinstance(out, torch.Tensor) and out.dtype == torch.bfloat16
