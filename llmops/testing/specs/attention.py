"""Samples of attention that reach every branch of its kernels."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import llmops
from llmops import reference
from llmops.testing._core import Make, OpSpec, Sample
from llmops.testing.specs import _attention_floors


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
    added = make(2, 1, 5, 23)
    other = Make(make.dtype, make.device, seed=1)
    yield Sample("modified-addmask-5x23", few, {
        "mask": added,
        "window": (15, 2),
        "alibi_slopes": _slopes(other, 4),
        "softcap": 2.0,
        "sinks": other(4),
        **lse,
    })  # fmt: skip
    yield Sample("boolmask-causal-5x23", few, {"mask": make.bools(4, 1, 23), **causal})
    yield Sample("addmask-5x23", few, {"mask": added, **lse})

    yield Sample("130x140-d64", _qkv(make, 1, (2, 1), (130, 140), 64), causal)
    yield Sample("70x100-d80x48", _qkv(make, 1, (1, 1), (70, 100), 80, 48), lse)
    yield Sample("odd-67x103-d33x65", _qkv(make, 1, (1, 1), (67, 103), 33, 65), {**causal, **lse})
    yield Sample("1x1-d1", _qkv(make, 1, (1, 1), (1, 1), 1))
    yield Sample("wide-9x40-d260x512", _qkv(make, 1, (1, 1), (9, 40), 260, 512))
    # One of D and Dv in chunks, the other whole; D = 192 beside Dv = 128 is a known model's.
    yield Sample("wide-9x40-d20x300", _qkv(make, 1, (2, 1), (9, 40), 20, 300), causal)
    yield Sample("wide-9x40-d300x20", _qkv(make, 1, (2, 1), (9, 40), 300, 20), causal)
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
    yield from _modified(other)


def _slopes(make: Make, *shape: int) -> Tensor:
    return make(*shape, scale=0.1, grad=False).abs()


def _modified(make: Make) -> Iterator[Sample]:
    """Each score modifier in the tiles, in packed rows, in decode and over split keys; pairs and
    more of them. Windows keep enough keys for a gradient that is no cancellation, see above."""
    causal, lse = {"causal": True}, {"return_lse": True}
    gqa = _qkv(make, 1, (4, 2), (70, 100), 16)
    packed = _qkv(make, 1, (6, 2), (24, 90), 20)
    wide = _qkv(make, 2, (2, 2), (70, 100), 32)
    single = _qkv(make, 2, (2, 1), (1, 90), 20)
    pair = _qkv(make, 1, (3, 1), (2, 1500), 16)
    split = _qkv(make, 1, (1, 1), (12, 1300), 8)
    # Many heads: dsinks is a sum over rows that cancels, and a yardstick of few such sums is luck.
    sink_gqa = _qkv(make, 1, (16, 8), (70, 100), 16)
    sink_packed = _qkv(make, 1, (18, 6), (24, 90), 20)
    sink_single = _qkv(make, 2, (16, 4), (1, 90), 20)
    sink_pair = _qkv(make, 1, (16, 4), (2, 1500), 16)
    sink_split = _qkv(make, 1, (16, 16), (12, 1300), 8)
    half = {"dropout_p": 0.5, "dropout_seed": 1}
    tenth = {"dropout_p": 0.1, "dropout_seed": 2}

    long = _qkv(make, 1, (2, 1), (130, 160), 16)
    yield Sample("window-130x160", long, {"window": (20, 0), **causal, **lse})
    yield Sample("window-both-70x100", gqa, {"window": (25, 12), **lse})
    yield Sample("window-left-24x90", packed, {"window": (30, -1), **lse})
    yield Sample("window-right-70x100", wide, {"window": (-1, 3)})
    # One key to a row, and rows before the first key: their gradients are pure cancellation.
    one = tuple(make(1, 2, t, 16, grad=False) for t in (90, 30, 30))
    yield Sample("window-one-key-90x30", one, {"window": (0, 0), **lse})
    yield Sample("window-rows-without-90x30", one, {"window": (3, -1), **causal, **lse})
    yield Sample("window-decode-1x90", single, {"window": (40, -1), **lse})
    yield Sample("window-decode-split-2x1500", pair, {"window": (1200, 0), **causal, **lse})
    yield Sample("window-split-12x1300", split, {"window": (1100, 5), **lse})

    yield Sample("alibi-70x100", gqa, {"alibi_slopes": _slopes(make, 4), **causal, **lse})
    yield Sample("alibi-batch-70x100", wide, {"alibi_slopes": _slopes(make, 2, 2)})
    yield Sample("alibi-24x90", packed, {"alibi_slopes": _slopes(make, 6)})
    yield Sample("alibi-decode-1x90", single, {"alibi_slopes": _slopes(make, 2, 2), **lse})

    yield Sample("softcap-70x100", gqa, {"softcap": 1.5, "scale": 0.6, **lse})
    yield Sample("softcap-negative-scale-24x90", packed, {"softcap": 3.0, "scale": -0.2, **causal})
    yield Sample("softcap-decode-1x90", single, {"softcap": 0.8, **lse})
    yield Sample("softcap-far-70x100", wide, {"softcap": 30.0, "mask": make(70, 100)})

    yield Sample("sinks-70x100", sink_gqa, {"sinks": make(16), **causal, **lse})
    yield Sample("sinks-24x90", sink_packed, {"sinks": make(18, shift=3.0)})
    yield Sample("sinks-decode-1x90", sink_single, {"sinks": make(16), **lse})
    yield Sample("sinks-decode-split-2x1500", sink_pair, {"sinks": make(16, shift=5.0), **lse})
    yield Sample("sinks-split-12x1300", sink_split, {"sinks": make(16, shift=5.0), **lse})
    some = make.bools(70, 100)
    some[5:9] = False  # rows that see the sink alone
    yield Sample("sinks-boolmask-70x100", sink_gqa, {"sinks": make(16), "mask": some, **lse})
    yield Sample("sinks-5x0", _qkv(make, 1, (2, 2), (5, 0), 8), {"sinks": make(2), **lse})

    yield Sample("dropout-70x100", gqa, {**half, **causal, **lse})
    yield Sample("dropout-24x90", packed, tenth)
    yield Sample("dropout-1x90", single, {**half, **lse})
    yield Sample("dropout-split-12x1300", split, {**tenth, **lse})
    yield Sample("dropout-all-24x90", packed, {"dropout_p": 1.0, "dropout_seed": 3, **lse})

    yield Sample("window-alibi-70x100", gqa, {
        "window": (30, 0), "alibi_slopes": _slopes(make, 4), **causal
    })  # fmt: skip
    yield Sample(
        "window-sinks-24x90", sink_packed, {"window": (50, 0), "sinks": make(18), **causal}
    )
    yield Sample("softcap-sinks-70x100", sink_gqa, {"softcap": 2.0, "sinks": make(16), **lse})
    yield Sample("softcap-addmask-70x100", gqa, {"softcap": 2.0, "mask": make(4, 1, 100)})
    yield Sample("alibi-boolmask-70x100", wide, {
        "alibi_slopes": _slopes(make, 2), "mask": make.bools(70, 100)
    })  # fmt: skip
    yield Sample("dropout-addmask-70x100", gqa, {"mask": make(70, 100), **half})
    yield Sample("dropout-window-softcap-70x100", wide, {"window": (40, 9), "softcap": 2.0, **half})
    everything = {"window": (40, 20), "softcap": 2.0, **lse}
    yield Sample("everything-70x100", gqa, {
        "alibi_slopes": _slopes(make, 4), "sinks": make(4), "mask": make(4, 70, 100),
        **everything, **tenth,
    })  # fmt: skip
    yield Sample("everything-causal-24x90", packed, {
        "alibi_slopes": _slopes(make, 6), "sinks": make(6), "mask": make.bools(24, 90),
        **everything, **half, **causal,
    })  # fmt: skip
    yield Sample("everything-decode-1x90", single, {
        "alibi_slopes": _slopes(make, 2), "sinks": make(2), "mask": make(1, 90), **everything,
    })  # fmt: skip
    yield Sample("everything-decode-split-2x1500", pair, {
        "alibi_slopes": _slopes(make, 3) * 0.01, "sinks": make(3), "mask": make.bools(1500),
        "window": (1200, 0), "softcap": 2.0, **lse,
    })  # fmt: skip


def _generator(dropout_seed: int | None, like: Tensor) -> torch.Generator | None:
    if dropout_seed is None:
        return None
    return torch.Generator(like.device if like.is_cuda else "cpu").manual_seed(dropout_seed)


def _attention(*args: Any, dropout_seed: int | None = None, **kwargs: Any) -> Any:
    return llmops.attention(*args, generator=_generator(dropout_seed, args[0]), **kwargs)


def _reference(*args: Any, dropout_seed: int | None = None, **kwargs: Any) -> Any:
    seed = None
    if dropout_seed is not None:
        seed = reference.dropout_seed(args[0].device, _generator(dropout_seed, args[0]))
    return reference.attention(*args, seed=seed, **kwargs)


def torch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    mask: Tensor | None = None,
    window: tuple[int, int] | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """torch's own scaled_dot_product_attention; what it lacks, by hand."""
    if not (window is None and alibi_slopes is None and softcap is None and sinks is None) or (
        dropout_p > 0
    ):
        return _eager_attention(
            q, k, v, causal, scale, mask, window, alibi_slopes, softcap, sinks,
            (dropout_p, dropout_seed), return_lse,
        )  # fmt: skip
    bias = mask
    if causal:
        keep = q.new_ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
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
        # On a GPU not by its fused kernels: masks that are constant along a row and head dimensions
        # such as 37 end in misaligned accesses there (torch 2.11 on an H100).
        with sdpa_kernel(SDPBackend.MATH) if q.is_cuda else contextlib.nullcontext():
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=bias, scale=scale, enable_gqa=gqa
            )
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


