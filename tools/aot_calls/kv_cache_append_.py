"""kv_cache_append_: decode steps and prompt chunks of usual models, contiguous and paged;
heads of each size."""

from __future__ import annotations

from typing import Any

import torch


def calls(make: Any, call: Any) -> None:
    usual = (8, 128, 1, 1), (8, 128, 32, 1), (8, 128, 1, 512), (3, 64, 32, 1), (16, 256, 32, 1)
    for heads, dim, batch, tokens in (*usual, *((8, n, 32, 1) for n in make.lengths(512))):
        label = f"d={dim} batch={batch} tokens={tokens}"
        new = [make(batch, tokens, heads, dim).transpose(1, 2) for _ in range(2)]
        lengths = make(batch, dtype=torch.int32)
        caches = [make(batch, heads, 8192, dim) for _ in range(2)]
        call(label, "kv_cache_append_", *caches, *new, lengths)
        pages = [make(batch * 512, heads, 16, dim) for _ in range(2)]
        table = make(batch, 512, dtype=torch.int32)
        call(f"{label} paged", "kv_cache_append_", *pages, *new, lengths, table)
