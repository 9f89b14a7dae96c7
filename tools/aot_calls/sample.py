"""sample: rows of each length of the table and usual vocabularies, every filter; greedy."""

from __future__ import annotations

from typing import Any

import torch


def calls(make: Any, call: Any) -> None:
    for n in (*make.lengths(2048), 60, 50257, 128256):
        x, uniform = make(64, n), make(64, dtype=torch.float64)
        call(f"n={n} every", "sample", x, uniform, 0.8, 40, 0.9, 0.05)
        call(f"n={n} greedy", "sample", x, None, 0.0, 0, 1.0, 0.0)
    call(f"n={n} plain", "sample", x, uniform, 0.8, 0, 1.0, 0.0)
    call(f"n={n} top-k", "sample", x, uniform, 0.8, 40, 1.0, 0.0)
    call(f"n={n} top-p", "sample", x, uniform, 0.8, 0, 0.9, 0.05)
