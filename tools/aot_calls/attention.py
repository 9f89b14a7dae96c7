"""attention: heads of each size, causal, and with a mask and its gradient; each modifier once; both
directions, the backward in both forms, and the forward by tensor descriptors, which is another
kernel where TMA is. fp16 is told by one size: its kernels are bf16's."""

from __future__ import annotations

from typing import Any

import torch
from llmops.kernels.triton import _config

# On sm_90 alone: with the blocks that an H100 found fastest (kernels/triton/_attention_problem.py).
MEASURED = "measured 1.4 times as fast as what does not spill"
SPILLS = {f"attention_bwd_dkdv {dtype} d=128 causal": MEASURED for dtype in ("bf16", "fp16")}


def calls(make: Any, call: Any) -> None:
    def both(label: str, dim: int, mask: Any = None, causal: bool = True, **modifiers: Any) -> None:
        q, k = make(2, 32, 4096, dim), make(2, 8, 4096, dim)
        out, lse = call(label, "attention", q, k, k, mask, causal, 0.125, **modifiers)
        need = mask is not None and mask.dtype != torch.bool
        given = (out, None, q, k, k, mask, out, lse, causal, 0.125, need)
        call(label, "attention_bwd", *given, **modifiers)
        if label.endswith("causal") and dim in (64, 128) and make.dtype != torch.float16:
            # Tuning finds blocks for this form; the other's in 16 bits take registers it needs.
            held = {} if make.dtype == torch.float32 else {"BLOCK_M": 64}
            if held and dim > 64:
                held |= {"num_warps": 8, "num_stages": 1}
            with _config.override("attention_bwd", ONE_PASS=True, **held):
                call(f"{label} one pass", "attention_bwd", *given)

    def described(label: str, dim: int, dim_v: int, causal: bool) -> None:
        """Where there is no TMA both are the same kernel, and one entry."""
        q, k, v = make(2, 32, 4096, dim), make(2, 8, 4096, dim), make(2, 8, 4096, dim_v)
        call(label, "attention", q, k, v, None, causal, 0.125)
        with _config.override("attention", DESCRIPTORS=True):
            call(f"{label} descriptors", "attention", q, k, v, None, causal, 0.125)

    def fp32(*shape: int) -> Any:
        return make(*shape, dtype=torch.float32)

    window = {"window_left": 512, "window_right": 0, "softcap": 30.0, "sinks": fp32(32)}
    noise = {"alibi_slopes": fp32(32), "dropout_p": 0.1, "seed": make(1, dtype=torch.int64)}
    both("d=128 causal", 128)
    if make.dtype != torch.float16:
        described("d=64 causal", 64, 64, True)  # of fp32 the largest that is one chunk
        for dim in (16, 32, 64):
            both(f"d={dim} causal", dim)
            both(f"d={dim} mask", dim, make(2, 1, 4096, 4096), False)
    if make.dtype == torch.float32:
        both("d=128 all", 128, fp32(4096, 4096), **window, **noise)
    if make.dtype != torch.bfloat16:
        return
    described("d=128 causal", 128, 128, True)
    described("d=128", 128, 128, False)
    k = make(2, 8, 4096, 128)
    # One query a head: the kernels of a cache that is full.
    call("d=128 decode", "attention", make(2, 32, 1, 128), k, k, None, True, 0.125)
    both("d=256 causal", 256)
    for dim in (128, 256):
        both(f"d={dim} mask", dim, make(2, 1, 4096, 4096), False)
    # One that all heads share, of heads whose tiles half of the warps hold.
    q, k, lse = make(2, 32, 4096, 64), make(2, 8, 4096, 64), fp32(2, 32, 4096)
    call("d=64 shared mask", "attention_bwd", q, None, q, k, k, make(4096, 4096), q, lse, False,
         0.125, True)  # fmt: skip
    both("d=128 window", 128, **window)
    both("d=128 dropout", 128, **noise)
    # Values of another swizzle than the keys', which pointers do not copy asynchronously.
    described("d=40x24", 40, 24, False)
    # Narrower values than keys: of the latter there are two chunks.
    q, k, v = make(2, 32, 4096, 192), make(2, 8, 4096, 192), make(2, 8, 4096, 128)
    out, lse = call("d=192x128 causal", "attention", q, k, v, None, True, 0.125)
    call("d=192x128 causal", "attention_bwd", out, None, q, k, v, None, out, lse, True, 0.125,
         False)  # fmt: skip
