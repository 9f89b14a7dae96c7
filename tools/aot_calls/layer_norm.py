"""layer_norm: rows of each length of the table, odd ones; with a residual; mixed dtypes."""

from __future__ import annotations

from typing import Any

import torch


def calls(make: Any, call: Any) -> None:
    for n in make.lengths():
        x, weight = make(4096, n), make(n)
        call(f"n={n}", "layer_norm", x, weight, weight, 1e-5)
        call(f"n={n}", "layer_norm_bwd", x, x, None, weight, weight, 1e-5)
    for n in (768, 32768):
        x, weight = make(4096, n), make(n)
        call(f"n={n} residual", "add_layer_norm", x, x, weight, weight, 1e-5)
        call(f"n={n} dh", "layer_norm_bwd", x, x, x, weight, weight, 1e-5)
    # Odd ones, which are looped over sooner.
    x, weight = make(4096, 8193), make(8193)
    call("n=8193", "layer_norm", x, weight, weight, 1e-5)
    x, wide = make(8192, 1000), make(8192, 1000, dtype=torch.float32)
    call("n=1000 fp32 h", "add_layer_norm", x, wide, None, None, 1e-5)
    call("n=1000 fp32 h", "layer_norm_bwd", x, wide, wide, None, None, 1e-5, 1, True, True)
