"""gelu, exact and in its tanh form, at model shapes, decode included.

Bytes: x read, y written (forward); dy and x read, dx written (backward).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import llmops
from llmops.bench.harness import Case, passes_of, with_backward

SHAPES = (
    ("BERT, GPT-2", (512, 3072)),
    ("BERT, GPT-2", (128, 3072)),
    ("GPT-2 large", (2048, 5120)),
    ("GPT-2", (1, 3072)),
    ("GPT-3 6.7B", (1, 16384)),
)


def cases(quick: bool) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        for model, shape in SHAPES[:1] if quick else SHAPES:
            x = torch.randn(shape).to(dtype).requires_grad_()
            name = "x".join(map(str, shape))
            size = x.numel() * x.element_size()
            for form in ("none", "tanh"):

                def ours(t: Tensor, form: str = form) -> Tensor:
                    return llmops.gelu(t, approximate=form)

                def eager(t: Tensor, form: str = form) -> Tensor:
                    return F.gelu(t, approximate=form)

                for passes, factor in passes_of(shape[0], 2, 3):
                    yield Case(
                        "gelu",
                        passes,
                        dtype,
                        name if form == "none" else f"tanh {name}",
                        with_backward(passes, ours, (x,)),
                        with_backward(passes, eager, (x,)),
                        bytes=factor * size,
                        model=model,
                    )
