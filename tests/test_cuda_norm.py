"""The CUDA norms in the simulator: rows of the lengths where another kernel takes over, against
fp64, forward and backward. The kit, whose rows are shorter, runs on them with LLMOPS_CUDA_SIM=1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from llmops import reference
from llmops.testing import assert_close

# Forward: held by 512 threads; by 1024, which wide rows alone are; swept.
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


# Backward: held by 256 and by 512 threads, with sums in shared memory that have room for 12288
# elements where there is a bias; swept.
@pytest.mark.parametrize("n", [4104, 8192, 8200, 12288, 12296, 16384, 16392, 4097])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_cuda_norms_backward_of_long_rows(sim: Any, n: int, dtype: torch.dtype) -> None:
    torch.manual_seed(n)
    sim.schedule(seed=n)
    rows = 5  # more than the simulator's two programs
    h, dy = torch.randn(rows, n).add(30.0).to(dtype), torch.randn(rows, n).to(dtype)
    dh_in, weight, bias = torch.randn(rows, n).to(dtype), torch.randn(n), torch.randn(n).to(dtype)
    ops = torch.ops.llmops_cuda_sim

    def gradients(norm: Callable[..., Any], *tensors: torch.Tensor) -> list[torch.Tensor]:
        leaves = [t.detach().requires_grad_() for t in tensors]
        x = leaves[0]
        out = (norm(*leaves) * dy.to(x.dtype)).sum() + (x * dh_in.to(x.dtype)).sum()
        return list(torch.autograd.grad(out, leaves))

    def layer(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> Any:
        return reference.layer_norm(x, n, w, b)

    def rms(x: torch.Tensor, w: torch.Tensor) -> Any:
        return reference.rms_norm(x, n, w, 1e-5, weight_offset=0.5)

    got = ops.layer_norm_bwd(dy, h, dh_in, weight, bias, 1e-5)
    oracle = gradients(layer, *(t.double() for t in (h, weight, bias)))
    plain = gradients(layer, h, weight, bias)
    for what, g, o, p in zip(
        ("dh", "dweight", "dbias"), (got[0], *got[2:]), oracle, plain, strict=True
    ):
        assert_close(g, o, p, factor=3.0, what=what)

    got = ops.rms_norm_bwd(dy, h, dh_in, weight, 1e-5, 1, 0.5)
    oracle, plain = gradients(rms, h.double(), weight.double()), gradients(rms, h, weight)
    for what, g, o, p in zip(("dh", "dweight"), (got[0], got[2]), oracle, plain, strict=True):
        assert_close(g, o, p, factor=3.0, what=what)
    # Without parameters, and without their gradients, dh is the same.
    alone = ops.rms_norm_bwd(dy, h, dh_in, weight, 1e-5, 1, 0.5, True, False, False)
    assert torch.equal(alone[0], got[0]) and alone[2].numel() == 0
