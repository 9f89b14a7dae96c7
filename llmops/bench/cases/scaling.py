"""Row ops over the number of rows, 2048 wide: where the call overhead ends, where the caches end.

Bytes: x read, y written.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import llmops
from llmops.bench.harness import Case, with_backward

WIDTH = 2048
ROWS = (1, 4, 16, 64, 256, 1024, 4096)
MORE_ROWS = (16384, 65536)  # on a GPU, whose cache holds 4096 rows


def cases(quick: bool) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        gpu = torch.get_default_device().type == "cuda"
        for rows in ROWS[2:3] if quick else ROWS + MORE_ROWS * gpu:
            x, w = torch.randn(rows, WIDTH).to(dtype), torch.ones(WIDTH, dtype=dtype)
            yield _case("softmax", x, llmops.softmax, lambda t: torch.softmax(t, -1), (x,))
            yield _case(
                "rms_norm",
                x,
                lambda t, w: llmops.rms_norm(t, (WIDTH,), w, 1e-6),
                lambda t, w: F.rms_norm(t, (WIDTH,), w, 1e-6),
                (x, w),
            )


def _case(op: str, x: Tensor, ours: object, eager: object, inputs: tuple[Tensor, ...]) -> Case:
    assert callable(ours) and callable(eager)
    return Case(
        op,
        "fwd",
        x.dtype,
        f"rows {x.shape[0]}x{WIDTH}",
        with_backward("fwd", ours, inputs),
        with_backward("fwd", eager, inputs),
        bytes=2 * x.numel() * x.element_size(),
        curve=(f"{op} fwd over rows of {WIDTH}", x.shape[0]),
    )
