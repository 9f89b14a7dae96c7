"""attention: exact softmax attention in tiles, O(T) memory, forward and backward."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from llmops import reference
from llmops.backends import get
from llmops.dispatch import requested, resolve
from llmops.ops import _check
from llmops.ops._op import Op


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
    generator: torch.Generator | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention, out = softmax(scale * q k^T + mask) v, never holding the scores.

    s[t, j] = scale * q[t] . k[j] + mask[t, j];  lse[t] = log sum_j exp(s[t, j])
    out[t]  = sum_j exp(s[t, j] - lse[t]) v[j]

    Causal attention is aligned bottom-right: the last query sees every key. x is seen:

        Tq=3, Tk=5   x x x . .      Tq=4, Tk=2   . .   (the first rows see nothing: zeros, lse -inf)
                     x x x x .                   . .
                     x x x x x                   x .
                                                 x x

    Args:
        q: [B, Hq, Tq, D], fp32/bf16/fp16 (fp64 on the reference), any strides; a transposed
            [B, T, H, D] costs nothing (a last dimension with gaps is copied). The result is laid
            out as q is.
        k: [B, Hkv, Tk, D], q's dtype; Hq a multiple of Hkv (grouped-query, multi-query): query head
            h reads key head h // (Hq // Hkv).
        v: [B, Hkv, Tk, Dv].
        causal: query t sees keys up to t + Tk - Tq.
        scale: of the scores; 1/sqrt(D) when None.
        mask: broadcastable to [B, Hq, Tq, Tk], never expanded. bool: True keeps. Float: added to
            the scaled scores, and differentiable.
        window: (left, right) keys seen on either side, -1 unbounded. Reference only so far.
        alibi_slopes: [Hq] or [B, Hq]; adds -slope * distance. Reference only so far.
        softcap: c * tanh(s / c) before masking. Reference only so far.
        sinks: [Hq], a logit per head that takes weight and gives no value. Reference only so far.
        dropout_p, generator: not there yet.
        return_lse: also return lse.
        backend: "cpu", "triton", "cuda", "reference" or "auto"; None follows use_backend.

    Returns:
        out [B, Hq, Tq, Dv] in q's dtype; with return_lse also lse [B, Hq, Tq], fp32, natural log,
        differentiable. A row that sees no key: zeros, lse -inf, zero gradients.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        NotImplementedError: an argument that has no kernel yet, or a named backend that cannot
            serve.

    Numerics: fp32 softmax and accumulation; on bf16 the weights are rounded to bf16 for the product
    with v, as every flash kernel does. Deterministic, whatever the number of threads. Under
    autocast computed in autocast's dtype, as torch's own is.

    Source: Dao et al., "FlashAttention", 2022; Dao, "FlashAttention-2", 2023.
    """
    if torch.is_autocast_enabled(q.device.type if isinstance(q, Tensor) else "cpu"):
        q, k, v, mask = _autocast(q, k, v, mask)
    _check_tensors(q, k, v, mask)
    features: tuple[str, ...] = ()
    if mask is not None:
        features = ("mask",)
    if causal:
        features += ("causal",)
    modified = _modifiers(window, alibi_slopes, softcap, sinks, dropout_p, generator)
    if modified:
        features += modified
        if requested(backend) not in (None, "reference"):
            raise NotImplementedError(
                f"llmops.attention: {modified[0]} has no kernel yet; leave it out, or pass "
                'backend="reference" (plain PyTorch, which holds all scores in memory)'
            )
    widest = torch.float64 if mask is not None and mask.dtype == torch.float64 else q.dtype
    name = resolve("attention", q.device, widest, features, backend)
    if scale is None:
        dim = q.shape[3]
        scale = 1.0 / math.sqrt(dim) if dim else 1.0
    if name == "reference":
        return reference.attention(
            q,
            k,
            v,
            causal=causal,
            scale=scale,
            mask=mask,
            window=window,
            alibi_slopes=alibi_slopes,
            softcap=softcap,
            sinks=sinks,
            return_lse=return_lse,
        )
    out, lse = _attention(q, k, v, mask, causal, scale, name)
    return (out, lse) if return_lse else out


