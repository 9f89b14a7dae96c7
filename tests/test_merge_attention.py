"""merge_attention: the conformance kit, and what is particular to it."""

from __future__ import annotations

import pytest
import torch

import llmops
from llmops.testing import Target, suite, targets
from llmops.testing.specs.merge_attention import SPEC

globals().update(suite(SPEC))


@pytest.mark.parametrize("target", targets("merge_attention"), ids=str)
@pytest.mark.parametrize("at", [0, 1, 40, 99, 100])
def test_merge_attention_of_halves_is_the_whole(target: Target, at: int) -> None:
    """Attention over keys [0, at) merged with attention over [at, 100): values and gradients."""
    q, k, v = (torch.randn(1, 2, t, 16, requires_grad=True) for t in (30, 100, 100))
    with target.active():
        whole = llmops.attention(q, k, v, return_lse=True, backend=target.backend)
        parts = [
            llmops.attention(q, k[:, :, s], v[:, :, s], return_lse=True, backend=target.backend)
            for s in (slice(0, at), slice(at, 100))
        ]
        merged = llmops.merge_attention(*parts[0], *parts[1], backend=target.backend)
        cotangents = [torch.randn_like(t) for t in whole]
        want = torch.autograd.grad(whole, (q, k, v), cotangents)
        got = torch.autograd.grad(merged, (q, k, v), cotangents)
    for a, b in zip((*merged, *got), (*whole, *want), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_merge_attention_rejects_bad_input() -> None:
    out, lse = torch.randn(2, 3, 8), torch.randn(2, 3)
    with pytest.raises(ValueError, match=r"lse_a must be float32 \(2, 3\).*got float32 \(3, 2\)"):
        llmops.merge_attention(out, lse.T, out, lse)
    with pytest.raises(TypeError, match=r"lse_b must be float32 .*got bfloat16"):
        llmops.merge_attention(out, lse, out, lse.bfloat16())
    with pytest.raises(ValueError, match=r"out_b must be float32 \(2, 3, 8\)"):
        llmops.merge_attention(out, lse, out[..., :4], lse)
    with pytest.raises(TypeError, match="out_a has dtype int64"):
        llmops.merge_attention(out.long(), lse, out, lse)
    with pytest.raises(TypeError, match="lse_a must be a Tensor; got float"):
        llmops.merge_attention(out, 1.0, out, lse)  # type: ignore[arg-type]
