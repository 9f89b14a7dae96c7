"""The Triton rope where heads are looped over in blocks, and on memory that it must refuse."""

from __future__ import annotations

import os

import pytest
import torch

import llmops
from llmops.testing import Make, Target
from llmops.testing._checks import CHECKS
from llmops.testing.specs.rope import SPEC, SPEC_QK, tables

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

WANTED = ("ids-2x2x5x34", "pairs-1x2x3x70", "partial-1x2x7x80", "pairs-1x3+1x4x22")


@pytest.mark.parametrize("spec", (SPEC, SPEC_QK), ids=lambda s: s.name)
def test_triton_rope_in_blocks(spec: object) -> None:
    from llmops.kernels.triton import _config

    with _config.override("rope", TOKENS=4, GROUP=2, BLOCK=8):
        for sample in spec.samples(Make(torch.float32)):
            if sample.id in WANTED:
                CHECKS["gradients"](spec, sample, Target("triton", "cpu"))
                CHECKS["any_strides"](spec, sample, Target("triton", "cpu"))


@pytest.mark.parametrize("interleaved", (False, True))
def test_triton_rope_position_outside_the_tables_is_nan(interleaved: bool) -> None:
    """A GPU cannot raise: nothing outside is read, and the result shows it, in that token only."""
    cos, sin = tables(Make(torch.float32), 6, 4)
    x = torch.randn(1, 2, 5, 11)
    ids = torch.tensor([0, -1, 5, 6, 2**40])
    y = llmops.rope(x, cos, sin, ids, interleaved=interleaved, backend="triton")
    assert y[0, :, [1, 3, 4], :8].isnan().all() and torch.equal(y[..., 8:], x[..., 8:])
    good = llmops.rope(
        x[:, :, [0, 2]], cos, sin, ids[[0, 2]], interleaved=interleaved, backend="cpu"
    )
    assert torch.allclose(y[:, :, [0, 2]], good, atol=1e-6)


def test_triton_rope_in_place_refuses_shared_memory() -> None:
    cos, sin = tables(Make(torch.float32), 4, 4)
    q, k = torch.randn(2, 2, 4, 8), torch.randn(2, 2, 4, 8)
    fused = torch.randn(2, 4, 6, 8).transpose(1, 2)
    for match, pair in (
        ("q's elements share memory.*use llmops.rope_qk", (q[:1].expand(2, 2, 4, 8), k)),
        (
            "k's elements share memory",
            (q, torch.randn(100).as_strided((2, 2, 4, 8), (8, 4, 16, 1))),
        ),
        ("q and k share memory", (q, q)),
        ("q and k share memory", (fused[:, :3], fused[:, 2:4])),
        ("q and k share memory", (fused[:, 2:4], fused[:, :3])),
    ):
        with pytest.raises(RuntimeError, match=match):
            llmops.rope_qk_(*pair, cos, sin, backend="triton")
    for pair in ((fused[:, :3], fused[:, 4:]), (fused[:, 3:5], fused[:, :3])):
        want = llmops.rope_qk(*pair, cos, sin, backend="triton")
        got = llmops.rope_qk_(*pair, cos, sin, backend="triton")
        assert all(map(torch.equal, got, want))
