"""The CUDA norms in the simulator: rows of the lengths where another kernel takes over, against
fp64. The kit, whose rows are shorter, runs on them with LLMOPS_CUDA_SIM=1."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmops import reference
from llmops.testing import assert_close

# Held by 512 threads; by 1024, which wide rows alone are; swept.
LENGTHS = [8192, 8200, 12296, 16384, 8193, 16385, 16392]


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_cuda_norms_of_long_rows(sim: Any, n: int, dtype: torch.dtype) -> None:
    torch.manual_seed(n)
    sim.schedule(seed=n)
    # A mean far from 0, and a residual of another type.
    x, residual = torch.randn(2, n).add(30.0).to(dtype), torch.randn(2, n)
    weight, bias = torch.randn(n), torch.randn(n).to(dtype)
    ops = torch.ops.llmops_cuda_sim

    got = ops.add_layer_norm_fwd(x, residual, weight, bias, 1e-5, 1)
    oracle = reference.add_layer_norm(x.double(), residual.double(), n, weight, bias)
    plain = reference.add_layer_norm(x, residual, n, weight, bias)
    for what, g, o, p in zip(("y", "h"), got, oracle, plain, strict=True):
        assert_close(g, o, p, factor=2.0, what=what)

    # Where both are of one type, h is rounded to it before it is normalized.
    got = ops.add_rms_norm_fwd(x, residual.to(dtype), weight, 1e-5, 1, 0.5)
    tensors = [t.to(dtype) for t in (x, residual)]
    oracle = reference.add_rms_norm(
        *(t.double() for t in tensors), n, weight, 1e-5, weight_offset=0.5
    )
    plain = reference.add_rms_norm(*tensors, n, weight, 1e-5, weight_offset=0.5)
    for what, g, o, p in zip(("y", "h"), got, oracle, plain, strict=True):
        assert_close(g, o, p, factor=2.0, what=what)
