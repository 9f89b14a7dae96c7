"""rope: q and k of usual models, every variant; heads of each size, few and many, and tokens."""

from __future__ import annotations

from typing import Any

import torch


def calls(make: Any, call: Any) -> None:
    def tables(*shape: int) -> tuple[Any, Any]:
        return make(*shape, dtype=torch.float32), make(*shape, dtype=torch.float32)

    q, k = make(4, 32, 4096, 128), make(4, 8, 4096, 128)
    cos, sin = tables(8192, 64)
    ids = make(4, 4096, dtype=torch.int64)
    call("d=128", "rope_qk", q, k, cos, sin)
    call("d=128 pairs ids inverse", "rope_qk", q, k, cos, sin, ids, True, True)
    call("d=128 in place", "rope_qk_", q, k, cos, sin, ids)
    call("d=128 gathered", "rope_qk", q, k, *tables(4, 4096, 64))
    token_major = [make(4, 4096, h, 128).transpose(1, 2) for h in (32, 8)]
    call("d=128 token-major", "rope_qk", *token_major, cos, sin, None, False, False, True)
    step = make(64, 32, 1, 128), make(64, 8, 1, 128)
    call("d=128 decode in place", "rope_qk_", *step, cos, sin, make(64, 1, dtype=torch.int64))
    call("d=80 of 32", "rope", make(2, 32, 2048, 80), *tables(2048, 16))
    for half in make.lengths(1024):
        for heads in (1, 2, 4, 8):
            for n in (1, 2048):
                label, x = f"d={2 * half} heads={heads} tokens={n}", make(2, heads, n, 2 * half)
                call(label, "rope", x, *tables(2048, half), ids[:2, :n])
        call(f"{label} pairs", "rope", x, *tables(2048, half), None, True)
