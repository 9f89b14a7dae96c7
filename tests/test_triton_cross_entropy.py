"""The Triton cross-entropy in several blocks, in place, and with targets outside the classes."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

HOW: tuple[Any, ...] = (-100, 0.1, 0.0, 0)


def test_triton_cross_entropy_blocks_in_place_and_out_of_range() -> None:
    from llmops.kernels.triton import _config

    from llmops.backends import triton

    x, weight, grad = torch.randn(5, 75) * 4, torch.rand(75), torch.randn(5)
    ids = torch.tensor([0, -100, 74, 75, 40])
    few = {"ROWS": 2, "PARTS": 2, "LANES": 8}
    with (
        _config.override("cross_entropy", **few),
        _config.override("cross_entropy_bwd", ROWS=2, BLOCK=16),
    ):
        loss, lse = triton.cross_entropy(x, ids, weight, *HOW, torch.float32)
        dx = triton.cross_entropy_bwd(grad, None, x, ids, weight, lse, *HOW)
        over = x.clone()
        triton.cross_entropy_bwd_(grad, over, ids, weight, lse, *HOW)
    assert loss[3].isnan() and dx[3].isnan().all()
    torch.testing.assert_close(over, dx, rtol=0, atol=0, equal_nan=True)
    kept = torch.tensor([0, 1, 2, 4])
    leaf = x[kept].double().requires_grad_()
    want = F.cross_entropy(leaf, ids[kept], weight.double(), label_smoothing=0.1, reduction="none")
    torch.testing.assert_close(loss[kept].double(), want.detach(), rtol=1e-6, atol=1e-6)
    (want_dx,) = torch.autograd.grad(want, leaf, grad[kept].double())
    torch.testing.assert_close(dx[kept].double(), want_dx, rtol=1e-5, atol=1e-6)
