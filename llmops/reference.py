"""Every operator in plain PyTorch: the specification the kernels are held to.

Nothing here is fast and nothing is clever. 16-bit inputs are computed in fp32 and rounded once at
the end; fp64 inputs are computed in fp64. All of it is differentiable by torch's own autograd, as
often as one likes; double backward of the kernels goes through here.

Signatures are those of the public functions, less `backend`; docstrings there have the formulas.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _causal_keep(queries: int, keys: int, device: torch.device) -> Tensor:
    """[Tq, Tk] bool, True keeps; bottom-right aligned: the last query sees every key."""
    rows = torch.arange(queries, device=device)[:, None] + (keys - queries)
    return torch.arange(keys, device=device)[None, :] <= rows


def _softmax_or_zero(logits: Tensor) -> Tensor:
    """Softmax over the last dim; a row of -inf only gives zeros, and zero gradients."""
    empty = (logits == -math.inf).all(-1, keepdim=True)
    return torch.softmax(logits.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)


def softmax(
    x: Tensor,
    dim: int = -1,
    *,
    scale: float = 1.0,
    mask: Tensor | None = None,
    causal: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    out_dtype = dtype or x.dtype
    logits = _wide(x) * scale
    if out_dtype == torch.float64:
        logits = logits.double()
    if mask is not None:
        boolean = mask.dtype == torch.bool
        logits = logits.masked_fill(~mask, -math.inf) if boolean else logits + mask.to(logits.dtype)
    if causal:
        keep = _causal_keep(x.shape[-2], x.shape[-1], x.device)
        logits = logits.masked_fill(~keep, -math.inf)
    zero_rows = mask is not None or causal
    if zero_rows and dim % x.dim() == x.dim() - 1:
        return _softmax_or_zero(logits).to(out_dtype)
    if zero_rows:
        return _softmax_or_zero(logits.transpose(dim, -1)).transpose(dim, -1).to(out_dtype)
    return torch.softmax(logits, dim).to(out_dtype)


def softmax_bwd(grad: Tensor, y: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """dx over the last dim from the forward's result: scale * y * (grad - sum(grad * y))."""
    g, p = _wide(grad), _wide(y)
    return (scale * p * (g - (g * p).sum(-1, keepdim=True))).to(dtype)


