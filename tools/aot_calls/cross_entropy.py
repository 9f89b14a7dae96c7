"""cross_entropy: rows of each length of the table with every option, and without the forward;
vocabularies, strided ones; in place. 50257 has rows that are not aligned, 128256 has."""

from __future__ import annotations

from typing import Any

import torch


def calls(make: Any, call: Any) -> None:
    fp64, fp32 = torch.float64, torch.float32
    plain = (-100, 0.0, 0.0)
    every = (-100, 0.1, 1e-4)
    ids, lse, grad = make(4096, dtype=torch.int64), make(4096, dtype=fp64), make(4096, dtype=fp32)
    for n in (*make.lengths(4096), 21, 50257, 128256):
        x = make(4096, n)
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
