"""Samples of attention that reach every branch of its kernels."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import llmops
from llmops import reference
from llmops.testing._core import Make, OpSpec, Sample


def _qkv(
    make: Make, batch: int, heads: tuple[int, int], tokens: tuple[int, int], *dims: int
) -> Any:
    """q, k, v for (Hq, Hkv), (Tq, Tk), D and Dv (D when left out)."""
    dim, dim_v = dims[0], dims[-1]
    return (
        make(batch, heads[0], tokens[0], dim),
        make(batch, heads[1], tokens[1], dim),
        make(batch, heads[1], tokens[1], dim_v),
    )


def samples(make: Make) -> Iterator[Sample]:
    causal, lse = {"causal": True}, {"return_lse": True}
    # The first ones also go through compile, func.grad and double backward. Enough keys that a
    # gradient is not the cancellation of two roundings, as it is in a row that sees one or two.
    few = _qkv(make, 2, (4, 2), (5, 23), 8, 6)
    yield Sample("gqa-causal-lse-5x23", few, {**causal, **lse})
    yield Sample("addmask-5x23", few, {"mask": make(2, 1, 5, 23), **lse})
    yield Sample("boolmask-causal-5x23", few, {"mask": make.bools(4, 1, 23), **causal})

    yield Sample("130x140-d64", _qkv(make, 1, (2, 1), (130, 140), 64), causal)
    yield Sample("70x100-d80x48", _qkv(make, 1, (1, 1), (70, 100), 80, 48), lse)
    yield Sample("odd-67x103-d33x65", _qkv(make, 1, (1, 1), (67, 103), 33, 65), {**causal, **lse})
    yield Sample("1x1-d1", _qkv(make, 1, (1, 1), (1, 1), 1))
    yield Sample("wide-9x40-d260x512", _qkv(make, 1, (1, 1), (9, 40), 260, 512))
    # Short queries: packed across the heads of a group; few of them: decode; long: split keys.
    yield Sample("packed-24x90", _qkv(make, 1, (6, 2), (24, 90), 20), causal)
    yield Sample("decode-1x90", _qkv(make, 2, (2, 2), (1, 90), 80), lse)
    yield Sample("decode-gqa-2x1100", _qkv(make, 1, (3, 1), (2, 1100), 16), {**causal, **lse})
    yield Sample("decode-gqa-odd-1x77", _qkv(make, 1, (8, 2), (1, 77), 37, 19), lse)
    yield Sample("decode-mask-1x1050", _qkv(make, 1, (2, 1), (1, 1050), 20), {
        "mask": make.bools(1, 1, 1, 1050, keep=0.5),
        **lse,
    })  # fmt: skip
    yield Sample("decode-addmask-2x70", _qkv(make, 1, (2, 1), (2, 70), 20), {
        "mask": make(2, 2, 70),
        **lse,
    })  # fmt: skip
    yield Sample("split-12x1100", _qkv(make, 1, (1, 1), (12, 1100), 8), {**causal, **lse})
    # Tq > Tk: the first rows see nothing; a mask that leaves rows without a key.
    yield Sample("causal-90x30", _qkv(make, 1, (2, 2), (90, 30), 8), {**causal, **lse})
    yield Sample("boolmask-20x70", _qkv(make, 1, (2, 2), (20, 70), 16), {
        "mask": make.bools(20, 70, keep=0.03),
        **lse,
    })  # fmt: skip
    yield Sample("boolmask-full-2x70x90", _qkv(make, 2, (2, 1), (70, 90), 16), {
        "mask": make.bools(2, 2, 70, 90)
    })  # fmt: skip
    # Additive masks by how they broadcast: over batch and heads, queries, keys; -inf; lowest.
    small = _qkv(make, 2, (2, 2), (70, 100), 8)
    yield Sample("addmask-planes-70x100", small, {"mask": make(70, 100), **causal})
    wide = _qkv(make, 2, (2, 2), (70, 100), 32)
    yield Sample("addmask-heads-70x100", wide, {"mask": make(2, 1, 100)})
    # Constant along a row, it changes out nowhere: its gradient would be pure cancellation.
    yield Sample("addmask-column-70x100", small, {"mask": make(1, 2, 70, 1, grad=False)})
    infinite = make(1, 1, 70, 100, grad=False).masked_fill(make.bools(70, 100), -math.inf)
    yield Sample("addmask-inf-70x100", small, {"mask": infinite, **lse})
    lowest = make(1, 1, 70, 100, grad=False) * 0
    lowest = lowest.masked_fill(make.bools(70, 100), torch.finfo(make.dtype).min)
    lowest[..., 3, :] = torch.finfo(make.dtype).min  # every key dropped this way: a plain mean
    yield Sample("addmask-lowest-70x100", small, {"mask": lowest})
    yield Sample("negative-scale-9x20", _qkv(make, 1, (1, 1), (9, 20), 24), {"scale": -0.3})
    yield Sample("zero-scale-9x20", _qkv(make, 1, (1, 1), (9, 20), 24), {"scale": 0.0})
    yield Sample("large-scale-9x20", _qkv(make, 1, (1, 1), (9, 20), 24), {"scale": 1.5, **lse})
    yield Sample("empty-0x5", _qkv(make, 1, (1, 1), (0, 5), 8), lse)
    yield Sample("empty-5x0", _qkv(make, 1, (2, 2), (5, 0), 8), lse)
    yield Sample("empty-batch", _qkv(make, 0, (2, 2), (5, 4), 8), {**causal, **lse})
    yield Sample("empty-heads", _qkv(make, 2, (0, 0), (5, 4), 8))


def torch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    mask: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """torch's own scaled_dot_product_attention; the log-sum-exp, which it lacks, by hand."""
    bias = mask
    if causal:
        keep = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
        if mask is None:
            bias = keep
        elif mask.dtype == torch.bool:
            bias = mask & keep
        else:
            bias = mask.masked_fill(~keep, -math.inf)
    gqa = q.shape[1] != k.shape[1]
    if q.shape[1] == 0:  # torch 2.11 divides by the number of heads, which ends the process
        out = q @ k.transpose(-1, -2) @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale, enable_gqa=gqa)
    if k.shape[2] == 0:
        out = q.sum(-1, keepdim=True) * 0 + v.sum(2, keepdim=True) * 0
    if not return_lse:
        return out
    if gqa:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    scores = (q @ k.transpose(-1, -2) * factor).float()
    if bias is not None:
        boolean = bias.dtype == torch.bool
        scores = scores.masked_fill(~bias, -math.inf) if boolean else scores + bias
    if k.shape[2] == 0:
        return out, scores.new_full(scores.shape[:3], -math.inf)
    return out, torch.logsumexp(scores, -1)


def schemas(make: Make) -> dict[str, tuple[Any, ...]]:
    q, k, v = _qkv(make, 1, (4, 2), (6, 9), 8, 5)
    turned = make(1, 6, 4, 8).detach().transpose(1, 2).requires_grad_()
    mask = make(1, 1, 6, 9)
    with torch.no_grad():
        results = reference.attention(q, k, v, mask=mask, causal=True, scale=0.3, return_lse=True)
    out, lse = (t.requires_grad_() for t in results)
    return {
        "attention": (turned, k, v, mask, True, 0.3, "cpu"),
        "attention_bwd": (
            make(1, 4, 6, 5),
            make(1, 4, 6),
            q,
            k,
            v,
            mask,
            out,
            lse,
            True,
            0.3,
            True,
            "cpu",
        ),
    }


SPEC = OpSpec(
    name="attention",
    fn=llmops.attention,
    reference=reference.attention,
    torch_fn=torch_attention,
    samples=samples,
    schemas=schemas,
    rows=True,
)
