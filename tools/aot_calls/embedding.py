"""embedding: tables of each width, an odd one; tokens alone and with positions."""

from __future__ import annotations

from typing import Any

import torch


def calls(make: Any, call: Any) -> None:
    tokens, given = make(8, 2048, dtype=torch.int64), make(8, 2048, dtype=torch.int32)
    for dim in (*make.lengths(2048), 1001):
        weight, table = make(50257, dim), make(2048, dim)
        y = call(f"d={dim} positions", "embedding", tokens, weight, given, table)
        call(f"d={dim}", "embedding_bwd", y, tokens, 50257, -1)
        if dim in (64, 1001, 4096):
            call(f"d={dim}", "embedding", tokens, weight)
            call(f"d={dim} places", "embedding", tokens, weight, None, table)
            call(f"d={dim} positions", "embedding_bwd", y, given, 2048, -1)
