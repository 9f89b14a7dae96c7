"""KVCache: keys and values of the tokens so far, in the layout that is fastest here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llmops.ops.attention_kvcache import attention_kvcache
from llmops.ops.kv_cache_append_ import kv_cache_append_


class KVCache:
    """The key-value cache of all layers of a model, allocated once.

    A step of T tokens: `extend(T)`, then in each layer `attend(q, k, v, layer)`, which appends k
    and v to that layer's cache and attends to all it holds, causally.

    >>> cache = llmops.KVCache(batch, kv_heads, length, head_dim, layers=12)
    >>> cache.extend(x.shape[1])
    >>> y = cache.attend(q, k, v, layer=0)  # [B, Hq, T, Dv]

    Each layer's cache is [B, Hkv, Tmax, D] with the tokens of a head side by side: a decode step
    then reads each head's keys, and its values, in one run of memory. Rows that hold no token are
    never read, so nothing is cleared.

    Args:
        batch, kv_heads, head_dim: B, Hkv and D of the keys.
        length: Tmax, the tokens that each sequence can hold.
        value_dim: Dv; head_dim when None.
        layers: L.
        dtype, device: of the keys and values; torch's defaults when None.

    Attributes:
        lengths: [B] int64, the rows that each sequence holds, those of the last `extend` included.
        longest: the largest of them.
        leftpad: [B] int64, where each sequence begins, or None: see `pad_left`.
        equal: whether all sequences hold the same rows, from row 0 on.
    """

    def __init__(
        self,
        batch: int,
        kv_heads: int,
        length: int,
        head_dim: int,
        *,
        value_dim: int | None = None,
        layers: int = 1,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        sizes = {"batch": batch, "kv_heads": kv_heads, "length": length, "head_dim": head_dim}
        for name, size in {**sizes, "layers": layers}.items():
            if size < 0:
                raise ValueError(f"KVCache: {name} must be >= 0; got {size}")
        shape = (layers, batch, kv_heads, length)
        value_dim = head_dim if value_dim is None else value_dim
        # unbind makes the views of all layers once; slicing per layer would show in decode.
        self.keys, self.values = (
            torch.empty(*shape, dim, dtype=dtype, device=device).unbind(0)
            for dim in (head_dim, value_dim)
        )
        self.capacity = length
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self._before = self.lengths  # of the last extend
        self._tokens = 0  # that it made room for
        self.longest, self.equal = 0, True
        self.leftpad: Tensor | None = None

    def reset(self, sequences: Sequence[int] | Tensor | None = None) -> None:
        """Forgets all sequences, or those of the given indices, which then begin anew."""
        if sequences is None:
            self.lengths, self.leftpad = torch.zeros_like(self.lengths), None
            self.longest, self.equal = 0, True
        else:
            index = torch.as_tensor(sequences, device=self.lengths.device)
            self.lengths = self.lengths.index_fill(0, index, 0)
            if self.leftpad is not None:
                self.leftpad = self.leftpad.index_fill(0, index, 0)
            self.longest = int(self.lengths.max()) if len(self.lengths) else 0
            self.equal = False
        self._before, self._tokens = self.lengths, 0

    def pad_left(self, pads: Tensor) -> None:
        """Prompts of unequal lengths stand with pads on their left, so that every newest token is
        in the last column; `pads` [B] int64 counts them. Attention then begins behind them."""
        self.leftpad, self.equal = pads, False

    def extend(self, tokens: int) -> None:
        """Makes room for T more tokens of each sequence, in every layer."""
        if tokens < 0 or self.longest + tokens > self.capacity:
            raise ValueError(
                f"KVCache: it holds {self.longest} of {self.capacity} tokens, {tokens} more do not "
                "fit; allocate it longer"
            )
        self._before, self._tokens = self.lengths, tokens
        self.lengths = self.lengths + tokens
        self.longest += tokens

    def append(self, k: Tensor, v: Tensor, layer: int = 0, *, backend: str | None = None) -> None:
        """Writes k [B, Hkv, T, D] and v [B, Hkv, T, Dv], T as in the last `extend`."""
        if k.shape[2] != self._tokens:
            raise ValueError(
                f"KVCache: k holds {k.shape[2]} tokens, but extend() made room for {self._tokens}; "
                f"call extend({k.shape[2]}) once per step, before the layers"
            )
        keys, values = self.keys[layer], self.values[layer]
        kv_cache_append_(keys, values, k, v, self._before, backend=backend)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: int = 0,
        *,
        backend: str | None = None,
        **arguments: Any,
    ) -> Any:
        """Appends k and v, then attends: query t of the new tokens sees every row up to its own.

        Args:
            q: [B, Hq, T, D]; k, v as in `append`.
            layer: whose cache.
            backend, **arguments: as `llmops.attention_kvcache`: scale, window, alibi_slopes,
                softcap, sinks, return_lse.

        Returns:
            As `llmops.attention_kvcache`, [B, Hq, T, Dv].
        """
        self.append(k, v, layer, backend=backend)
        return attention_kvcache(
            q,
            self.keys[layer],
            self.values[layer],
            self.lengths,
            cache_leftpad=self.leftpad,
            causal=True,
            backend=backend,
            **arguments,
        )
