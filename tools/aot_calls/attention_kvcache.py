"""attention_kvcache: decode steps and prompt chunks of usual models, contiguous and paged."""

from __future__ import annotations

from typing import Any

import torch

# Query heads, key heads, head dimension: Llama-3-8B, SmolLM2-135M, Gemma-7B.
MODELS = ((32, 8, 128), (9, 3, 64), (16, 16, 256))


def calls(make: Any, call: Any) -> None:
    def integers(*shape: int) -> Any:
        return make(*shape, dtype=torch.int32)

    for heads, kv_heads, dim in MODELS:
        if (dim != 128 and make.dtype != torch.bfloat16) or make.dtype == torch.float16:
            continue
        label = f"d={dim}"
        # One row of heads or many, a split of the keys or none: all at D = 128 only.
        cases = ((1, 1), (32, 1), (1, 512)) if dim == 128 else ((32, 1), (1, 512))
        for batch, queries in cases:
            q = make(batch, heads, queries, dim)
            kind = f"chunk={queries}" if queries > 1 else f"batch={batch}"
            contiguous = [make(batch, kv_heads, 8192, dim) for _ in range(2)]
            pages = [make(batch * 512, kv_heads, 16, dim) for _ in range(2)]
            table = integers(batch, 512)
            rest = (integers(batch), None, None, queries > 1, dim**-0.5)
            if dim == 128 or queries == 1:
                call(f"{label} {kind}", "attention_kvcache", q, *contiguous, *rest)
            rest = (integers(batch), table, *rest[2:])
            if dim == 128 or queries > 1:
                call(f"{label} {kind} paged", "attention_kvcache", q, *pages, *rest)
    # Every modifier at once, and left pads.
    heads, kv_heads, dim = MODELS[0]
    for queries in (1, 512):
        q = make(4, heads, queries, dim)
        pages = [make(2048, kv_heads, 16, dim) for _ in range(2)]
        slopes, sinks = (make(heads, dtype=torch.float32) for _ in range(2))
        call(
            f"d={dim} modifiers queries={queries}", "attention_kvcache", q, *pages, integers(4),
            integers(4, 512), integers(4), True, dim**-0.5, 4095, 0, slopes, 50.0, sinks,
        )  # fmt: skip
