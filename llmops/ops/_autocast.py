"""Autocast: each op does what torch does to the op it replaces (ATen/autocast_mode.h).

Attention and linear products run in autocast's dtype on every device. Norms and softmax run, and
give their result, in fp32 on GPUs; on a CPU torch leaves them in the dtype of their input, and so
do we: the kernels compute in fp32 anyhow. Losses are fp32. fp64 is left alone, as torch leaves it.

The front doors ask `enabled` after their short way, which autocast closes: outside of autocast that
is one flag read, and for a call that takes the short way nothing at all. A compiler traces both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_is_enabled = torch.is_autocast_enabled
_HALVES = (torch.bfloat16, torch.float16)
# What autocast has on GPUs with the torch at hand: 2.11 leaves rms_norm out.
_has = torch._C._dispatch_has_kernel_for_dispatch_key
RMS_NORM_IN_FP32 = bool(_has("aten::rms_norm", "AutocastCUDA"))


def enabled(x: Any) -> bool:
    """Whether autocast is on where x is; False for what is no tensor, which a check refuses."""
    return isinstance(x, Tensor) and not x.is_meta and _is_enabled(x.device.type)


def lowered(x: Tensor, *others: Any) -> tuple[Any, ...]:
    """x and the others, floating-point tensors less fp64 in autocast's dtype."""
    dtype = torch.get_autocast_dtype(x.device.type)

    def cast(t: Any) -> Any:
        if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64:
            return t.to(dtype)
        return t

    return tuple(cast(t) for t in (x, *others))


def wants_fp32(x: Any) -> bool:
    """Whether a norm or softmax of x is to give fp32: 16-bit x under autocast on a GPU."""
    return isinstance(x, Tensor) and not x.is_cpu and x.dtype in _HALVES and enabled(x)
