"""attention_varlen: packed prompts of unequal lengths, beside torch on the padded batch.

Operations: 4 H Tq Tk D per sequence, halved since causal. torch's side is padded outside the
timing: what a user without a packed kernel runs; of its gradients the rows of real tokens are
compared, those of padding are zero. Backward: 2.5 times the operations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import llmops
from llmops.bench.harness import Case, with_backward

# model, lengths, Hq, Hkv, D
SHAPES = (
    ("SmolLM2", (512, 30, 200, 100), 9, 3, 64),
    ("GPT-2", (1024, 64, 64, 64, 300, 700), 12, 12, 64),
)


def _padded(x: Tensor, lengths: Sequence[int]) -> Tensor:
    """[total, H, D] as [B, H, longest, D], zeros behind each sequence."""
    return pad_sequence(list(x.split(list(lengths))), batch_first=True).transpose(1, 2)


def cases(quick: bool) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        for model, lengths, h, hkv, d in SHAPES[:1] if quick else SHAPES:
            total, longest = sum(lengths), max(lengths)
            bounds = torch.tensor([0, *lengths]).cumsum(0)
            q, k, v = (torch.randn(total, n, d).to(dtype).requires_grad_() for n in (h, hkv, hkv))
            padded = tuple(_padded(x.detach(), lengths).requires_grad_() for x in (q, k, v))
            real = torch.arange(longest) < torch.tensor(lengths)[:, None]

            def ours(
                q: Tensor, k: Tensor, v: Tensor, bounds: Tensor = bounds, longest: int = longest
            ) -> Tensor:
                out = llmops.attention_varlen(
                    q, k, v, bounds, bounds, longest, longest, causal=True
                )
                assert isinstance(out, Tensor)
                return out

            def theirs(q: Tensor, k: Tensor, v: Tensor, real: Tensor = real) -> Tensor:
                # Rows of padding see real keys only by accident of causality: nobody reads them.
                gqa = q.shape[1] != k.shape[1]
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
                return out.transpose(1, 2)[real]

            def packed(results: list[Tensor], real: Tensor = real) -> list[Tensor]:
                return [x.transpose(1, 2)[real] if x.dim() == 4 else x for x in results]

            cells = sum(t * t for t in lengths)
            for passes, factor in (("fwd", 2), ("bwd", 5)):
                yield Case(
                    "attention_varlen",
                    passes,
                    dtype,
                    f"causal {'+'.join(map(str, lengths))} x{h}/{hkv}x{d}",
                    with_backward(passes, ours, (q, k, v)),
                    with_backward(passes, theirs, padded),
                    flops=factor * h * cells * d,
                    evidence=packed,
                    model=model,
                )
