"""embedding: tokens alone and with positions, narrow and wide tables."""

from __future__ import annotations

from typing import Any

import torch


def calls(make: Any, call: Any) -> None:
    for dim in (64, 4096, 1001):
        tokens, weight = make(8, 2048, dtype=torch.int64), make(50257, dim)
        y = call(f"d={dim}", "embedding", tokens, weight)
        call(f"d={dim}", "embedding_bwd", y, tokens, 50257, -1)
        given = make(8, 2048, dtype=torch.int32)
        table = make(2048, dim)
        call(f"d={dim} places", "embedding", tokens, weight, None, table)
        call(f"d={dim} positions", "embedding", tokens, weight, given, table)
        call(f"d={dim} positions", "embedding_bwd", y, given, 2048, -1)
