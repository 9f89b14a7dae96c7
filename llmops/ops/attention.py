"""attention: exact softmax attention in tiles, O(T) memory, forward and backward."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmops import reference
from llmops.backends import get
from llmops.dispatch import resolve
from llmops.ops import _autocast, _check
from llmops.ops._op import Op, is_tracing, shortcut


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

    s[t, j] = cap(scale * q[t] . k[j]) - slope * |d| + mask[t, j]   d = j - (t + Tk - Tq)
    lse[t]  = log(exp(sink) + sum_j exp(s[t, j]))                   cap(x) = c tanh(x / c)
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
        window: (left, right): query t sees keys with -left <= d <= right, -1 for no bound; with
            causal, right is 0. transformers' sliding_window=W is causal and left=W-1. The work is
            O(Tq * window).
        alibi_slopes: [Hq] or [B, Hq], floating point, used in fp32; takes no gradient on the
            kernels (one that asks for it goes to the reference).
        softcap: c > 0, in the unit of the scaled scores; None for no cap.
        sinks: [Hq], floating point, used in fp32, differentiable: a logit per head that takes
            weight and has no value, as one more key with v = 0. Finite, or -inf for none: +inf is
            NaN, out and lse (the reference's lse is inf).
        dropout_p: in [0, 1]: each weight is dropped with this probability and the rest multiplied
            by 1 / (1 - p); the backward drops the same ones, and lse is that of all. In a module
            pass `dropout_p if self.training else 0.0`.
        generator: draws the seed of the dropout, one number per call; torch's default one when
            None (so torch.manual_seed repeats a run). Without dropout nothing is drawn. Equal
            seeds drop the same weights on every backend.
        return_lse: also return lse.
        backend: "cpu", "triton", "cuda", "reference" or "auto"; None follows use_backend.

    Returns:
        out [B, Hq, Tq, Dv] in q's dtype; with return_lse also lse [B, Hq, Tq], fp32, natural log,
        differentiable. A row that sees no key: zeros, lse -inf (the sink where there is one), zero
        gradients.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        NotImplementedError: a named backend cannot serve the call.

    Numerics: fp32 softmax and accumulation; on bf16 the weights are rounded to bf16 for the product
    with v, as every flash kernel does. fp32 on AMX from 256 keys on is multiplied as in
    `llmops.linear`: values below 1e-33 lose digits. Deterministic, whatever the number of threads;
    but where `llmops tune` found it faster on a GPU, dq is summed by atomic additions, unless
    torch.use_deterministic_algorithms is set. Under autocast computed in autocast's dtype, as
    torch's own is.

    Source: Dao et al., "FlashAttention", 2022; Dao, "FlashAttention-2", 2023. Window: Beltagy et
    al., "Longformer", 2020. ALiBi: Press et al., 2022. Soft cap: Gemma 2, 2024. Sinks: Xiao et al.,
    2023; gpt-oss, 2025. Dropout's random numbers: Philox-4x32-10, Salmon et al., 2011.
    """
    modified = (
        window is not None
        or alibi_slopes is not None
        or softcap is not None
        or sinks is not None
        or dropout_p != 0.0
    )
    if scale is not None:
        _check.scale("attention", scale)
    if backend is None and mask is None and not modified and not is_tracing():
        raw = _attention_raw(q, k, v)
        if raw is not None:
            try:
                own = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
                out, lse = raw(q, k, v, None, causal, own)
                return (out, lse) if return_lse else out
            except (RuntimeError, IndexError, ZeroDivisionError):
                pass  # the checks below say what is wrong
    if _autocast.enabled(q):
        q, k, v, mask = _autocast.lowered(q, k, v, mask)
    _check_tensors(q, k, v, mask)
    features: tuple[str, ...] = ()
    if mask is not None:
        features = ("mask",)
    if causal:
        features += ("causal",)
    if q.shape[3] > 256 or v.shape[3] > 256:
        features += ("head_dim above 256",)
    modifiers = PLAIN
    if modified:
        modifiers, extra = checked_modifiers(
            "attention", q, q.shape[0], window, alibi_slopes, softcap, sinks, dropout_p, generator
        )
        features += extra
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
            return_lse=return_lse,
            **modifiers.of_reference(),
        )
    out, lse = _attention(q, k, v, mask, causal, scale, *modifiers, name)
    return (out, lse) if return_lse else out


