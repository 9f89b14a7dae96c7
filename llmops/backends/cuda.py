"""The CUDA C++ kernels: raw operators of the compiled extension, where it was built with nvcc."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from llmops.backends import _extension, _measured, get

if TYPE_CHECKING:
    from llmops.dispatch import Call

DEVICE = "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# What there is of each public operator, for the support table.
PASSES: dict[str, str] = {
    "add_layer_norm": "forward, backward",
    "add_rms_norm": "forward, backward",
    "attention": "forward, backward",
    "cross_entropy": "forward, backward",
    "geglu": "forward, backward",
    "gelu": "forward, backward",
    "layer_norm": "forward, backward",
    "rms_norm": "forward, backward",
    "rope": "forward, backward",
    "rope_qk": "forward, backward",
    "rope_qk_": "in place",
    "softmax": "forward, backward",
    "swiglu": "forward, backward",
}
# The raw operator of each of ours, forward or backward.
_RAW = {
    "add_layer_norm": "add_layer_norm_fwd",
    "add_rms_norm": "add_rms_norm_fwd",
    "attention": "attention_fwd",
    "attention_bwd": "attention_bwd",
    "cross_entropy": "cross_entropy_fwd",
    "cross_entropy_bwd": "cross_entropy_bwd",
    "cross_entropy_bwd_": "cross_entropy_bwd_",
    "geglu": "geglu",
    "gelu": "gelu",
    "gelu_bwd": "gelu_bwd",
    "glu_bwd": "glu_bwd",
    "glu_bwd_fused": "glu_bwd_fused",
    "layer_norm": "layer_norm_fwd",
    "layer_norm_bwd": "layer_norm_bwd",
    "rms_norm": "rms_norm_fwd",
    "rms_norm_bwd": "rms_norm_bwd",
    "rope": "rope",
    "rope_qk": "rope_qk",
    "rope_qk_": "rope_qk_",
    "softmax": "softmax_fwd",
    "softmax_bwd": "softmax_bwd",
    "swiglu": "swiglu",
}
# What an op has no kernel for, as its front door names it in Call.features.
_MISSING: dict[str, tuple[str, ...]] = {
    "attention": ("head_dim above 256", "gradient of alibi_slopes"),
    "cross_entropy": ("probability targets",),
}

# What computes on the tensor cores, in fp32 sums: 16-bit inputs.
_SHORT = ("attention", "attention_bwd")

_raw: Any = torch.ops.llmops_cuda
# The kernels compiled for the simulator of tests/cuda_sim, which runs them on CPU tensors.
SIMULATED = False


def simulate() -> None:
    """For tests: from now on the operators of the simulator's library, loaded before, serve CPU
    tensors in place of the extension's, which serve CUDA tensors."""
    global DEVICE, SIMULATED, _raw
    DEVICE, SIMULATED, _raw = "cpu", True, torch.ops.llmops_cuda_sim
    for name in _RAW:
        globals().pop(name, None)


def available() -> str | None:
    """None when usable, else the reason."""
    if SIMULATED:
        return None
    if _extension.REASON is not None:
        return _extension.REASON
    if not hasattr(_raw, "softmax_fwd"):
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
    if call.device != DEVICE:
        kind = "CPU tensors, simulated" if SIMULATED else "CUDA tensors"
        return f"it serves {kind}, and these are on {call.device}"
    if call.dtype not in DTYPES:
        return f"it computes float32, bfloat16 and float16, and this is {call.dtype}"
    if call.op not in _RAW:
        return f"it has no {call.op} yet"
    if call.op in _SHORT and call.dtype == torch.float32:
        return f"its {call.op} computes bfloat16 and float16, and this is {call.dtype}"
    for feature in _MISSING.get(call.op, ()):
        if feature in call.features:
            return f"its {call.op} has no {feature}"
    return None


def yields(call: Call) -> str | None:
    """Under "auto" Triton's kernels serve where they can, but for what _measured.py says."""
    if _measured.SMALL in call.features:
        return None
    if not SIMULATED and get("triton").supports(call) is not None:
        return None  # it has no kernel for this
    return 'Triton was faster in most shapes on an H100; backend="cuda" asks for it'


def describe(call: Call) -> str:
    return f"CUDA C++ {call.op}" + (" (simulated)" if SIMULATED else "")


def __getattr__(name: str) -> Any:
    """The raw operator of one of ours, looked up on first use."""
    if name not in _RAW:
        raise AttributeError(f"llmops.backends.cuda has no {name!r}")
    found = globals()[name] = getattr(_raw, _RAW[name]).default
    return found
