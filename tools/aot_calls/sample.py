"""sample: usual vocabularies, every filter; few tokens too. Greedy."""

from __future__ import annotations

from typing import Any

import torch


def calls(make: Any, call: Any) -> None:
    for rows, n in ((64, 128256), (1, 50257), (4096, 60)):
        x, uniform = make(rows, n), make(rows, dtype=torch.float64)
        if n == 128256:
            call(f"n={n} plain", "sample", x, uniform, 0.8, 0, 1.0, 0.0)
            call(f"n={n} top-k", "sample", x, uniform, 0.8, 40, 1.0, 0.0)
            call(f"n={n} top-p", "sample", x, uniform, 0.8, 0, 0.9, 0.05)
            call(f"n={n} greedy", "sample", x, None, 0.0, 0, 1.0, 0.0)
        call(f"n={n} every", "sample", x, uniform, 0.8, 40, 0.9, 0.05)
