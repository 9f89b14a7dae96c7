"""scaled_dot_product_attention: torch's function of that name, on llmops.attention."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmops.dispatch import requested
from llmops.ops import _check
from llmops.ops.attention import attention


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    backend: str | None = None,
) -> Tensor:
    """F.scaled_dot_product_attention, argument for argument, computed by llmops.attention.

    Unlike llmops.attention, is_causal is aligned top-left: query t sees keys 0..t, whatever the
    number of keys.

        Tq=2, Tk=4   x . . .      Tq=4, Tk=2   x .
                     x x . .                   x x
                                               x x
                                               x x

    Args:
        query: [B, Hq, Tq, D], or [B, Tq, D], or [Tq, D]; fp32/bf16/fp16.
        key, value: [B, Hkv, Tk, D], [B, Hkv, Tk, Dv], or as query without heads.
        attn_mask: bool (True takes part) or float (added), broadcastable to [B, Hq, Tq, Tk].
        dropout_p: of the weights, in [0, 1], whether or not a module is in training; the seed comes
            from torch's default generator, and the weights dropped are llmops.attention's.
        is_causal: top-left causal mask; not together with attn_mask.
        scale: 1/sqrt(D) when None.
        enable_gqa: allow fewer key/value heads than query heads.
        backend: as in llmops.attention.

    Returns:
        Tensor [B, Hq, Tq, Dv] in query's dtype (with query's number of dimensions).

    Raises:
        RuntimeError: attn_mask together with is_causal, as torch.
        ValueError: dropout_p outside [0, 1].
        NotImplementedError: a named backend cannot serve the call.

    What attention has no form for (more than 4 dimensions, batches that broadcast, fp64, nested
    tensors) goes to torch's own function, unless a backend is named.
    """
    if attn_mask is None and dropout_p == 0.0 and _is_plain(query, key, value, is_causal):
        return attention(query, key, value, causal=is_causal, scale=scale, backend=backend)  # type: ignore[return-value]
    _check.floating("scaled_dot_product_attention", "query", query)
    if is_causal and attn_mask is not None:
        raise RuntimeError(
            "llmops.scaled_dot_product_attention: attn_mask must be None when is_causal is True; "
            "merge the causal mask into attn_mask"
        )
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(
            f"llmops.scaled_dot_product_attention: dropout_p must be in [0, 1]; got {dropout_p}"
        )
    reason = _why_not(query, key, value, attn_mask, enable_gqa)
    if reason is not None:
        if requested(backend) not in (None, "auto", "reference"):
            raise NotImplementedError(
                f"llmops.scaled_dot_product_attention: {reason}, which no kernel of backend "
                f'{requested(backend)!r} serves; use backend="auto" to let torch compute it'
            )
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=attn_mask,
            dropout_p=dropout_p,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
        )
    missing = 4 - query.dim()
    for _ in range(missing):
        query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
    out = _attend(query, key, value, attn_mask, is_causal, scale, dropout_p, backend)
    for _ in range(missing):
        out = out.squeeze(0)
    return out


def _is_plain(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> bool:
    """True for the common forms, in which llmops.attention means the same argument by argument."""
    try:
        asked, shape = q.shape, k.shape
        return (
            (asked == shape or (not causal and asked[:2] == shape[:2] and len(asked) == 4))
            and v.shape == shape
            and len(shape) == 4
            and asked[3] == shape[3] > 0
            and q.dtype == k.dtype == v.dtype != torch.float64
            and q.is_floating_point()
        )
    except (AttributeError, RuntimeError):  # no tensor, or a nested one, which has no shape
        return False


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
    dropout_p: float,
    backend: str | None,
) -> Tensor:
    rest: dict[str, Any] = {"scale": scale, "dropout_p": dropout_p, "backend": backend}
    queries, keys = q.shape[2], k.shape[2]
    if causal and keys > queries:  # no query sees keys past the last query
        k, v, keys = k[:, :, :queries], v[:, :, :queries], queries
    if causal and queries > keys:  # square on top, and rows that see every key
        top = attention(q[:, :, :keys], k, v, causal=True, **rest)
        bottom = attention(q[:, :, keys:], k, v, **rest)
        assert isinstance(top, Tensor) and isinstance(bottom, Tensor)
        return torch.cat((top, bottom), 2)
    out = attention(q, k, v, causal=causal, mask=mask, **rest)
    assert isinstance(out, Tensor)
    return out


def _why_not(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, gqa: bool) -> str | None:
    """None when llmops.attention computes exactly this, else what it has no form for."""
    if not all(isinstance(x, Tensor) and not x.is_nested for x in (q, k, v)):
        return "an argument is nested or no tensor"
    if not 2 <= q.dim() <= 4 or k.dim() != q.dim() or v.dim() != q.dim():
        return f"the inputs have {q.dim()}, {k.dim()} and {v.dim()} dimensions"
    if q.dtype == torch.float64:
        return "the inputs are float64"
    if not torch.is_autocast_enabled(q.device.type) and not q.dtype == k.dtype == v.dtype:
        return "the inputs differ in dtype"
    if q.shape[-1] == 0:
        return "head_dim is 0"
    if k.shape[:-1] != v.shape[:-1] or k.shape[-1] != q.shape[-1]:
        return "the shapes of key and value do not fit"
    if q.dim() > 2 and (k.shape[0] != q.shape[0]):
        return "the batch dimensions broadcast"
    if q.dim() == 4 and k.shape[1] != q.shape[1]:
        fits = k.shape[1] > 0 and q.shape[1] % k.shape[1] == 0
        if not fits or not (gqa or k.shape[1] == 1):
            return "the numbers of heads differ"
    if mask is not None:
        full = (*q.shape[:-1], k.shape[-2])
        if mask.dim() > q.dim() or any(
            m not in (1, n) for m, n in zip(reversed(mask.shape), reversed(full), strict=False)
        ):
            return f"attn_mask has shape {tuple(mask.shape)}"
        if mask.dtype != torch.bool and mask.dtype not in _check.FLOATS[:3]:
            return f"attn_mask is {_check.dtype_name(mask.dtype)}"
    return None
