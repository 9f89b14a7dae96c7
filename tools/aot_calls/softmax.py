"""softmax: rows of each length of the table, odd ones; attention scores, vocabularies."""

from __future__ import annotations

from typing import Any

import torch


def calls(make: Any, call: Any) -> None:
    for n in (*make.lengths(), 50257):
        x = make(4096, n)
        y = call(f"n={n}", "softmax", x)
        call(f"n={n}", "softmax_bwd", x, y, 1.0, x.dtype)
    for n in (2048, 32768):
        x = make(1, 8, 16, n) if n > 16384 else make(2, 16, n, n)
        keep, bias = make(x.shape[0], 1, 1, n, dtype=torch.bool), make(x.shape[1], 1, n)
        call(f"n={n} causal", "softmax", x, 0.125, None, True)
        call(f"n={n} mask", "softmax", x, 0.125, keep)
        call(f"n={n} causal bias", "softmax", x, 0.125, bias, True)
    for n in (3001, 8193):  # one mask for all rows, elements one by one
        call(f"n={n} mask", "softmax", make(4096, n), 1.0, make(n, dtype=torch.bool))
