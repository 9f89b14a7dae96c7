"""rms_norm: rows in registers, odd ones; with a residual; mixed dtypes. Short and long rows are
layer_norm's to tell: the same kernels with more in them."""

from __future__ import annotations

from typing import Any

import torch


def calls(make: Any, call: Any) -> None:
    for rows, n in ((8192, 576), (8192, 4096)):
        x, weight = make(rows, n), make(n)
        # With a residual, of the same code and more; without, where there is most of it alive.
        if n == 576:
            call(f"n={n}", "add_rms_norm", x, x, weight, 1e-5)
            call(f"n={n} dh", "rms_norm_bwd", x, x, x, weight, 1e-5)
        else:
            call(f"n={n}", "rms_norm", x, weight, 1e-5)
            call(f"n={n}", "rms_norm_bwd", x, x, None, weight, 1e-5)
    x, wide = make(8192, 1000), make(8192, 1000, dtype=torch.float32)
    call("n=1000 fp32 h", "add_rms_norm", x, wide, None, 1e-5)
    call("n=1000 fp32 h", "rms_norm_bwd", x, wide, wide, None, 1e-5, 1, 0.0, True, True)
