"""gelu: contiguous, and as rows of a wider buffer, of each length of the table."""

from __future__ import annotations

from typing import Any


def calls(make: Any, call: Any) -> None:
    sources = {"flat": make(8192, 4096), "rows of 33": make(8192, 64)[:, :33]}
    for label, x in sources.items():
        call(f"{label} tanh", "gelu", x, True)
        call(f"{label} tanh", "gelu_bwd", x, x, True)
    sources |= {f"rows of {n}": make(8192, 2 * n)[:, :n] for n in make.lengths(2048)}
    for label, x in sources.items():
        call(f"{label} erf", "gelu", x, False)
        call(f"{label} erf", "gelu_bwd", x, x, False)
