"""The Triton embedding in several blocks of a row, and with ids that no table has."""

from __future__ import annotations

import os

import pytest
import torch

import llmops
from llmops.testing import Make, Target
from llmops.testing._checks import CHECKS
from llmops.testing.specs.embedding import SPEC

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

WANTED = ("positions-3x6", "given-2x4", "padding-3x8", "int32-4x3")


def test_triton_embedding_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    from llmops.kernels.triton import _config

    small = {
        "embedding": {"TOKENS": 2, "BLOCK": 16},
        "embedding_bwd": {"ROWS": 2, "PLACES": 2, "BLOCK": 16},
    }
    monkeypatch.setattr(_config, "_overrides", small)
    for sample in SPEC.samples(Make(torch.float32)):
        if sample.id in WANTED:
            CHECKS["gradients"](SPEC, sample, Target("triton", "cpu"))
            CHECKS["any_strides"](SPEC, sample, Target("triton", "cpu"))


def test_triton_embedding_id_outside_the_table_is_nan() -> None:
    """A GPU cannot raise: nothing outside is read, the row is NaN, and it gets no gradient."""
    weight, positions = torch.randn(5, 7, requires_grad=True), torch.randn(3, 7)
    tokens = torch.tensor([4, -1, 5, 0, 2**40])
    y = llmops.embedding(tokens, weight, backend="triton")
    assert y[[1, 2, 4]].isnan().all() and torch.equal(y[[0, 3]], weight[[4, 0]])
    y.sum().backward()
    assert weight.grad is not None and weight.grad[:, 0].tolist() == [1.0, 0.0, 0.0, 0.0, 1.0]
    places = torch.tensor([2, 3])
    with torch.no_grad():
        y = llmops.embedding(
            tokens[[0, 3]], weight, positions=places, position_weight=positions, backend="triton"
        )
    assert not y[0].isnan().any() and y[1].isnan().all()
