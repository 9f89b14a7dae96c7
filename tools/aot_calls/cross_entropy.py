"""cross_entropy: few classes and vocabularies, dense and strided; every option, in place too.

Not each option at each size: those of a kernel do not depend on its blocks. 50257 has rows that are
not aligned, 128256 has."""

from __future__ import annotations

from typing import Any

import torch


def calls(make: Any, call: Any) -> None:
    fp64, fp32 = torch.float64, torch.float32
    plain = (-100, 0.0, 0.0)
    every = (-100, 0.1, 1e-4)
    for rows, n in ((65536, 21), (65536, 100), (4096, 50257), (4096, 128256)):
        x, ids, lse = make(rows, n), make(rows, dtype=torch.int64), make(rows, dtype=fp64)
        grad = make(rows, dtype=fp32)
        if n > 100:
            call(f"n={n}", "cross_entropy", x, ids, None, *plain, 1, x.dtype)
        if n == 128256:
            call(f"n={n}", "cross_entropy_bwd", make(), None, x, ids, None, lse, *plain, 1)
        if n != 50257:
            weight = make(n, dtype=fp32)
            how = (ids.int(), weight)
            call(f"n={n} every", "cross_entropy", x, *how, *every, 0, fp32)
            call(f"n={n} every", "cross_entropy_bwd", grad, lse, x, *how, lse, *every, 0)
        if n == 50257:  # linear_cross_entropy's
            call(f"n={n} in place", "cross_entropy_bwd_", grad, x, ids, None, lse, *plain, 0)
    x, ids = make(8, 21, 4096).transpose(1, 2), make(8, 4096, dtype=torch.int64)
    _, lse = call("n=21 apart", "cross_entropy", x, ids, None, *every, 1, x.dtype)
    call("n=21 apart", "cross_entropy_bwd", make(), None, x, ids, None, lse, *every, 1)
