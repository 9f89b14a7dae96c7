"""layer_norm: short rows, rows in registers, odd and long ones; with a residual; mixed dtypes."""

from __future__ import annotations

from typing import Any

import torch


def calls(make: Any, call: Any) -> None:
    for rows, n in ((65536, 64), (8192, 768), (8192, 4096), (4096, 8192), (2048, 32768)):
        x, weight = make(rows, n), make(n)
        # With a residual, of the same code and more; without, where there is most of it alive.
        if n in (768, 32768):
            call(f"n={n}", "add_layer_norm", x, x, weight, weight, 1e-5)
            call(f"n={n} dh", "layer_norm_bwd", x, x, x, weight, weight, 1e-5)
        else:
            call(f"n={n}", "layer_norm", x, weight, weight, 1e-5)
            call(f"n={n}", "layer_norm_bwd", x, x, None, weight, weight, 1e-5)
    # Of the longest rows in registers; odd ones, which are looped over.
    for n in (12288, 8193):
        x, weight = make(4096, n), make(n)
        call(f"n={n}", "layer_norm", x, weight, weight, 1e-5)
    x, wide = make(8192, 1000), make(8192, 1000, dtype=torch.float32)
    call("n=1000 fp32 h", "add_layer_norm", x, wide, None, None, 1e-5)
    call("n=1000 fp32 h", "layer_norm_bwd", x, wide, wide, None, None, 1e-5, 1, True, True)
