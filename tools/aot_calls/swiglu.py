"""swiglu and geglu: two tensors and fused projections, an activation with each (where the operands
lie does not touch it; tanh's is told by gelu); rows of each length of the table."""

from __future__ import annotations

from typing import Any


def calls(make: Any, call: Any) -> None:
    n = 14336
    pair, fused, dy = (make(4096, n), make(4096, n)), make(4096, 2 * n), make(4096, n)
    call(f"n={n} pair silu", "swiglu", *pair)
    call(f"n={n} pair silu", "glu_bwd", dy, *pair, 0)
    call(f"n={n} fused erf", "geglu", fused, None, False)
    call(f"n={n} fused erf", "glu_bwd_fused", dy, fused, 1)
    for n in make.lengths(2048):
        fused, dy = make(4096, 2 * n), make(4096, n)
        call(f"n={n} fused silu", "swiglu", fused, None)
        call(f"n={n} fused silu", "glu_bwd_fused", dy, fused, 0)
