"""attention_varlen: packed causal sequences; the kernels are those of attention."""

from __future__ import annotations

from typing import Any

import torch
from llmops.kernels.triton import _config

SPILLS = {"attention_bwd_dkdv bf16 d=128 packed": "as in attention.py"}


def calls(make: Any, call: Any) -> None:
    if make.dtype != torch.bfloat16:
        return
    q, k = make(8192, 32, 128), make(8192, 8, 128)
    cu = make(9, dtype=torch.int32)
    lengths = cu, cu, 2048, 2048, True, 0.125
    none = -1, -1, None, 0.0, None, 0.0, None
    out, lse = call("d=128 packed", "attention_varlen", q, k, k, *lengths, *none)
    with _config.override("attention", DESCRIPTORS=True):
        call("d=128 packed descriptors", "attention_varlen", q, k, k, *lengths, *none)
    call("d=128 packed", "attention_varlen_bwd", out, None, q, k, k, out, lse, *lengths,
         *none)  # fmt: skip
