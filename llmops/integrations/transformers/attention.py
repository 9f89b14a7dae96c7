"""What transformers calls for attn_implementation="llmops": its attention and mask interfaces.

Every argument of the interface is served or refused. The mask decides what a query sees; where
there is none, the module is causal or not as it says itself, and a window applies.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import llmops
from llmops import FallbackWarning

# What models pass on to any attention function and attention has no use for: positions are in q, k
# and the mask by then, the kernels are deterministic, and the others speak of the cache, the loss
# or the model's outputs.
_OF_OTHERS = frozenset(
    {
        "cache", "cache_position", "deterministic", "layer_idx", "logits_to_keep",
        "num_items_in_batch", "output_hidden_states", "output_router_logits", "past_key_value",
        "past_key_values", "position_embeddings", "position_ids", "return_dict", "seq_idx",
        "token_type_ids", "use_cache",
    }
)  # fmt: skip
# Beside q, k, v and the mask: what `attention` below names, for the check against transformers.
SERVED = frozenset(
    {
        "attention_mask", "cu_seq_lens_k", "cu_seq_lens_q", "dropout", "head_mask", "is_causal",
        "key", "max_length_k", "max_length_q", "module", "output_attentions", "position_bias",
        "query", "s_aux", "scaling", "sliding_window", "softcap", "value",
    }
)  # fmt: skip


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    *,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    head_mask: Tensor | None = None,
    output_attentions: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: Any = None,
    max_length_k: Any = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention interface on `llmops.attention`.

    Args:
        module: the attention layer; its `is_causal` holds where the argument is None.
        query: [B, Hq, Tq, D]. key, value: [B, Hkv, Tk, D].
        attention_mask: [B or 1, Hq or 1, Tq or 1, Tk], bool (True keeps) or added; it says all.
            Without one a causal module is causal, aligned as transformers' "sdpa" is: with more
            keys than queries the first Tq keys are those of the queries (an empty static cache),
            and one query sees all.
        dropout: of the weights. scaling: of the scores, 1/sqrt(D) when None.
        softcap, s_aux (sinks), position_bias (added to the scores, differentiable).
        sliding_window: W keys, the query's own included; with a mask, the mask has it already.
        output_attentions, or a module whose weights are being recorded; head_mask: computed with
            all scores in memory, and a FallbackWarning.
        cu_seq_lens_q, cu_seq_lens_k: packed sequences in a batch of one.

    Returns:
        (out [B, Tq, Hq, D], weights [B, Hq, Tq, Tk] or None).

    Raises:
        NotImplementedError: an argument that is not listed here and would be ignored.
    """
    unknown = [n for n, given in others.items() if given is not None and n not in _OF_OTHERS]
    if unknown:
        raise NotImplementedError(
            f'attn_implementation="llmops": {type(module).__name__} passes '
            f"{', '.join(sorted(unknown))}, which it has no form for; choose another, e.g. "
            'model.set_attn_implementation("sdpa")'
        )
    mask = _checked(attention_mask, module, key)
    queries, keys = query.shape[2], key.shape[2]
    if query.shape[0] != key.shape[0]:  # learned queries of batch 1
        query = query.expand(key.shape[0], -1, -1, -1)
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    causal = queries > 1 and mask is None and causal
    window = None
    if mask is None and sliding_window is not None:
        window = _window(sliding_window, causal or queries == 1, keys)
    if causal and keys > queries:
        key, value = key[:, :, :queries], value[:, :, :queries]
        if position_bias is not None:
            position_bias = position_bias[..., :queries]
    weighed = _weights_wanted(module, output_attentions, head_mask)
    if cu_seq_lens_q is not None or cu_seq_lens_k is not None:
        packed = _Packed(query, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
        if mask is None and position_bias is None and not weighed:
            return packed.attend(
                query, key, value, causal, dropout, scaling, window, softcap, s_aux
            ), None
        mask, causal, window = packed.mask(mask, causal, window), False, None
    if position_bias is not None:
        mask = _biased(position_bias, mask, key.dtype)
    if weighed:
        return _explicit(
            query, key, value, mask, causal, window, dropout, scaling, softcap, s_aux, head_mask
        )
    out: Any = llmops.attention(
        query,
        key,
        value,
        causal=causal,
        scale=scaling,
        mask=mask,
        window=window,
        softcap=softcap,
        sinks=s_aux,
        dropout_p=dropout,
    )
    return out.transpose(1, 2).contiguous(), None


def _checked(mask: Tensor | None, module: nn.Module, key: Tensor) -> Tensor | None:
    if mask is None:
        return None
    if mask.dim() != 4:
        raise ValueError(
            f'attn_implementation="llmops": {type(module).__name__} got an attention_mask of shape '
            f"{tuple(mask.shape)}; [batch, heads or 1, queries, keys] is expected (give the 2-D "
            "padding mask to the model, not to the layer)"
        )
    # Older versions of transformers make it as long as the longest cache.
    return mask[..., : key.shape[2]] if mask.shape[-1] > key.shape[2] else mask


def _window(sliding_window: int, causal: bool, keys: int) -> tuple[int, int] | None:
    if causal:
        return sliding_window - 1, 0
    # Models differ in what W means on both sides of a query; their masks say it.
    if keys > sliding_window:
        raise NotImplementedError(
            f'attn_implementation="llmops": sliding_window={sliding_window} in attention that is '
            f"not causal, over {keys} keys and without a mask, is not defined; pass the mask"
        )
    return None


def _biased(bias: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """One mask to add; as transformers' own it is finite, so that a query without keys sees all
    alike."""
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, torch.finfo(dtype).min)
    return bias + mask


class _Packed:
    """Sequences side by side in a batch of one, as transformers describes them to flash-attn."""

    def __init__(
        self, query: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, max_q: Any, max_k: Any
    ) -> None:
        if cu_q is None or cu_k is None or query.shape[0] != 1:
            raise ValueError(
                'attn_implementation="llmops": cu_seq_lens_q and cu_seq_lens_k go together, with a '
                f"batch of 1; got a batch of {query.shape[0]}, {cu_q is not None} and "
                f"{cu_k is not None}"
            )
        self.cu_q, self.cu_k = cu_q.to(torch.int32), cu_k.to(torch.int32)
        self.max_q, self.max_k = (
            int((cu[1:] - cu[:-1]).max()) if given is None else int(given)
            for cu, given in ((cu_q, max_q), (cu_k, max_k))
        )

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, dropout: float,
        scaling: float | None, window: tuple[int, int] | None, softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:  # fmt: skip
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
        out: Any = llmops.attention_varlen(
            q, k, v, self.cu_q, self.cu_k, self.max_q, self.max_k,
            causal=causal, scale=scaling, window=window, softcap=softcap, sinks=sinks,
            dropout_p=dropout,
        )  # fmt: skip
        return out[None]

    def mask(self, mask: Tensor | None, causal: bool, window: tuple[int, int] | None) -> Tensor:
        """The given mask, less what another sequence holds."""
        device = self.cu_q.device
        at_q = torch.arange(int(self.cu_q[-1]), device=device)
        at_k = torch.arange(int(self.cu_k[-1]), device=device)
        of_q = torch.bucketize(at_q, self.cu_q[1:], right=True)
        of_k = torch.bucketize(at_k, self.cu_k[1:], right=True)
        keep = of_q[:, None] == of_k
        # Distances within a sequence, aligned at its end.
        offset = (self.cu_k[1:] - self.cu_q[1:])[of_q]
        distance = at_k - (at_q + offset)[:, None]
        if causal:
            keep = keep & (distance <= 0)
        if window is not None:
            keep = keep & (distance >= -window[0])
        if mask is None:
            return keep[None, None]
        if mask.dtype == torch.bool:
            return mask & keep
        return mask.masked_fill(~keep, torch.finfo(mask.dtype).min)


# ---- with all scores in memory -------------------------------------------------------------------


def _weights_wanted(module: nn.Module, asked: bool | None, head_mask: Tensor | None) -> bool:
    if asked or head_mask is not None:
        return True
    if getattr(getattr(module, "config", None), "output_attentions", False):
        return True
    # transformers records the weights by forward hooks of the layer, which it leaves in place.
    return bool(module._forward_hooks) and _recording()


def _recording() -> bool:
    try:
        from transformers.utils.output_capturing import _active_collector
    except ImportError:  # versions that pass output_attentions on
        return False
    collected = _active_collector.get()
    return collected is not None and any("attentions" in name for name in collected)


def _explicit(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool,
    window: tuple[int, int] | None, dropout: float, scaling: float | None, softcap: float | None,
    sinks: Tensor | None, head_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same with the weights, in plain PyTorch, rounded where transformers' "eager" rounds."""
    if not torch.compiler.is_compiling():
        warnings.warn(
            'attn_implementation="llmops" holds all scores, in plain PyTorch, where the weights '
            "are asked for (output_attentions, head_mask); without, the kernel runs",
            FallbackWarning,
            stacklevel=3,
        )
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    scores = q @ k.transpose(2, 3) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if causal or window is not None:
        keep = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device)
        behind = k.shape[2] - q.shape[2]
        if causal:
            keep = keep.tril(behind)
        if window is not None:
            keep = keep & keep.new_ones(keep.shape).triu(behind - window[0])
        scores = scores.masked_fill(~keep, torch.finfo(scores.dtype).min)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    if sinks is not None:
        sink = sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], 1)
        scores = torch.cat((scores, sink.to(scores.dtype)), -1)
    weights = F.softmax(scores, -1, dtype=torch.float32).to(q.dtype)
    if sinks is not None:
        weights = weights[..., :-1]
    weights = F.dropout(weights, dropout)
    if head_mask is not None:
        weights = weights * head_mask
    return (weights @ v).transpose(1, 2).contiguous(), weights
