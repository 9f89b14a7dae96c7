"""What the CUDA launchers and bindings say where a launch is refused, in the simulator, which
refuses them one after the other: each operator raises, and the next call is as if nothing was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from llmops.backends import cuda

X = torch.randn(3, 40)
LOGITS, TARGET = torch.randn(6, 50), torch.arange(6)
HEADS = torch.randn(1, 2, 70, 64).bfloat16()
KEYS = torch.randn(1, 1, 600, 64).bfloat16()
WIDE = torch.randn(1, 1, 20, 256).bfloat16()  # more than 48 KiB of shared memory
TABLE = torch.randn(70, 32)
LSE = torch.randn(1, 2, 20)
MASK = torch.randn(20, 30)


def _backward(q: Tensor, k: Tensor, lse: Tensor, mask: Any = None, sinks: Any = None) -> tuple:
    return (q, None, q, k, k, mask, q, lse, False, 0.1, mask is not None, -1, -1, None, 0.0, sinks)


# Arguments of raw operators, several where the ways differ that a call takes.
CALLS: dict[str, list[tuple]] = {
    "add_layer_norm_fwd": [(X, X, None, None, 1e-5)],
    "add_rms_norm_fwd": [(X, X, None, 1e-5)],
    "attention_fwd": [
        (HEADS, KEYS, KEYS, None, True, 0.1),
        (HEADS[:, :, :1], KEYS, KEYS, None, True, 0.1),  # split
        (WIDE, WIDE, WIDE, None, True, 0.1),
        (WIDE[:, :, :1], WIDE, WIDE, None, True, 0.1),
    ],
    "attention_bwd": [
        _backward(HEADS[:, :, :20], KEYS[:, :, :30], LSE, MASK, torch.randn(2)),
        _backward(WIDE[:, :, :9], WIDE, LSE[:, :1, :9]),
    ],
    "cross_entropy_fwd": [
        (LOGITS, TARGET, None, -100, 0.0, 0.0, reduction, torch.float32) for reduction in (0, 1)
    ],
    "cross_entropy_bwd": [
        (torch.ones(()), None, LOGITS, TARGET, None, torch.zeros(6).double(), -100, 0.0, 0.0, 1)
    ],
    "cross_entropy_bwd_": [
        (torch.ones(()), LOGITS.clone(), TARGET, None, torch.zeros(6).double(), -100, 0.0, 0.0, 1)
    ],
    "geglu": [(X, X, False)],
    "gelu": [(X, False)],
    "gelu_bwd": [(X, X, False)],
    "glu_bwd": [(X, X, X, 0)],
    "glu_bwd_fused": [(X[:, :20], X, 0)],
    "layer_norm_fwd": [(X,), (torch.randn(2, 8200),), (torch.randn(2, 8193),)],
    "layer_norm_bwd": [
        (torch.randn(2, n), torch.randn(2, n), None, None, None, 1e-5) for n in (40, 4100, 8192)
    ],
    "rms_norm_fwd": [(X, None, 1e-5)],
    "rms_norm_bwd": [(X, X, None, None, 1e-5)],
    "rope": [(HEADS, TABLE, TABLE)],
    "rope_qk": [(HEADS, HEADS, TABLE, TABLE)],
    "rope_qk_": [(HEADS.clone(), HEADS.clone(), TABLE, TABLE)],
    "softmax_fwd": [
        (torch.randn(2, n), 1.0, None, False, torch.float32) for n in (40, 3000, 16392)
    ],
    "softmax_bwd": [
        (torch.randn(2, n), torch.randn(2, n), 1.0, torch.float32) for n in (40, 16392)
    ],
    "swiglu": [(X, X)],
}
# More than one launch, or demand for shared memory, and how many.
REQUESTS = {
    "attention_fwd": [1, 2, 2, 2],
    "attention_bwd": [6, 5],
    "cross_entropy_fwd": [1, 2],
    "cross_entropy_bwd": [2],
    "cross_entropy_bwd_": [2],
    "layer_norm_bwd": [2, 2, 3],
    "rms_norm_bwd": [2],
}


REFUSED = (
    r"llmops\.\w+: the CUDA launch failed: too many resources requested for launch \(error 701\)"
)


def test_cuda_launch_of_every_operator() -> None:
    assert set(CALLS) == set(cuda._RAW.values())


@pytest.mark.parametrize("name", CALLS)
def test_cuda_launch_that_is_refused_raises(sim: Any, name: str) -> None:
    op = getattr(torch.ops.llmops_cuda_sim, name)
    for at, arguments in enumerate(CALLS[name]):
        requests = REQUESTS[name][at] if name in REQUESTS else 1
        for others in range(requests):
            sim.refuse(others)
            with pytest.raises(RuntimeError, match=REFUSED):
                op(*arguments)
            assert sim.refuse(-1), "what raised was something else"
            op(*arguments)
        sim.refuse(requests)
        op(*arguments)
        assert not sim.refuse(-1), f"{name} makes more than {requests} requests: test them all"