def _autocast(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    dtype = torch.get_autocast_dtype(q.device.type)

    def cast(x: Any) -> Any:
        if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64:
            return x.to(dtype)
        return x

    return cast(q), cast(k), cast(v), cast(mask)


def _modifiers(
    window: Any, alibi_slopes: Any, softcap: Any, sinks: Any, dropout_p: float, generator: Any
) -> tuple[str, ...]:
    """Names of the score modifiers in use."""
    if dropout_p != 0.0 or generator is not None:
        argument = "dropout_p" if dropout_p != 0.0 else "generator"
        raise NotImplementedError(
            f"llmops.attention: {argument} is not supported yet; pass dropout_p=0.0 and no "
            "generator (in a module, dropout_p if self.training else 0.0)"
        )
    if window is None and alibi_slopes is None and softcap is None and sinks is None:
        return ()
    given = {
        "window": window,
        "alibi_slopes": alibi_slopes,
        "softcap": softcap,
        "sinks": sinks,
    }
    return tuple(name for name, value in given.items() if value is not None)


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check.floating("attention", name, x)
        if x.dim() != 4:
            raise ValueError(
                f"llmops.attention: {name} must be [batch, heads, tokens, head_dim]; got shape "
                f"{tuple(x.shape)}; add the missing dimensions, e.g. {name}.unsqueeze(0)"
            )
        if x.dtype != q.dtype:
            raise TypeError(
                f"llmops.attention: {name} has dtype {_check.dtype_name(x.dtype)} and q "
                f"{_check.dtype_name(q.dtype)}; convert one, e.g. {name}.to(q.dtype)"
            )
        if x.device != q.device:
            _check.same_device("attention", "q", q, name, x)
    batch, heads, queries, dim = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    if k.shape[0] != batch or k.shape[3] != dim:
        raise ValueError(
            f"llmops.attention: k must be [B, Hkv, Tk, D] with q's B={batch} and D={dim}; "
            f"got shape {tuple(k.shape)}"
        )
    if v.shape[0] != batch or v.shape[1] != kv_heads or v.shape[2] != keys:
        raise ValueError(
            f"llmops.attention: v must be [B, Hkv, Tk, Dv] with k's ({batch}, {kv_heads}, {keys}); "
            f"got shape {tuple(v.shape)}"
        )
    if kv_heads != heads and (kv_heads == 0 or heads % kv_heads != 0):
        raise ValueError(
            f"llmops.attention: q has {heads} heads, which is no multiple of k's {kv_heads}; "
            "repeat or drop key/value heads"
        )
    if mask is None:
        return
    if not isinstance(mask, Tensor) or (
        mask.dtype != torch.bool and mask.dtype not in _check.FLOATS
    ):
        _check.fail_type("attention", "mask", "a bool (True keeps) or floating-point Tensor", mask)
    _check.same_device("attention", "q", q, "mask", mask)
    full = (batch, heads, queries, keys)
    if mask.dim() > 4 or any(
        m not in (1, n) for m, n in zip(reversed(mask.shape), reversed(full), strict=False)
    ):
        raise ValueError(
            f"llmops.attention: mask of shape {tuple(mask.shape)} does not broadcast to "
            f"[B, Hq, Tq, Tk] = {full}"
        )


# ---- the operators -------------------------------------------------------------------------------


def _heads_like(like: Tensor, dim: int) -> Tensor:
    """Empty [B, H, T, dim], laid out as `like` [B, H, T, *] is: with the heads of a token side by
    side where they are in `like`, so that a model's transpose back costs nothing."""
    batch, heads, tokens, _ = like.shape
    if like.stride(1) < like.stride(2):
        return like.new_empty(batch, tokens, heads, dim).transpose(1, 2)
    return like.new_empty(batch, heads, tokens, dim)


def _laid_out(x: Tensor, like: Tensor) -> Tensor:
    return _heads_like(like, x.shape[3]).copy_(x)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    if backend != "cpu":
        features = (("mask",) if mask is not None else ()) + (("causal",) if causal else ())
        backend = resolve("attention", q.device, q.dtype, features, backend)
    if backend == "reference":
        out, lse = reference.attention(
            q, k, v, causal=causal, scale=scale, mask=mask, return_lse=True
        )
        return _laid_out(out, q), lse.contiguous()
    return get(backend).attention(q, k, v, mask, causal, scale)


def _fake(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    lse_type = torch.float64 if q.dtype == torch.float64 else torch.float32
    return _heads_like(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=lse_type)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, mask, ctx.causal, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(q, k, v, mask, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, mask, out, lse = ctx.saved_tensors
    if grad_out is None and grad_lse is None:
        return (None,) * 7
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    need_mask = mask is not None and ctx.needs_input_grad[3]
    dq, dk, dv, dmask = _attention_bwd(
        grad_out,
        grad_lse,
        q,
        k,
        v,
        mask,
        out,
        lse,
        ctx.causal,
        ctx.scale,
        need_mask,
        ctx.backend,
    )
    return dq, dk, dv, dmask.to(mask.dtype) if need_mask else None, None, None, None


def _forward_bwd(
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if backend != "cpu":
        backend = resolve("attention_bwd", q.device, q.dtype, (), backend)
    arguments = (grad_out, grad_lse, q, k, v, mask, out, lse, causal, scale, need_mask_grad)
    if backend == "reference":
        dq, dk, dv, dmask = reference.attention_bwd(*arguments)
        dq, dk, dv = _laid_out(dq, q), _laid_out(dk, k), _laid_out(dv, v)
        dmask = dmask.contiguous() if dmask is not None else None
    else:
        dq, dk, dv, dmask = get(backend).attention_bwd(*arguments)
    return dq, dk, dv, lse.new_empty(0) if dmask is None else dmask


def _fake_bwd(
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = mask.shape if need_mask_grad and mask is not None else (0,)
    return (
        _heads_like(q, q.shape[3]),
        _heads_like(k, k.shape[3]),
        _heads_like(v, v.shape[3]),
        lse.new_empty(shape),
    )


_attention_bwd = Op(
    "attention_bwd(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor? mask, "
    "Tensor out, Tensor lse, bool causal, float scale, bool need_mask_grad, str backend) -> "
    "(Tensor dq, Tensor dk, Tensor dv, Tensor dmask)",
    forward=_forward_bwd,
    fake=_fake_bwd,
    reference=reference.attention_bwd,
)
_attention = Op(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, bool causal, float scale, str backend)"
    " -> (Tensor out, Tensor lse)",
    forward=_forward,
    fake=_fake,
    setup=_setup,
    backward=_backward,
)
