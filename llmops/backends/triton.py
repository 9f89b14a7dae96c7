"""The Triton kernels, for GPUs of any vendor, and for CPU tensors under Triton's interpreter."""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import TYPE_CHECKING, Any

import torch

from llmops.backends import _linear_cross_entropy, _measured, get

if TYPE_CHECKING:
    from llmops.dispatch import Call

# With TRITON_INTERPRET=1 the kernels run on CPU tensors, slowly: for tests without a GPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# What there is of each public operator, for the support table.
PASSES: dict[str, str] = {
    "add_layer_norm": "forward, backward",
    "add_rms_norm": "forward, backward",
    "attention": "forward, backward",
    "attention_kvcache": "forward",
    "attention_varlen": "forward, backward",
    "cross_entropy": "forward, backward",
    "embedding": "forward, backward",
    "geglu": "forward, backward",
    "gelu": "forward, backward",
    "kv_cache_append_": "in place",
    "layer_norm": "forward, backward",
    "linear_cross_entropy": "forward, backward",
    "merge_attention": "forward, backward",
    "rms_norm": "forward, backward",
    "rope": "forward, backward",
    "rope_qk": "forward, backward",
    "rope_qk_": "in place",
    "sample": "forward (no gradient)",
    "scaled_dot_product_attention": "forward, backward",
    "softmax": "forward, backward",
    "swiglu": "forward, backward",
}
# The file of kernels/triton that has the launcher of an operator of ours, forward or backward.
_FILES = {
    "add_layer_norm": "layer_norm",
    "add_rms_norm": "rms_norm",
    "attention": "attention",
    "attention_bwd": "attention_bwd",
    "attention_kvcache": "attention_kvcache",
    "attention_varlen": "attention_varlen",
    "attention_varlen_bwd": "attention_varlen",
    "cross_entropy": "cross_entropy",
    "cross_entropy_bwd": "cross_entropy_bwd",
    "cross_entropy_bwd_": "cross_entropy_bwd",
    "embedding": "embedding",
    "embedding_bwd": "embedding",
    "geglu": "swiglu",
    "gelu": "gelu",
    "gelu_bwd": "gelu",
    "glu_bwd": "swiglu",
    "glu_bwd_fused": "swiglu",
    "kv_cache_append_": "kv_cache_append_",
    "layer_norm": "layer_norm",
    "layer_norm_bwd": "layer_norm",
    "merge_attention": "merge_attention",
    "merge_attention_bwd": "merge_attention",
    "rms_norm": "rms_norm",
    "rms_norm_bwd": "rms_norm",
    "rope": "rope",
    "rope_qk": "rope",
    "rope_qk_": "rope",
    "sample": "sample",
    "softmax": "softmax",
    "softmax_bwd": "softmax",
    "swiglu": "swiglu",
}
# What an op has no kernel for, as its front door names it in Call.features.
_MISSING: dict[str, tuple[str, ...]] = {
    "attention": ("gradient of alibi_slopes",),
    "attention_kvcache": ("gradient of alibi_slopes",),
    "attention_varlen": ("gradient of alibi_slopes",),
    "cross_entropy": ("probability targets",),
    "linear_cross_entropy": ("probability targets", "multi-dimensional linear_weight"),
}


def available() -> str | None:
    """None when usable, else the reason."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed; pip install llmops-kernels[triton]"
    if not INTERPRETED and not torch.cuda.is_available():
        return "torch finds no GPU; check the driver, or set TRITON_INTERPRET=1 to try it slowly"
    return None


def supports(call: Call) -> str | None:
    return available() or serves(call)


def serves(call: Call) -> str | None:
    """None where there is a kernel for such a call, usable here or not; else why not."""
    if call.device != DEVICE:
        kind = "CPU tensors under TRITON_INTERPRET=1" if INTERPRETED else "CUDA and ROCm tensors"
        return f"it serves {kind}, and these are on {call.device}"
    if call.dtype not in DTYPES:
        return f"it computes float32, bfloat16 and float16, and this is {call.dtype}"
    if call.op not in _FILES and call.op not in globals():
        return f"it has no {call.op} yet"
    for feature in _MISSING.get(call.op, ()):
        if feature in call.features:
            return f"its {call.op} has no {feature}"
    return None


def yields(call: Call) -> str | None:
    """Under "auto" small calls go to CUDA C++ where it was measured faster (_measured.py)."""
    if _measured.SMALL not in call.features or get("cuda").supports(call) is not None:
        return None
    return 'CUDA C++ was faster for tensors of this size on an H100; backend="triton" asks for it'


def describe(call: Call) -> str:
    return f"Triton {call.op}" + (" (interpreted)" if INTERPRETED else "")


def linear_cross_entropy(*args: Any) -> _linear_cross_entropy.Sums:
    loss, gradient = __getattr__("cross_entropy"), __getattr__("cross_entropy_bwd_")
    return _linear_cross_entropy.sums_of_all(loss, gradient, _linear_cross_entropy.Call(*args))


def __getattr__(name: str) -> Any:
    """The launcher of an operator, on its tensors' device; its file imported on first use."""
    if name not in _FILES:
        raise AttributeError(f"llmops.backends.triton has no {name!r}")
    from llmops.kernels.triton._launch import on_its_device

    module = importlib.import_module(f"llmops.kernels.triton.{_FILES[name]}")
    globals()[name] = launcher = on_its_device(getattr(module, name))
    return launcher
