"""attention_kvcache: decode steps and prompt chunks of usual models, contiguous and paged; heads of
each size, with the rows of each tile.

Each of batch size, paging, modifiers and dtype where it changes the code most, not all with all:
D = 128 in bf16 has both caches, other heads one, and fp32 the larger code, of pages."""

from __future__ import annotations

from typing import Any

import torch

# Query heads, key heads, head dimension: Llama-3-8B, SmolLM2-135M, Gemma-7B.
MODELS = ((32, 8, 128), (9, 3, 64), (16, 16, 256))
BATCH = 4

SPILLS = {
    "attention_kvcache_fwd bf16 d=512 rows=32 modifiers": "two words on sm_80 with Triton 3.6.0: "
    "of a thread's 255 registers its share of 32 rows of 512 sums takes 64, and with 16 keys at a "
    "time it spills as many",
}


def calls(make: Any, call: Any) -> None:
    def integers(*shape: int) -> Any:
        return make(*shape, dtype=torch.int32)

    lengths, table = integers(BATCH), integers(BATCH, 512)
    for heads, kv_heads, dim in MODELS:
        if (dim != 128 and make.dtype != torch.bfloat16) or make.dtype == torch.float16:
            continue
        for queries, kind in ((1, "decode"), (512, "chunk")):
            q = make(BATCH, heads, queries, dim)
            contiguous = [make(BATCH, kv_heads, 8192, dim) for _ in range(2)]
            pages = [make(BATCH * 512, kv_heads, 16, dim) for _ in range(2)]
            rest = (None, queries > 1, dim**-0.5)
            whole = dim == 128 and make.dtype == torch.bfloat16
            if whole or (queries == 1 and dim != 128):
                call(f"d={dim} {kind}", "attention_kvcache", q, *contiguous, lengths, None, *rest)
            if whole or queries > 1 or make.dtype == torch.float32:
                call(f"d={dim} {kind} paged", "attention_kvcache", q, *pages, lengths, table, *rest)
    if make.dtype == torch.bfloat16:  # as in attention.py
        q, k = make(BATCH, 8, 512, 33), make(BATCH, 8, 8192, 33)
        v = make(BATCH, 8, 8192, 20)
        call("d=33x20 chunk", "attention_kvcache", q, k, v, lengths, None, None, True, 0.2)
    heads, kv_heads, _ = MODELS[0]
    slopes, sinks = (make(heads, dtype=torch.float32) for _ in range(2))
    modifiers = 4095, 0, slopes, 50.0, sinks  # all at once, and left pads
    for dim in (16, 32, 64, 128, 256, 512):
        pages = [make(BATCH * 512, kv_heads, 16, dim) for _ in range(2)]
        given = *pages, lengths, table
        for rows in (16, 32, 64):
            if make.dtype != torch.float16 or (dim, rows) == (128, 64):
                label, q = f"d={dim} rows={rows}", make(BATCH, heads, rows // 4, dim)
                call(label, "attention_kvcache", q, *given, None, True, dim**-0.5)
                call(f"{label} modifiers", "attention_kvcache", q, *given, integers(BATCH), True,
                     dim**-0.5, *modifiers)  # fmt: skip
