"""rms_norm: rows of each length of the table, odd ones; with a residual; mixed dtypes."""

from __future__ import annotations

from typing import Any

import torch


def calls(make: Any, call: Any) -> None:
    for n in make.lengths():
        x, weight = make(4096, n), make(n)
        call(f"n={n}", "rms_norm", x, weight, 1e-5)
        call(f"n={n}", "rms_norm_bwd", x, x, None, weight, 1e-5)
    x, weight = make(8192, 576), make(576)
    call("n=576 residual", "add_rms_norm", x, x, weight, 1e-5)
    call("n=576 dh", "rms_norm_bwd", x, x, x, weight, 1e-5)
    x, wide = make(8192, 1000), make(8192, 1000, dtype=torch.float32)
    call("n=1000 fp32 h", "add_rms_norm", x, wide, None, 1e-5)
    call("n=1000 fp32 h", "rms_norm_bwd", x, wide, wide, None, 1e-5, 1, 0.0, True, True)