# ---- attention -----------------------------------------------------------------------------------


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
    group, keys = q.shape[1] // max(k.shape[1], 1), k.shape[2]
    wq, wk, wv = _wide(q), _wide(k), _wide(v)
    if group > 1:
        wk, wv = wk.repeat_interleave(group, 1), wv.repeat_interleave(group, 1)
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
    group = q.shape[1] // max(k.shape[1], 1)
    wq, wk, wv, grad = _wide(q), _wide(k), _wide(v), _wide(grad_out)
    if group > 1:
        wk, wv = wk.repeat_interleave(group, 1), wv.repeat_interleave(group, 1)
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
    if group > 1:
        dk, dv = (t.unflatten(1, (k.shape[1], group)).sum(2) for t in (dk, dv))
    return dq, dk.to(k.dtype), dv.to(v.dtype), dmask, dsinks


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    return_lse: bool = False,
    alibi_slopes: Tensor | None = None,
    **modifiers: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` of one sequence after the other."""
    # An empty piece of each input: it gives the result its type where there is no sequence at all.
    outs = [q[:0, :, :1] * v[:0].sum() + q.new_zeros(0, q.shape[1], v.shape[2])]
    lses = [_wide(q[:0].sum(-1)).t()]
    q_at, k_at = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for b in range(len(q_at) - 1):
        each = slice(q_at[b], q_at[b + 1]), slice(k_at[b], k_at[b + 1]), slice(k_at[b], k_at[b + 1])
        heads_first = (x[s].transpose(0, 1)[None] for x, s in zip((q, k, v), each, strict=True))
        per_batch = alibi_slopes is not None and alibi_slopes.dim() == 2
        slopes = alibi_slopes[b : b + 1] if per_batch and alibi_slopes is not None else alibi_slopes
        out, lse = attention(
            *heads_first, alibi_slopes=slopes, first_batch=b, return_lse=True, **modifiers
        )
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    out = torch.cat(outs)
    return (out, torch.cat(lses, 1)) if return_lse else out


def attention_varlen_bwd(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    causal: bool,
    scale: float,
    window_left: int = -1,
    window_right: int = -1,
    alibi_slopes: Tensor | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """`attention_bwd` of one sequence after the other: dq, dk, dv and dsinks."""
    grads: list[list[Tensor]] = [[q[:0]], [k[:0]], [v[:0]]]
    dsinks = None if sinks is None else torch.zeros_like(sinks, dtype=lse.dtype)
    q_at, k_at = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()

    def heads_first(x: Tensor, at: list[int], b: int) -> Tensor:
        return x[at[b] : at[b + 1]].transpose(0, 1)[None]

    for b in range(len(q_at) - 1):
        per_batch = alibi_slopes is not None and alibi_slopes.dim() == 2
        slopes = alibi_slopes[b : b + 1] if per_batch and alibi_slopes is not None else alibi_slopes
        rows = slice(q_at[b], q_at[b + 1])
        *found, _, dsink = attention_bwd(
            heads_first(grad_out, q_at, b),
            None if grad_lse is None else grad_lse[None, :, rows],
            heads_first(q, q_at, b),
            heads_first(k, k_at, b),
            heads_first(v, k_at, b),
            None,
            heads_first(out, q_at, b),
            lse[None, :, rows],
            causal,
            scale,
            False,
            window_left,
            window_right,
            slopes,
            softcap,
            sinks,
            dropout_p,
            seed,
            b,
        )
        for each, grad in zip(grads, found, strict=True):
            each.append(grad[0].transpose(0, 1))
        if dsinks is not None and dsink is not None:
            dsinks = dsinks + dsink
    dq, dk, dv = (torch.cat(each) for each in grads)
    return dq, dk, dv, dsinks


def cached_rows(
    cache: Tensor, block_table: Tensor | None, batch: int, begin: int, end: int
) -> Tensor:
    """Rows [begin, end) of one sequence of a cache, [H, end - begin, D]."""
    if block_table is None:
        return cache[batch, :, begin:end]
    page = cache.shape[2]
    first, last = begin // page, -(-end // page)  # the blocks that hold them
    blocks = cache[block_table[batch, first:last].long()]  # [blocks, H, page, D]
    return blocks.transpose(0, 1).flatten(1, 2)[:, begin - first * page : end - first * page]


def attention_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    block_table: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    return_lse: bool = False,
    alibi_slopes: Tensor | None = None,
    **modifiers: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` of one sequence after the other, over the rows of the cache that it holds."""
    outs = [q[:0, ..., :1] * v_cache[:0].sum() + q.new_zeros(0, *q.shape[1:3], v_cache.shape[3])]
    lses = [_wide(q[:0].sum(-1))]
    for b, end in enumerate(cache_seqlens.tolist()):
        begin = 0 if cache_leftpad is None else int(cache_leftpad[b])
        keys, values = (
            cached_rows(cache, block_table, b, begin, end)[None] for cache in (k_cache, v_cache)
        )
        per_batch = alibi_slopes is not None and alibi_slopes.dim() == 2
        slopes = alibi_slopes[b : b + 1] if per_batch and alibi_slopes is not None else alibi_slopes
        one = q[b : b + 1]
        out, lse = attention(one, keys, values, alibi_slopes=slopes, return_lse=True, **modifiers)
        outs.append(out)
        lses.append(lse)
    out = torch.cat(outs)
    return (out, torch.cat(lses)) if return_lse else out


def kv_cache_append_(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    cache_seqlens: Tensor,
    *,
    block_table: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    for b, start in enumerate(cache_seqlens.tolist()):
        rows = torch.arange(start, start + k.shape[2], device=k.device)
        for cache, new in ((k_cache, k[b]), (v_cache, v[b])):
            if block_table is None:
                cache[b, :, rows] = new
            else:
                page = cache.shape[2]
                blocks = block_table[b, rows // page].long()
                cache[blocks, :, rows % page] = new.transpose(0, 1)
    return k_cache, v_cache


def merge_attention(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    # Not logaddexp: where both are -inf its gradient is NaN.
    top = torch.maximum(lse_a, lse_b).detach()
    top = top.masked_fill(top == -math.inf, 0.0)
    weight_a, weight_b = torch.exp(lse_a - top), torch.exp(lse_b - top)
    total = weight_a + weight_b
    empty = total == 0
    safe = total.masked_fill(empty, 1.0)
    lse = (top + torch.log(safe)).masked_fill(empty, -math.inf)
    out = _wide(out_a) * (weight_a / safe)[..., None] + _wide(out_b) * (weight_b / safe)[..., None]
    return out.to(out_a.dtype), lse


def merge_attention_bwd(
    grad_out: Tensor,
    grad_lse: Tensor,
    out_a: Tensor,
    lse_a: Tensor,
    out_b: Tensor,
    lse_b: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """w = softmax over the two; dout_x = w_x dout, dlse_x = w_x (dlse + dout . (out_x - out))."""
    top = torch.maximum(lse_a, lse_b).detach()
    top = top.masked_fill(top == -math.inf, 0.0)
    weight_a, weight_b = torch.exp(lse_a - top), torch.exp(lse_b - top)
    total = weight_a + weight_b
    safe = total.masked_fill(total == 0, 1.0)
    weight_a, weight_b = weight_a / safe, weight_b / safe
    grad = _wide(grad_out)
    both = weight_a * weight_b * (grad * (_wide(out_a) - _wide(out_b))).sum(-1)
    return (
        (grad * weight_a[..., None]).to(out_a.dtype),
        both + weight_a * grad_lse,
        (grad * weight_b[..., None]).to(out_b.dtype),
        weight_b * grad_lse - both,
    )


# ---- norms ---------------------------------------------------------------------------------------


def _dims(normalized_shape: int | Sequence[int]) -> tuple[int, ...]:
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else normalized_shape
    return tuple(range(-len(shape), 0))


def layer_norm(
    x: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    dims, wide = _dims(normalized_shape), _wide(x)
    centered = wide - wide.mean(dims, keepdim=True)
    y = centered * torch.rsqrt(centered.square().mean(dims, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.to(wide.dtype)
    if bias is not None:
        y = y + bias.to(wide.dtype)
    return y.to(x.dtype)


def rms_norm_eps(dtype: torch.dtype) -> float:
    """What F.rms_norm takes where eps is None: the epsilon of the dtype it computes in."""
    return torch.finfo(dtype if dtype == torch.float64 else torch.float32).eps


def rms_norm(
    x: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    weight_offset: float = 0.0,
) -> Tensor:
    dims, wide = _dims(normalized_shape), _wide(x)
    eps = rms_norm_eps(x.dtype) if eps is None else eps
    y = wide * torch.rsqrt(wide.square().mean(dims, keepdim=True) + eps)
    if weight is not None:
        y = y * (weight.to(wide.dtype) + weight_offset)
    return y.to(x.dtype)


def _add(x: Tensor, residual: Tensor) -> Tensor:
    return (_wide(x) + _wide(residual)).to(torch.promote_types(x.dtype, residual.dtype))


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    total = _add(x, residual)
    return layer_norm(total, normalized_shape, weight, bias, eps).to(x.dtype), total


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    weight_offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    eps = rms_norm_eps(x.dtype) if eps is None else eps
    total = _add(x, residual)
    normed = rms_norm(total, normalized_shape, weight, eps, weight_offset=weight_offset)
    return normed.to(x.dtype), total


def _norm_bwd(
    dy: Tensor,
    h: Tensor,
    dh: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dims: int,
    weight_offset: float,
    centered: bool,
    need: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradient of h = x + residual (dh, that of the output h, added), the same in dy's dtype,
    and the parameters'; what is not needed has no elements."""
    over, rows = tuple(range(-dims, 0)), tuple(range(h.dim() - dims))
    wide, g = _wide(h), _wide(dy).to(_wide(h).dtype)
    if centered:
        wide = wide - wide.mean(over, keepdim=True)
    rstd = torch.rsqrt(wide.square().mean(over, keepdim=True) + eps)
    z = wide * rstd
    shape = h.shape[h.dim() - dims :]

    def of_parameter(product: Tensor, parameter: Tensor | None) -> Tensor:
        dtype = torch.float32 if parameter is None else parameter.dtype
        if not need[2]:
            return product.new_empty(0, dtype=dtype)
        # (A sum over no dimensions at all would be one over every dimension.)
        return (product.sum(rows) if rows else product).reshape(shape).to(dtype)

    dweight, dbias = of_parameter(g * z, weight), of_parameter(g, bias)
    if weight is not None:
        g = g * (weight.to(g.dtype) + weight_offset)
    total = g - z * (g * z).mean(over, keepdim=True)
    if centered:
        total = total - g.mean(over, keepdim=True)
    total = total * rstd
    if dh is not None:
        total = total + _wide(dh)
    return (
        total.to(h.dtype) if need[0] else h.new_empty(0),
        total.to(dy.dtype) if need[1] else dy.new_empty(0),
        dweight,
        dbias,
    )