class Modifiers(NamedTuple):
    """The score modifiers in the form and order of the operators' arguments."""

    window_left: int = -1
    window_right: int = -1
    alibi_slopes: Tensor | None = None  # [Hq] or [B, Hq], fp32
    softcap: float = 0.0  # 0: none
    sinks: Tensor | None = None  # [Hq], fp32
    dropout_p: float = 0.0
    # int64 [1], a tensor and no number so that a compiled graph draws it anew at each run.
    seed: Tensor | None = None

    def of_reference(self) -> dict[str, Any]:
        given = self._asdict()
        return {"window": (given.pop("window_left"), given.pop("window_right")), **given}


PLAIN = Modifiers()


def checked_modifiers(
    op: str,
    q: Tensor,
    batch: int,
    window: Any,
    alibi_slopes: Any,
    softcap: Any,
    sinks: Any,
    dropout_p: float,
    generator: torch.Generator | None,
) -> tuple[Modifiers, tuple[str, ...]]:
    """The modifiers, checked, and the names of those in use."""
    features: tuple[str, ...] = ()
    heads = q.shape[1]
    left = right = -1
    if window is not None:
        pair = window if isinstance(window, (tuple, list)) else ()
        flags = any(isinstance(n, bool) for n in pair)
        if flags or len(pair) != 2 or not all(isinstance(n, int) and n >= -1 for n in pair):
            raise (TypeError if flags else ValueError)(
                f"llmops.{op}: window must be (left, right), two ints >= -1 (-1: no bound); "
                f"got {window!r}; a sliding window of W keys is causal=True, window=(W - 1, 0)"
            )
        left, right = window
        features += ("window",)
    # fp64 inputs are served by the reference, in fp64.
    fp32 = torch.float64 if q.dtype == torch.float64 else torch.float32
    if alibi_slopes is not None:
        _check.floating(op, "alibi_slopes", alibi_slopes)
        _check.same_device(op, "q", q, "alibi_slopes", alibi_slopes)
        if tuple(alibi_slopes.shape) not in ((heads,), (batch, heads)):
            raise ValueError(
                f"llmops.{op}: alibi_slopes must be [Hq] or [B, Hq] with B={batch} and "
                f"Hq={heads}; got shape {tuple(alibi_slopes.shape)}"
            )
        features += ("alibi_slopes",)
        if alibi_slopes.requires_grad and torch.is_grad_enabled():
            features += ("gradient of alibi_slopes",)
        alibi_slopes = alibi_slopes.to(fp32)
    if softcap is not None:
        if not 0.0 < softcap < math.inf:
            raise ValueError(
                f"llmops.{op}: softcap must be a finite number > 0; got {softcap}; "
                "pass None for no cap"
            )
        features += ("softcap",)
    if sinks is not None:
        _check.floating(op, "sinks", sinks)
        _check.same_device(op, "q", q, "sinks", sinks)
        if tuple(sinks.shape) != (heads,):
            raise ValueError(
                f"llmops.{op}: sinks must be [Hq] = ({heads},), one logit per query head; "
                f"got shape {tuple(sinks.shape)}"
            )
        features += ("sinks",)
        sinks = sinks.to(fp32).contiguous()
    seed = None
    if dropout_p != 0.0:
        if not 0.0 <= dropout_p <= 1.0:
            raise ValueError(f"llmops.{op}: dropout_p must be in [0, 1]; got {dropout_p}")
        features += ("dropout",)
        seed = reference.dropout_seed(q.device, generator)
    return Modifiers(
        left, right, alibi_slopes, softcap or 0.0, sinks, float(dropout_p), seed
    ), features


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


