"""The CUDA C++ kernels: raw operators of the compiled extension, where it was built with nvcc."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from llmops.backends import _extension

if TYPE_CHECKING:
    from torch import Tensor

    from llmops.dispatch import Call

DEVICE = "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# What there is of each public operator, for the support table.
PASSES = {"softmax": "forward, plain"}
_BUILT = _extension.REASON is None and hasattr(torch.ops.llmops_cuda, "softmax_fwd")


def available() -> str | None:
    """None when usable, else the reason."""
    if _extension.REASON is not None:
        return _extension.REASON
    if not _BUILT:
        return (
            "the extension was built without CUDA; reinstall with nvcc on PATH and a CUDA build of "
            "torch, or with LLMOPS_CUDA=1"
        )
    if torch.version.cuda is None:
        return "this torch is a CPU build; install a CUDA build of torch"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device; check the driver with nvidia-smi"
    return None


def supports(call: Call) -> str | None:
    return available() or serves(call)


def serves(call: Call) -> str | None:
    """None where there is a kernel for such a call, usable here or not; else why not."""
    if call.device != "cuda":
        return f"it serves CUDA tensors, and these are on {call.device}"
    if call.dtype not in DTYPES:
        return f"it computes float32, bfloat16 and float16, and this is {call.dtype}"
    if call.op != "softmax":
        return f"it has no {call.op} yet"
    unsupported = [f for f in call.features if f != "forward only"]
    if unsupported or "forward only" not in call.features:
        return "its softmax is the plain forward: no mask, causal limit, dtype or gradient yet"
    return None


def yields(call: Call) -> str | None:
    """Under "auto" Triton's kernels serve until these have been measured faster on a GPU."""
    return 'not measured on a GPU yet; backend="cuda" asks for it'


def describe(call: Call) -> str:
    return f"CUDA C++ {call.op}"


def softmax(
    x: Tensor, scale: float, mask: Tensor | None, causal: bool, dtype: torch.dtype
) -> Tensor:
    if mask is not None or causal or dtype != x.dtype:
        raise NotImplementedError("llmops.softmax: the CUDA kernel has no mask, causal or dtype")
    return torch.ops.llmops_cuda.softmax_fwd.default(x, scale, dtype)