def rms_norm_bwd(
    dy: Tensor,
    h: Tensor,
    dh: Tensor | None,
    weight: Tensor | None,
    eps: float,
    dims: int,
    weight_offset: float,
    need_h: bool,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    need = (need_h, need_x, need_weight)
    return _norm_bwd(dy, h, dh, weight, None, eps, dims, weight_offset, False, need)[:3]


def layer_norm_bwd(
    dy: Tensor,
    h: Tensor,
    dh: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dims: int,
    need_h: bool,
    need_x: bool,
    need_params: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    need = (need_h, need_x, need_params)
    return _norm_bwd(dy, h, dh, weight, bias, eps, dims, 0.0, True, need)


# ---- positions -----------------------------------------------------------------------------------


def rope(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    *,
    interleaved: bool = False,
    inverse: bool = False,
) -> Tensor:
    if cos.dim() == 3:  # already gathered: [B, T, R/2]
        c, s = cos[:, None], sin[:, None]
    elif position_ids is None:
        c, s = cos[None, None, : x.shape[-2]], sin[None, None, : x.shape[-2]]
    elif position_ids.dim() == 1:
        c, s = cos[position_ids][None, None], sin[position_ids][None, None]
    else:
        c, s = cos[position_ids][:, None], sin[position_ids][:, None]
    rotated = 2 * cos.shape[-1]
    wide = _wide(x)
    c, s = c.to(wide.dtype), s.to(wide.dtype)
    s = -s if inverse else s
    turn, rest = wide[..., :rotated], wide[..., rotated:]
    if interleaved:
        a, b = turn[..., 0::2], turn[..., 1::2]
        turned = torch.stack([a * c - b * s, b * c + a * s], -1).flatten(-2)
    else:
        a, b = turn.chunk(2, -1)
        turned = torch.cat([a * c - b * s, b * c + a * s], -1)
    return torch.cat([turned, rest], -1).to(x.dtype)


def rope_qk(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    *,
    interleaved: bool = False,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    return (
        rope(q, cos, sin, position_ids, interleaved=interleaved, inverse=inverse),
        rope(k, cos, sin, position_ids, interleaved=interleaved, inverse=inverse),
    )


def rope_qk_(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    *,
    interleaved: bool = False,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    turned = rope_qk(q, k, cos, sin, position_ids, interleaved=interleaved, inverse=inverse)
    return q.copy_(turned[0]), k.copy_(turned[1])


# ---- activations ---------------------------------------------------------------------------------


def _gate_up(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    if up is not None:
        return gate, up
    first, second = gate.chunk(2, -1)
    return first, second


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    g, u = _gate_up(gate, up)
    return (F.silu(_wide(g)) * _wide(u)).to(gate.dtype)


def geglu(gate: Tensor, up: Tensor | None = None, *, approximate: str = "none") -> Tensor:
    g, u = _gate_up(gate, up)
    return (F.gelu(_wide(g), approximate=approximate) * _wide(u)).to(gate.dtype)


def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    return F.gelu(_wide(x), approximate=approximate).to(x.dtype)


def _activation(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """act(x) and its derivative, for "silu", "gelu" or "gelu_tanh"."""
    if activation == "silu":
        s = torch.sigmoid(x)
        return x * s, s * (1 + x * (1 - s))
    if activation == "gelu":
        cdf = 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))
        return x * cdf, cdf + x * torch.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))
    root = math.sqrt(2 / math.pi)
    t = torch.tanh(root * (x + 0.044715 * x**3))
    slope = 0.5 * x * (1 - t * t) * root * (1 + 3 * 0.044715 * x * x)
    return 0.5 * x * (1 + t), 0.5 * (1 + t) + slope


def glu_bwd(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """dgate and dup of act(gate) * up."""
    value, slope = _activation(_wide(gate), activation)
    return (_wide(grad) * _wide(up) * slope).to(gate.dtype), (_wide(grad) * value).to(up.dtype)


def glu_bwd_fused(grad: Tensor, x: Tensor, activation: str) -> Tensor:
    gate, up = x.chunk(2, -1)
    return torch.cat(glu_bwd(grad, gate, up, activation), -1)


def gelu_bwd(grad: Tensor, x: Tensor, approximate: str) -> Tensor:
    _, slope = _activation(_wide(x), "gelu" if approximate == "none" else "gelu_tanh")
    return (_wide(grad) * slope).to(x.dtype)


# ---- projections ---------------------------------------------------------------------------------


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    # Torch's own product: it accumulates in fp32 and rounds once, as everything here does.
    return F.linear(x, weight, bias)


# ---- tokens --------------------------------------------------------------------------------------


def embedding(
    tokens: Tensor,
    weight: Tensor,
    *,
    padding_idx: int | None = None,
    positions: Tensor | None = None,
    position_weight: Tensor | None = None,
) -> Tensor:
    out = F.embedding(tokens, weight, padding_idx=padding_idx)
    if position_weight is None:
        return out
    if positions is None:
        positions = torch.arange(tokens.shape[-1], device=tokens.device)
    return (_wide(out) + _wide(F.embedding(positions, position_weight))).to(weight.dtype)


def embedding_bwd(grad: Tensor, ids: Tensor, rows: int, padding_idx: int) -> Tensor:
    """[rows, D]: row v is the sum of grad where ids is v; zero for padding_idx (-1: none)."""
    wide = _wide(grad).reshape(-1, grad.shape[-1])
    flat = ids.reshape(-1).long()
    if padding_idx >= 0:
        wide = wide.masked_fill((flat == padding_idx)[:, None], 0.0)
    zeros = torch.zeros(rows, grad.shape[-1], dtype=wide.dtype, device=grad.device)
    return zeros.index_add(0, flat, wide).to(grad.dtype)


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    uniform = None
    if temperature > 0.0:
        uniform = torch.rand(
            logits.shape[0], generator=generator, device=logits.device, dtype=torch.float64
        )
    return sample_at(logits, uniform, temperature, top_k, top_p, min_p)


def sample_at(
    logits: Tensor,
    uniform: Tensor | None,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
) -> Tensor:
    """The tokens for given uniform numbers [B] in [0, 1)."""
    if uniform is None:
        return logits.argmax(-1)
    probabilities = sample_probabilities(
        logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p
    )
    # Inverse distribution in token order: the first token whose cumulative sum exceeds u.
    cumulative = probabilities.double().cumsum(-1)
    target = uniform[:, None] * cumulative[:, -1:]
    return (cumulative <= target).sum(-1).clamp(max=logits.shape[-1] - 1)


def sample_probabilities(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Tensor:
    """[B, V] fp32: the distribution `sample` draws from; filters apply in the order of arguments,
    top_p and min_p to the distribution renormalized after the filter before. Tokens tied with the
    last one kept are kept."""
    scaled = _wide(logits) / temperature
    if 0 < top_k < scaled.shape[-1]:
        limit = scaled.topk(top_k, -1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < limit, -math.inf)
    if top_p < 1.0:
        p = scaled.softmax(-1)
        ordered = p.sort(-1, descending=True).values
        before = ordered.cumsum(-1) - ordered
        # The least probable token that is kept; the first always is.
        limit = ordered.masked_fill(before >= top_p, math.inf).amin(-1, keepdim=True)
        limit = torch.minimum(limit, ordered[:, :1])
        scaled = scaled.masked_fill(p < limit, -math.inf)
    if min_p > 0.0:
        p = scaled.softmax(-1)
        scaled = scaled.masked_fill(p < min_p * p.amax(-1, keepdim=True), -math.inf)
    return scaled.softmax(-1)


# ---- losses --------------------------------------------------------------------------------------


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    dtype: torch.dtype | None = None,
) -> Tensor:
    x = input.movedim(1, -1) if input.dim() > 2 else input
    out_dtype = dtype or input.dtype
    if out_dtype == torch.float64:
        x = x.double()
    how = (ignore_index, label_smoothing, z_loss, reduction, out_dtype)
    if target.shape != input.shape:
        return cross_entropy_fwd(x, target, weight, *how)[0]
    x = _wide(x)
    probabilities = (target.movedim(1, -1) if input.dim() > 2 else target).to(x.dtype)
    classes = x.shape[-1]
    if label_smoothing > 0:
        probabilities = probabilities * (1 - label_smoothing) + label_smoothing / classes
    terms = -torch.log_softmax(x, -1) * probabilities
    losses = (terms if weight is None else terms * weight.to(x.dtype)).sum(-1)
    if z_loss:
        losses = losses + z_loss * torch.logsumexp(x, -1).square()
    if reduction == "none":
        return losses.to(out_dtype)
    return (losses.mean() if reduction == "mean" else losses.sum()).to(out_dtype)


def cross_entropy_fwd(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Class indices target [...] for logits x [..., C]: the loss, and the rows' log-sum-exp in
    fp64, 0 where the target is ignored. Ignored rows are not read."""
    ignored = target == ignore_index
    x = _wide(x).masked_fill(ignored[..., None], 0.0)
    classes = x.shape[-1]
    at = target.long().masked_fill(ignored, 0)
    weights = x.new_ones(classes) if weight is None else weight.to(x.dtype)
    own = weights[at] if classes else x.new_ones(at.shape)
    minus_log = -torch.log_softmax(x, -1)
    picked = minus_log.gather(-1, at[..., None])[..., 0] if classes else minus_log.sum(-1)
    losses = own * picked
    if label_smoothing > 0:
        spread = minus_log if weight is None else minus_log * weights
        losses = (1 - label_smoothing) * losses + label_smoothing / classes * spread.sum(-1)
    losses = losses.masked_fill(ignored, 0.0)
    lse = torch.logsumexp(x, -1).masked_fill(ignored, 0.0)
    squares = z_loss * lse.square() if z_loss else torch.zeros_like(lse)
    if reduction == "none":
        return (losses + squares).to(dtype), lse.double()
    total, extra = losses.sum(), squares.sum()
    if reduction == "mean":
        kept = (~ignored).to(x.dtype)
        total, extra = total / (own * kept).sum(), extra / kept.sum()
    return (total + extra if z_loss else total).to(dtype), lse.double()


def cross_entropy_bwd(
    grad: Tensor,
    grad_lse: Tensor | None,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
) -> Tensor:
    """dx of cross_entropy_fwd. The log-sum-exp is taken from x again, so that this may itself be
    differentiated."""
    ignored = target == ignore_index
    z = _wide(x).masked_fill(ignored[..., None], 0.0)
    classes = z.shape[-1]
    kept = (~ignored).to(z.dtype)
    at = target.long().masked_fill(ignored, 0)
    weights = z.new_ones(classes) if weight is None else weight.to(z.dtype)
    own = weights[at] * kept if classes else kept
    per_loss = per_row = kept * _wide(grad).to(z.dtype)
    if reduction == "mean":
        per_loss, per_row = per_loss / own.sum(), per_row / kept.sum()
    toward = per_loss * own * (1 - label_smoothing)
    spread = per_loss * (label_smoothing / max(classes, 1))
    scale = toward
    if label_smoothing > 0:
        scale = scale + spread * weights.sum()
    if z_loss:
        scale = scale + 2 * z_loss * per_row * torch.logsumexp(z, -1)
    if grad_lse is not None:
        scale = scale + grad_lse.to(z.dtype) * kept
    dx = torch.softmax(z, -1) * scale[..., None] - spread[..., None] * weights
    if classes:
        dx = dx.scatter_add(-1, at[..., None], -toward[..., None])
    return dx.masked_fill(ignored[..., None], 0.0).to(x.dtype)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """linear_weight [V, D], or [V, d1, ..., D] for logits [N, V, d1, ...]."""
    wide_bias = None if linear_bias is None else _wide(linear_bias).flatten()
    logits = F.linear(_wide(input), _wide(linear_weight).flatten(0, -2), wide_bias)
    return cross_entropy(
        logits.reshape(*input.shape[:-1], *linear_weight.shape[:-1]),
        target,
        weight,
        ignore_index=-100 if ignore_index is None else ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
        dtype=dtype or input.dtype,
    )


def linear_cross_entropy_bwd(
    grad: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    dinput: Tensor,
    dweight: Tensor,
    dbias: Tensor,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    want_input: bool,
    want_weight: bool,
    want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients by torch.func.vjp; dinput, dweight and dbias, which a kernel may have made in
    its forward, are not looked at. What is not wanted is empty."""

    def loss(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return linear_cross_entropy(
            x,
            w,
            target,
            linear_bias=b,
            weight=weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction=reduction,
            dtype=grad.dtype,
        )

    given = (input, linear_weight) if linear_bias is None else (input, linear_weight, linear_bias)
    found = torch.func.vjp(loss, *given)[1](grad)
    wanted = (want_input, want_weight, want_bias and linear_bias is not None)
    dx, dw, db = (found[i] if want else input.new_empty(0) for i, want in enumerate(wanted))
    return dx, dw, db
