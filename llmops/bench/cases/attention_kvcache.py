"""attention_kvcache: a decode step of a batch of unequal sequences.

Bytes: the keys and values that are held, read once. torch's side has no lengths: it masks a
contiguous cache, and gathers a paged one first.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import llmops
from llmops.bench.harness import Case

# model, lengths, Hq, Hkv, D
DECODE = (
    ("SmolLM2", (512, 30, 200, 100), 9, 3, 64),
    ("Llama 3 8B", (4096, 1000, 300, 2500), 32, 8, 128),
)
# On a GPU: a server's batch.
BATCH = ("Llama 3 8B", (4096,) * 32, 32, 8, 128)
PAGE = 16


def cases(quick: bool) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        gpu = torch.get_default_device().type == "cuda"
        for model, lengths, h, hkv, d in DECODE[:1] if quick else DECODE + (BATCH,) * gpu:
            batch, longest = len(lengths), -(-max(lengths) // PAGE) * PAGE
            ends, width = torch.tensor(lengths), longest // PAGE
            q = torch.randn(batch, h, 1, d).to(dtype)
            k, v = (torch.randn(batch, hkv, longest, d).to(dtype) for _ in range(2))
            table = torch.randperm(batch * width).view(batch, width)
            pages = [torch.empty(batch * width, hkv, PAGE, d, dtype=dtype) for _ in range(2)]
            for cache, paged in zip((k, v), pages, strict=True):
                blocks = cache.view(batch, hkv, width, PAGE, d).transpose(1, 2).flatten(0, 1)
                paged[table.flatten()] = blocks
            keep = (torch.arange(longest) < ends[:, None])[:, None, None]

            def masked(q: Tensor = q, k: Tensor = k, v: Tensor = v, keep: Tensor = keep) -> Tensor:
                gqa = q.shape[1] != k.shape[1]
                return F.scaled_dot_product_attention(q, k, v, attn_mask=keep, enable_gqa=gqa)

            def gathered(
                q: Tensor = q,
                pages: list[Tensor] = pages,
                table: Tensor = table,
                keep: Tensor = keep,
            ) -> Tensor:
                k, v = (p[table].transpose(1, 2).flatten(2, 3) for p in pages)
                gqa = q.shape[1] != k.shape[1]
                return F.scaled_dot_product_attention(q, k, v, attn_mask=keep, enable_gqa=gqa)

            def contiguous(q: Tensor = q, k: Tensor = k, v: Tensor = v, ends: Tensor = ends) -> Any:
                return llmops.attention_kvcache(q, k, v, ends)

            def paged_ours(
                q: Tensor = q,
                pages: list[Tensor] = pages,
                ends: Tensor = ends,
                table: Tensor = table,
            ) -> Any:
                return llmops.attention_kvcache(q, pages[0], pages[1], ends, block_table=table)

            each = f"{batch}*{longest}" if len(set(lengths)) == 1 else "+".join(map(str, lengths))
            shape = f"decode {each} x{h}/{hkv}x{d}"
            moved = 2 * sum(lengths) * hkv * d * q.element_size()
            for name, ours, theirs in (
                (shape, contiguous, masked),
                (f"{shape} page {PAGE}", paged_ours, gathered),
            ):
                yield Case(
                    "attention_kvcache", "fwd", dtype, name, ours, theirs, bytes=moved, model=model
                )
