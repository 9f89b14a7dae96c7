"""attention in plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from llmops.reference._common import _wide
from llmops.reference.softmax import _softmax_or_zero


def dropout_seed(device: torch.device, generator: torch.Generator | None) -> Tensor:
    """The seed of one call's dropout, int64 [1]: all that the call draws from the generator."""
    if generator is None:  # naming None, torch.randint takes no symbolic size under compile
        return torch.randint(2**63 - 1, (1,), device=device)
    return torch.randint(2**63 - 1, (1,), generator=generator, device=device)


def dropout_weights(
    shape: Sequence[int], dropout_p: float, seed: Tensor, first_batch: int = 0
) -> Tensor:
    """fp64 [B, H, Tq, Tk]: 0 where a weight is dropped, 1 / (1 - p) where it is kept; of the batch
    items from first_batch on.

    Philox-4x32-10 with the seed as key and the counter (key // 4, query, batch * H + head, 0); its
    word key % 4 belongs to the key, which is dropped where the word is below p * 2^32. So the same
    weights are dropped on every backend, whatever order it computes in.
    """
    batch, heads, queries, keys = shape
    low32, device = 0xFFFFFFFF, seed.device
    count = lambda n: torch.arange(n, device=device)  # noqa: E731
    a = count((keys + 3) // 4)[None, None, :]
    b, c = count(queries)[None, :, None], count(batch * heads)[:, None, None] + first_batch * heads
    a, b, c = torch.broadcast_tensors(a, b, c)
    d = torch.zeros_like(a)
    key0, key1 = seed[0] & low32, (seed[0] >> 32) & low32
    for _ in range(10):
        # The products wrap around in int64, which changes none of their 64 bits.
        p, q = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (
            (q >> 32 & low32) ^ b ^ key0,
            q & low32,
            (p >> 32 & low32) ^ d ^ key1,
            p & low32,
        )
        key0, key1 = (key0 + 0x9E3779B9) & low32, (key1 + 0xBB67AE85) & low32
    words = torch.stack((a, b, c, d), -1).flatten(-2)[..., :keys]
    below = min(math.floor(dropout_p * 2**32 + 0.5), low32)
    kept = (words >= below).to(torch.float64) * (1 / (1 - dropout_p) if dropout_p < 1 else 0.0)
    return kept.unflatten(0, (batch, heads))


def _attention_scores(
    q: Tensor,
    k: Tensor,
    causal: bool,
    scale: float,
    mask: Tensor | None,
    window: tuple[int, int] | None,
    alibi_slopes: Tensor | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor | None]:
    """Scores [B, H, Tq, Tk] of equally many heads, modified; and the soft cap's derivative."""
    queries, keys = q.shape[2], k.shape[2]
    scores, slope = q @ k.transpose(-1, -2) * scale, None
    if softcap:
        capped = torch.tanh(scores / softcap)
        scores, slope = softcap * capped, 1 - capped * capped
    distance = (
        torch.arange(keys, device=q.device)[None, :]
        - torch.arange(queries, device=q.device)[:, None]
        - (keys - queries)
    )
    if alibi_slopes is not None:
        slopes = alibi_slopes if alibi_slopes.dim() == 2 else alibi_slopes[None]
        scores = scores - slopes[:, :, None, None].to(scores.dtype) * distance.abs()
    if mask is not None:
        boolean = mask.dtype == torch.bool
        scores = scores.masked_fill(~mask, -math.inf) if boolean else scores + _wide(mask)
    if causal:
        scores = scores.masked_fill(distance > 0, -math.inf)
    if window is not None:
        left, right = window
        if left >= 0:
            scores = scores.masked_fill(distance < -left, -math.inf)
        if right >= 0:
            scores = scores.masked_fill(distance > right, -math.inf)
    return scores, slope


def _of_query_heads(x: Tensor, heads: int) -> Tensor:
    """Keys or values [B, Hkv, Tk, D] with a head for each of the queries': of none, none."""
    group = heads // max(x.shape[1], 1)
    return x[:, :0] if group == 0 else x if group == 1 else x.repeat_interleave(group, 1)


def attention(
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
    seed: Tensor | None = None,
    first_batch: int = 0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Materializes the [B, H, Tq, Tk] scores, which is what a kernel must not do."""
    heads, keys = q.shape[1], k.shape[2]
    wq, wk, wv = _wide(q), *(_of_query_heads(_wide(x), heads) for x in (k, v))
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores, _ = _attention_scores(wq, wk, causal, scale, mask, window, alibi_slopes, softcap)
    if sinks is not None:
        column = sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], -1)
    weights = _softmax_or_zero(scores)[..., :keys]
    if dropout_p > 0 and seed is not None:
        keep = dropout_weights(weights.shape, dropout_p, seed, first_batch)
        weights = weights * keep.to(weights.dtype)
    # A masked key's value is out of range: even 0 * NaN must not reach the output.
    out = (weights @ wv).to(q.dtype)
    if not return_lse:
        return out
    if scores.shape[-1] == 0:
        return out, scores.new_full(scores.shape[:3], -math.inf)
    empty = (scores == -math.inf).all(-1)
    lse = torch.logsumexp(scores.masked_fill(empty[..., None], 0.0), -1)
    return out, lse.masked_fill(empty, -math.inf).to(
        torch.float64 if q.dtype == torch.float64 else torch.float32
    )


def attention_bwd(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    need_mask_grad: bool,
    window_left: int = -1,
    window_right: int = -1,
    alibi_slopes: Tensor | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    first_batch: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """dq, dk, dv and (fp32) dmask in the mask's shape and dsinks from the forward's results:
    P = exp(s - lse), dS = P * (dropped dout . v - dout . out + dlse)."""
    heads, kv_heads = q.shape[1], k.shape[1]
    wq, grad = _wide(q), _wide(grad_out)
    wk, wv = (_of_query_heads(_wide(x), heads) for x in (k, v))
    window = (window_left, window_right)
    scores, slope = _attention_scores(wq, wk, causal, scale, mask, window, alibi_slopes, softcap)
    empty = (lse == -math.inf)[..., None]
    finite_lse = lse[..., None].masked_fill(empty, 0.0)
    weights = torch.exp(scores - finite_lse).masked_fill(empty, 0.0)
    delta = (grad * _wide(out)).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse
    dweights, dropped = grad @ wv.transpose(-1, -2), weights
    if dropout_p > 0 and seed is not None:
        keep = dropout_weights(weights.shape, dropout_p, seed, first_batch).to(weights.dtype)
        dweights, dropped = dweights * keep, weights * keep
    dscores = weights * (dweights - delta[..., None])
    dmask = dsinks = None
    if need_mask_grad and mask is not None:
        dmask = dscores.sum_to_size(mask.shape)
    if sinks is not None:
        weight = torch.exp(sinks.to(lse.dtype)[:, None, None] - finite_lse).masked_fill(empty, 0.0)
        dsinks = -(weight.squeeze(-1) * delta).sum((0, 2))
    if slope is not None:
        dscores = dscores * slope
    dq = (dscores @ wk * scale).to(q.dtype)
    dk, dv = dscores.transpose(-1, -2) @ wq * scale, dropped.transpose(-1, -2) @ grad
    if heads != kv_heads:
        dk, dv = (t.unflatten(1, (kv_heads, heads // kv_heads)).sum(2) for t in (dk, dv))
    return dq, dk.to(k.dtype), dv.to(v.dtype), dmask, dsinks
