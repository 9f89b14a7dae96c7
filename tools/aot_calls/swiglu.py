"""swiglu and geglu: two tensors and fused projections, every activation, short rows too."""

from __future__ import annotations

from typing import Any


def calls(make: Any, call: Any) -> None:
    for n in (14336, 32):
        pair, fused, dy = (make(4096, n), make(4096, n)), make(4096, 2 * n), make(4096, n)
        for label, (gate, up) in {"pair": pair, "fused": (fused, None)}.items():
            call(f"n={n} {label} silu", "swiglu", gate, up)
            call(f"n={n} {label} erf", "geglu", gate, up, False)
            call(f"n={n} {label} tanh", "geglu", gate, up, True)
        for code, kind in enumerate(("silu", "erf", "tanh")):
            call(f"n={n} pair {kind}", "glu_bwd", dy, *pair, code)
            call(f"n={n} fused {kind}", "glu_bwd_fused", dy, fused, code)
