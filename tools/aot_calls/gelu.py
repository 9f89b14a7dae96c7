"""gelu: contiguous and as rows of a wider buffer, short rows too."""

from __future__ import annotations

from typing import Any


def calls(make: Any, call: Any) -> None:
    sources = {"flat": make(8192, 4096), "rows": make(8192, 4096)[:, :2560]}
    sources["short rows"] = make(65536, 64)[:, :33]
    for label, x in sources.items():
        for form, tanh in (("erf", False), ("tanh", True)):
            call(f"{label} {form}", "gelu", x, tanh)
            call(f"{label} {form}", "gelu_bwd", x, x, tanh)