def _added(
    q: Tensor, k: Tensor, causal: bool, mask: Tensor | None, window: Any, slopes: Tensor | None
) -> Tensor:
    """Everything that is added to the scores, as one mask in q's dtype."""
    queries, keys = q.shape[2], k.shape[2]
    key, query = (torch.arange(n, device=q.device) for n in (keys, queries))
    distance = key - query[:, None] - (keys - queries)
    left, right = window if window is not None else (-1, -1)
    keep = torch.ones_like(distance, dtype=torch.bool)
    if causal:
        keep &= distance <= 0
    if left >= 0:
        keep &= distance >= -left
    if right >= 0:
        keep &= distance <= right
    added = torch.zeros(queries, keys, device=q.device).masked_fill(~keep, -math.inf)
    if slopes is not None:
        added = added - slopes[..., None, None].float() * distance.abs()
    if mask is not None and mask.dtype == torch.bool:
        added = added.masked_fill(~mask, -math.inf)
    added = added.to(q.dtype)
    return added + mask if mask is not None and mask.dtype != torch.bool else added


def _eager_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float | None,
    mask: Tensor | None,
    window: Any,
    slopes: Tensor | None,
    softcap: float | None,
    sinks: Tensor | None,
    dropout: tuple[float, int | None],
    return_lse: bool,
) -> Any:
    """As models write it: products in q's dtype, softmax in fp32; but by the log-sum-exp, whose
    rounding (eps |lse| relative, in every weight) no computation escapes that keeps lse alone."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.float() + _added(q, k, causal, mask, window, slopes)
    if sinks is not None:
        column = sinks[None, :, None, None].float().expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, column), -1)
    lse = torch.logsumexp(scores, -1)
    # A row that sees nothing: zeros, not NaN.
    weights = torch.exp(scores - lse[..., None]).masked_fill(scores == -math.inf, 0.0)
    weights = weights[..., : k.shape[2]].to(q.dtype)
    if dropout[0] > 0:
        seed = reference.dropout_seed(q.device, _generator(dropout[1], q))
        weights = weights * reference.dropout_weights(weights.shape, dropout[0], seed).to(q.dtype)
    out = weights @ v
    return (out, lse) if return_lse else out


def schemas(make: Make) -> dict[str, tuple[Any, ...]]:
    q, k, v = _qkv(make, 1, (4, 2), (6, 9), 8, 5)
    turned = make(1, 6, 4, 8).detach().transpose(1, 2).requires_grad_()
    mask = make(1, 1, 6, 9)
    sinks, seed = make(4, dtype=torch.float32), torch.tensor([5])
    modifiers = (3, -1, _slopes(make, 4).float(), 2.0, sinks, 0.2, seed)
    with torch.no_grad():
        results = reference.attention(
            q, k, v, mask=mask, causal=True, scale=0.3, window=(3, -1), alibi_slopes=modifiers[2],
            softcap=2.0, sinks=sinks, dropout_p=0.2, seed=seed, return_lse=True,
        )  # fmt: skip
    out, lse = (t.requires_grad_() for t in results)
    return {
        "attention": (turned, k, v, mask, True, 0.3, *modifiers, "cpu"),
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
            *modifiers,
            "cpu",
        ),
    }


SPEC = OpSpec(
    name="attention",
    fn=_attention,
    reference=_reference,
    torch_fn=torch_attention,
    samples=samples,
    schemas=schemas,
    rows=True,
    result_floor=_attention_floors.results(_reference),
    gradient_floor=_attention_floors.gradients(_reference),
)
