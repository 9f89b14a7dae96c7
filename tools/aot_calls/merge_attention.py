"""merge_attention: partial results of decode steps and prompts, heads of each size."""

from __future__ import annotations

from typing import Any

import torch


def calls(make: Any, call: Any) -> None:
    for dim in (*make.lengths(512), 80):
        shape = (4, 32, 2048)
        out_a, out_b = make(*shape, dim), make(*shape, dim)
        lse_a, lse_b = (make(*shape, dtype=torch.float32) for _ in range(2))
        out, lse = call(f"d={dim}", "merge_attention", out_a, lse_a, out_b, lse_b)
        call(f"d={dim}", "merge_attention_bwd", out, lse, out_a, lse_a, out_b, lse_b)
    shape = (32, 32, 1)
    outs = [make(32, 1, 32, 128).transpose(1, 2) for _ in range(2)]
    lses = [make(*shape, dtype=torch.float32) for _ in range(2)]
    call("d=128 decode", "merge_attention", outs[0], lses[0], outs[1], lses[1])
