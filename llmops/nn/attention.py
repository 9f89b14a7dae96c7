"""Attention: torch.nn.MultiheadAttention on our operators."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import llmops


class Attention(torch.nn.MultiheadAttention):
    """torch.nn.MultiheadAttention on `llmops.attention`: its constructor, state dict and call, and
    what language models add to it.

    Differences from torch's: a query whose keys are all masked gives zeros where torch gives NaN;
    key and value may be left out (self-attention); is_causal alone is enough, without a mask.

    Args:
        num_kv_heads: key/value heads, a divisor of num_heads: grouped-query attention, with
            in_proj_weight [(num_heads + 2 num_kv_heads) D, E]. None: num_heads. Not together with
            kdim, vdim, add_bias_kv or add_zero_attn.
        rotary: turns q and k by their positions, e.g. a RotaryEmbedding of the head dim.
        backend: as in `llmops.attention`. Others as in torch.nn.MultiheadAttention.
    """

    def __init__(
        self,
        *args: Any,
        num_kv_heads: int | None = None,
        rotary: torch.nn.Module | None = None,
        backend: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.backend = backend
        self.rotary = rotary
        self.num_kv_heads = self.num_heads if num_kv_heads is None else num_kv_heads
        if self.num_kv_heads != self.num_heads:
            self._group_heads()

    def _group_heads(self) -> None:
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"llmops.nn.Attention: num_kv_heads must divide num_heads={self.num_heads}; got "
                f"{self.num_kv_heads}"
            )
        weight = self.in_proj_weight
        if weight is None or self.bias_k is not None or self.add_zero_attn:
            raise NotImplementedError(
                "llmops.nn.Attention: num_kv_heads does not go together with kdim, vdim, "
                "add_bias_kv or add_zero_attn; leave one out"
            )
        rows = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        self.in_proj_weight = torch.nn.Parameter(weight.new_empty(rows, self.embed_dim))
        if self.in_proj_bias is not None:
            self.in_proj_bias = torch.nn.Parameter(self.in_proj_bias.new_empty(rows))
        self._reset_parameters()

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        position_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of query over key and value.

        Args:
            query: [T, B, E], [B, T, E] with batch_first, or [T, E].
            key, value: likewise, S tokens of kdim and vdim; None: query, and key.
            key_padding_mask: [B, S] ([S]); bool, True drops that key, or float, added.
            need_weights: also return the attention weights. As in torch this is the default; it
                holds all scores, so pass False for the kernel.
            attn_mask: [T, S] or [B * num_heads, T, S]; bool, True drops, or float, added.
            average_attn_weights: weights averaged over heads.
            is_causal: query t sees keys 0 to t; with attn_mask, both apply.
            position_ids: for `rotary`, [T] or [B, T]; None: 0 to T-1.

        Returns:
            (output laid out as query, weights [B, T, S] or [B, num_heads, T, S] or None).
        """
        key = query if key is None else key
        value = key if value is None else value
        batched = self._check(query, key, value)
        q, k, v = self._project(query, key, value, 0 if self.batch_first or not batched else 1)
        if self.rotary is not None:
            q, k = self.rotary(q, k, position_ids)
        elif position_ids is not None:
            raise ValueError("llmops.nn.Attention: position_ids need rotary; construct with it")
        mask, causal = self._mask(attn_mask, key_padding_mask, is_causal, q, k)
        k, v, mask, causal = self._extra_keys(k, v, mask, causal)
        dropout = self.dropout if self.training else 0.0
        out, weights = self._attend(q, k, v, mask, causal, dropout, need_weights)
        out = out.transpose(1, 2).flatten(2)  # [B, T, E]
        y = llmops.linear(out, self.out_proj.weight, self.out_proj.bias, backend=self.backend)
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return y[0], None if weights is None else weights[0]
        return y if self.batch_first else y.transpose(0, 1), weights

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """True when the inputs have a batch dimension."""
        inputs = (("query", query, self.embed_dim), ("key", key, self.kdim))
        for name, x, width in (*inputs, ("value", value, self.vdim)):
            if not isinstance(x, Tensor) or x.is_nested:
                raise TypeError(
                    f"llmops.nn.Attention: {name} must be a dense Tensor; got "
                    f"{'a nested one' if isinstance(x, Tensor) else type(x).__name__}; pad it, and "
                    "pass key_padding_mask"
                )
            if x.dim() not in (2, 3) or x.dim() != query.dim() or x.shape[-1] != width:
                raise ValueError(
                    f"llmops.nn.Attention: {name} must be [tokens, {width}] or with a batch, as "
                    f"query is; got shape {tuple(x.shape)} beside query {tuple(query.shape)}"
                )
        batch = 0 if self.batch_first else 1
        if key.shape[:-1] != value.shape[:-1] or (
            query.dim() == 3 and key.shape[batch] != query.shape[batch]
        ):
            raise ValueError(
                f"llmops.nn.Attention: query, key and value of shapes {tuple(query.shape)}, "
                f"{tuple(key.shape)}, {tuple(value.shape)} do not agree in batch or tokens "
                f"(batch_first={self.batch_first})"
            )
        return query.dim() == 3

    def _project(self, query: Tensor, key: Tensor, value: Tensor, batch_dim: int) -> list[Tensor]:
        """q, k and v as [B, heads, tokens, D]; inputs that are one tensor share one product."""
        counts = [self.num_heads, self.num_kv_heads, self.num_kv_heads]
        sizes = [count * self.head_dim for count in counts]
        bias, weight = self.in_proj_bias, self.in_proj_weight

        def product(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
            return llmops.linear(x, w, b, backend=self.backend)

        if weight is not None and query is key and key is value:
            parts = list(product(query, weight, bias).split(sizes, -1))
        else:
            if weight is not None:
                weights = weight.split(sizes)
            else:
                weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            biases = [None] * 3 if bias is None else bias.split(sizes)
            inputs = (query, key, value)
            parts = [product(*each) for each in zip(inputs, weights, biases, strict=True)]
        heads = []
        for part, count in zip(parts, counts, strict=True):
            part = part.unsqueeze(0) if part.dim() == 2 else part.transpose(0, batch_dim)
            heads.append(part.unflatten(-1, (count, self.head_dim)).transpose(1, 2))
        return heads

    def _mask(
        self,
        attn_mask: Tensor | None,
        padding: Tensor | None,
        causal: bool,
        q: Tensor,
        k: Tensor,
    ) -> tuple[Tensor | None, bool]:
        """The masks as llmops.attention takes them: bool, True keeps, or added; and whether the
        causal limit is left to it."""
        batch, heads, queries, keys = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
        parts = []
        if attn_mask is not None:
            shape: tuple[int, ...] = (queries, keys)
            if attn_mask.dim() == 3:
                shape = (batch * heads, queries, keys)
            self._check_mask("attn_mask", attn_mask, shape)
            split = attn_mask.dim() == 3
            parts.append(attn_mask.unflatten(0, (batch, heads)) if split else attn_mask)
        if padding is not None:
            given = padding.unsqueeze(0) if padding.dim() == 1 and batch == 1 else padding
            self._check_mask("key_padding_mask", given, (batch, keys))
            parts.append(given[:, None, None])
        extra = self.bias_k is not None or self.add_zero_attn
        if causal and (queries != keys or extra):  # aligned top-left, which attention's is not
            ones = torch.ones(queries, keys, dtype=torch.bool, device=q.device)
            parts.append(ones.triu(1))
            causal = False
        if not parts:
            return None, causal
        if all(part.dtype == torch.bool for part in parts):
            dropped = parts[0]
            for part in parts[1:]:
                dropped = dropped | part
            return ~dropped, causal
        added = [_additive(part, q.dtype) for part in parts]
        total = added[0]
        for part in added[1:]:
            total = total + part
        return total, causal

    @staticmethod
    def _check_mask(name: str, mask: Tensor, shape: tuple[int, ...]) -> None:
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise TypeError(
                f"llmops.nn.Attention: {name} must be bool (True drops) or floating-point (added); "
                f"got {mask.dtype}; convert it, e.g. {name}.bool()"
            )
        if tuple(mask.shape) != tuple(shape):
            raise ValueError(
                f"llmops.nn.Attention: {name} must have shape {tuple(shape)}; got "
                f"{tuple(mask.shape)}"
            )

    def _extra_keys(
        self, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor | None, bool]:
        """Appends the learned key and value and the zero ones; every query sees them."""
        batch, heads, _, dim = k.shape
        more: list[tuple[Tensor, Tensor]] = []
        if self.bias_k is not None and self.bias_v is not None:
            more.append((self.bias_k.view(1, heads, 1, dim), self.bias_v.view(1, heads, 1, dim)))
        if self.add_zero_attn:
            more.append((k.new_zeros(1, heads, 1, dim), v.new_zeros(1, heads, 1, dim)))
        for extra_k, extra_v in more:
            k = torch.cat((k, extra_k.to(k.dtype).expand(batch, -1, -1, -1)), 2)
            v = torch.cat((v, extra_v.to(v.dtype).expand(batch, -1, -1, -1)), 2)
            if mask is not None:
                mask = F.pad(mask, (0, 1), value=True if mask.dtype == torch.bool else 0.0)
        return k, v, mask, causal

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        causal: bool,
        dropout: float,
        need_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        if not need_weights and dropout == 0.0:
            out: Any = llmops.attention(q, k, v, causal=causal, mask=mask, backend=self.backend)
            return out, None
        # The weights themselves are asked for, or dropped from: all scores are held.
        group = self.num_heads // self.num_kv_heads
        if group > 1:
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = q @ k.transpose(-1, -2)
        scale = 1.0 / math.sqrt(self.head_dim)
        weights = llmops.softmax(
            scores, scale=scale, mask=mask, causal=causal, backend=self.backend
        )
        weights = F.dropout(weights, dropout)
        return weights @ v, weights if need_weights else None


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask, True drops, as -inf where it drops; a float one as it is."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, -math.inf)
