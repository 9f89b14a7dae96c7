"""The C++ kernels for CPU tensors: raw operators of the compiled extension."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from llmops.backends import _extension

if TYPE_CHECKING:
    from llmops.dispatch import Call

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# What there is of each public operator, for the support table.
PASSES = {
    "softmax": "forward, backward",
}


def available() -> str | None:
    """None when usable, else the reason."""
    return _extension.REASON


def isa() -> str:
    """The instruction set the kernels run on: scalar, avx2, avx512 or avx512_bf16."""
    return str(torch.ops.llmops_cpu.isa_active())


def supports(call: Call) -> str | None:
    if _extension.REASON is not None:
        return _extension.REASON
    if call.device != "cpu":
        return f"it serves CPU tensors, and these are on {call.device}"
    if call.dtype not in DTYPES:
        return f"it computes float32, bfloat16 and float16, and this is {call.dtype}"
    if call.op not in globals():
        return f"it has no {call.op}"
    return None


def describe(call: Call) -> str:
    return f"C++ {call.op} [{isa()}]"


if _extension.REASON is None:
    _raw = torch.ops.llmops_cpu
    softmax = _raw.softmax_fwd.default
    softmax_bwd = _raw.softmax_bwd.default
    rope = _raw.rope.default
    rope_qk = _raw.rope_qk.default
    rope_qk_ = _raw.rope_qk_.default
    gelu = _raw.gelu.default
    gelu_bwd = _raw.gelu_bwd.default
    swiglu = _raw.swiglu.default
    geglu = _raw.geglu.default
    glu_bwd = _raw.glu_bwd.default
    glu_bwd_fused = _raw.glu_bwd_fused.default
    embedding = _raw.embedding.default
    embedding_bwd = _raw.embedding_bwd.default
    sample = _raw.sample.default