_attention_raw = shortcut("attention", autocast=True)


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
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, *rest: Any
) -> tuple[Tensor, Tensor]:
    modifiers, backend = Modifiers(*rest[:-1]), rest[-1]
    if backend != "cpu":
        features = (("mask",) if mask is not None else ()) + (("causal",) if causal else ())
        backend = resolve("attention", q.device, q.dtype, features, backend)
    if backend == "reference":
        out, lse = reference.attention(
            q, k, v, causal=causal, scale=scale, mask=mask, return_lse=True,
            **modifiers.of_reference(),
        )  # fmt: skip
        return _laid_out(out, q), lse.contiguous()
    return get(backend).attention(q, k, v, mask, causal, scale, *modifiers)


def _fake(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, *rest: Any
) -> tuple[Tensor, Tensor]:
    lse_type = torch.float64 if q.dtype == torch.float64 else torch.float32
    return _heads_like(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=lse_type)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, mask, ctx.causal, ctx.scale, *modifiers, ctx.backend = inputs
    named = Modifiers(*modifiers)
    ctx.save_for_backward(q, k, v, mask, named.alibi_slopes, named.sinks, named.seed, *output)
    ctx.modifiers = named._replace(alibi_slopes=None, sinks=None, seed=None)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, mask, alibi_slopes, sinks, seed, out, lse = ctx.saved_tensors
    if grad_out is None and grad_lse is None:
        return (None,) * 14
    if ctx.needs_input_grad[8]:
        raise NotImplementedError(
            "llmops.attention: alibi_slopes takes no gradient on the kernels; detach it, or use "
            'backend="reference"'
        )
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    need_mask = mask is not None and ctx.needs_input_grad[3]
    modifiers = ctx.modifiers._replace(alibi_slopes=alibi_slopes, sinks=sinks, seed=seed)
    dq, dk, dv, dmask, dsinks = _attention_bwd(
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
        *modifiers,
        ctx.backend,
    )
    dmask = dmask.to(mask.dtype) if need_mask else None
    dsinks = dsinks if sinks is not None and ctx.needs_input_grad[10] else None
    # causal, scale, the window, alibi_slopes, softcap; dropout_p, seed, backend.
    return dq, dk, dv, dmask, *(None,) * 6, dsinks, *(None,) * 3


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
    *rest: Any,
) -> tuple[Tensor, ...]:
    modifiers, backend = rest[:-1], rest[-1]
    if backend != "cpu":
        backend = resolve("attention_bwd", q.device, q.dtype, (), backend)
    arguments = (grad_out, grad_lse, q, k, v, mask, out, lse, causal, scale, need_mask_grad)
    if backend == "reference":
        dq, dk, dv, *others = reference.attention_bwd(*arguments, *modifiers)
        dq, dk, dv = _laid_out(dq, q), _laid_out(dk, k), _laid_out(dv, v)
        others = [x.contiguous() if x is not None else None for x in others]
    else:
        dq, dk, dv, *others = get(backend).attention_bwd(*arguments, *modifiers)
    return dq, dk, dv, *(lse.new_empty(0) if x is None else x for x in others)


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
    *rest: Any,
) -> tuple[Tensor, ...]:
    sinks = Modifiers(*rest[:-1]).sinks
    return (
        _heads_like(q, q.shape[3]),
        _heads_like(k, k.shape[3]),
        _heads_like(v, v.shape[3]),
        lse.new_empty(mask.shape if need_mask_grad and mask is not None else (0,)),
        lse.new_empty((0,) if sinks is None else sinks.shape),
    )


# Modifiers, in its order.
MODIFIERS = (
    "int window_left, int window_right, Tensor? alibi_slopes, float softcap, Tensor? sinks, "
    "float dropout_p, Tensor? seed"
)
_attention_bwd = Op(
    "attention_bwd(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor? mask, "
    "Tensor out, Tensor lse, bool causal, float scale, bool need_mask_grad, "
    f"{MODIFIERS}, str backend) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dmask, Tensor dsinks)",
    forward=_forward_bwd,
    fake=_fake_bwd,
    reference=reference.attention_bwd,
)
_attention = Op(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, bool causal, float scale, "
    f"{MODIFIERS}, str backend) -> (Tensor out, Tensor lse)",
    forward=_forward,
    fake=_fake,
    setup=_setup,
    backward=_backward,
)
