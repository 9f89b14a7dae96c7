"""The Triton attention in forms that its tables do not choose at the sizes of the kit: dQ in one
pass, small blocks and chunks of the head dimension, many splits of a cache."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import llmops
from llmops.testing import Target
from llmops.testing._suite import Case, cases
from llmops.testing.specs import attention, attention_kvcache, attention_varlen

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

SPECS = {s.name: s for s in (attention.SPEC, attention_varlen.SPEC, attention_kvcache.SPEC)}
ONE_PASS = {"ONE_PASS": True}
# Several blocks of either side and chunks of D, whose number the products of a tile depend on.
SMALL = {"BLOCK_M": 32, "BLOCK_N": 32, "CHUNK": 16}
IN_BLOCKS = (
    "gqa-causal-lse-5x23", "70x100-d80x48", "odd-67x103-d33x65", "causal-90x30",
    "window-both-70x100", "everything-70x100",
)  # fmt: skip
IN_SPLITS = ("paged5-modifiers", "leftpad-decode", "chunk5", "paged16-chunk3")


def _cases(op: str, *checks: str, ids: tuple[str, ...] = ()) -> Iterator[Any]:
    for case in cases(SPECS[op]):
        if case.target == Target("triton", "cpu") and case.check in checks:
            if not ids or case.sample.id in ids:
                yield pytest.param(op, case, id=f"{op}-{case.check}-{case.id}")


@pytest.mark.rotating
@pytest.mark.parametrize(
    ("op", "case"),
    [*_cases("attention", "gradients"), *_cases("attention_varlen", "gradients")],
)
def test_triton_attention_one_pass(op: str, case: Case) -> None:
    from llmops.kernels.triton import _config

    with _config.override("attention_bwd", **ONE_PASS):
        case.run(SPECS[op])


@pytest.mark.rotating
@pytest.mark.parametrize("form", [{}, ONE_PASS], ids=["split", "one-pass"])
@pytest.mark.parametrize(("op", "case"), [*_cases("attention", "gradients", ids=IN_BLOCKS)])
def test_triton_attention_in_small_blocks(op: str, case: Case, form: dict[str, Any]) -> None:
    from llmops.kernels.triton import _config

    with (
        _config.override("attention", **SMALL),
        _config.override("attention_bwd", **SMALL, **form),
    ):
        case.run(SPECS[op])


@pytest.mark.rotating
@pytest.mark.parametrize(
    ("op", "case"), [*_cases("attention_kvcache", "matches_reference", ids=IN_SPLITS)]
)
def test_triton_attention_kvcache_of_many_splits(
    op: str, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmops.kernels.triton import _config, _launch
    from llmops.kernels.triton import attention_kvcache as module

    monkeypatch.setattr(module, "SPLIT_KEYS", 16)
    monkeypatch.setattr(_launch, "processors", lambda: 8)
    with _config.override("attention_kvcache", BLOCK_M=16, BLOCK_N=16):
        case.run(SPECS[op])


def _gradients(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, h, 70, 16).to(dtype).requires_grad_() for h in (4, 2, 2))
    out = llmops.attention(q, k, v, causal=True, backend="triton")
    return torch.autograd.grad(out, (q, k, v), torch.randn(out.shape).to(dtype))


def test_triton_attention_one_pass_is_not_for_deterministic_algorithms() -> None:
    """There dQ is the split form's to the last bit, by its blocks; elsewhere a kernel less."""
    from llmops.kernels.triton import _config, _launch

    want = _gradients()
    form = {"BLOCK_M": 32, "BLOCK_N": 32, **ONE_PASS}
    with _config.override("attention_bwd", **form):
        got = _gradients()
        with _launch.recording("interpreter") as launches:
            _gradients()
        assert not any("dq" in launch.kernel.__name__ for launch in launches)
        assert not torch.equal(got[0], want[0]), "the sums are of another order"
        torch.use_deterministic_algorithms(True)
        try:
            found = _gradients()
        finally:
            torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, found, want))


def test_triton_attention_one_pass_without_keys() -> None:
    from llmops.kernels.triton import _config

    q, k = torch.randn(1, 2, 5, 8, requires_grad=True), torch.randn(1, 2, 0, 8)
    with _config.override("attention_bwd", **ONE_PASS):
        out = llmops.attention(q, k, k, backend="triton")
        (dq,) = torch.autograd.grad(out, q, torch.ones_like(out))
    assert bool((dq == 0).all())


def test_triton_attention_of_no_dimensions() -> None:
    """Scores of a head dimension of 0 are zeros, whatever lies in memory where it would be."""
    nothing = torch.full((2, 2, 9, 16), float("nan"))[..., :0]
    q, k = nothing[:, :, :5].requires_grad_(), nothing.detach().requires_grad_()
    v = torch.randn(2, 2, 9, 24, requires_grad=True)
    out = llmops.attention(q, k, v, scale=1.0, backend="triton")
    torch.testing.assert_close(out, v.mean(2, keepdim=True).expand_as(out))
    grad = torch.randn_like(out)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), grad)
    assert dq.shape == q.shape and dk.shape == k.shape
    torch.testing.assert_close(dv, grad.sum(2, keepdim=True).expand_as(v) / 9)
    out = llmops.attention(v[:, :, :5], v, k, backend="triton")
    assert (
        out.shape == (2, 2, 5, 0)
        and torch.autograd.grad(out, v, torch.empty_like(out))[0].eq(0).all()
    )
