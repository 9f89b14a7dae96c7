"""swiglu and geglu: two tensors and fused projections, each with two of the activations, which do
not depend on where the operands lie; short rows, which are walked otherwise."""

from __future__ import annotations

from typing import Any


def calls(make: Any, call: Any) -> None:
    for n in (14336, 32):
        pair, fused, dy = (make(4096, n), make(4096, n)), make(4096, 2 * n), make(4096, n)
        call(f"n={n} pair silu", "swiglu", *pair)
        call(f"n={n} pair silu", "glu_bwd", dy, *pair, 0)
        call(f"n={n} fused silu", "swiglu", fused, None)
        call(f"n={n} fused silu", "glu_bwd_fused", dy, fused, 0)
        if n > 32:
            call(f"n={n} pair tanh", "geglu", *pair, True)
            call(f"n={n} pair tanh", "glu_bwd", dy, *pair, 2)
            call(f"n={n} fused erf", "geglu", fused, None, False)
            call(f"n={n} fused erf", "glu_bwd_fused", dy, fused, 1)
