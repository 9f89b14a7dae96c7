"""Modules of transformers that the rules by behaviour do not cover."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import llmops
from llmops.backends import get
from llmops.integrations.patch import _swap
from llmops.integrations.patch._rules import Rule, served
from llmops.integrations.patch._swap import Replaced
from llmops.integrations.transformers.attention import _weights_wanted


class BloomAttention(Replaced):
    """BLOOM's layer, whose forward does not go by the attention interface: its ALiBi is a bias per
    head and key, added as a mask that is never expanded over the queries."""

    forward: Any

    def forward(  # type: ignore[no-redef]
        self,
        hidden_states: Tensor,
        residual: Tensor,
        alibi: Tensor,
        attention_mask: Tensor | None,
        layer_past: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        m: Any = self
        batch, queries, _ = hidden_states.shape
        split = m.pretraining_tp > 1 and m.slow_but_exact
        if not served(hidden_states) or split or _weights_wanted(m, output_attentions, None):
            mask = _to_add(attention_mask, hidden_states, layer_past, m.layer_idx)
            return super().forward(  # type: ignore[misc]
                hidden_states, residual, alibi, mask, layer_past=layer_past, use_cache=use_cache,
                output_attentions=output_attentions, **kwargs,
            )  # fmt: skip
        q, k, v = m._reshape(m.query_key_value(hidden_states))
        if layer_past is not None:
            k, v = layer_past.update(k, v, m.layer_idx)
        causal = attention_mask is None and queries > 1
        bias = alibi.view(batch, m.num_heads, 1, -1)
        if causal and k.shape[2] > queries:  # an empty static cache
            k, v, bias = k[:, :, :queries], v[:, :, :queries], bias[..., :queries]
        if attention_mask is not None and attention_mask.dtype == torch.bool:
            bias = torch.where(attention_mask, bias, torch.finfo(bias.dtype).min)
        elif attention_mask is not None:
            bias = bias + attention_mask
        out: Any = llmops.attention(
            q,
            k,
            v,
            causal=causal,
            mask=bias,
            scale=m.inv_norm_factor,
            dropout_p=m.attention_dropout.p if m.training else 0.0,
        )
        y = m.dense(out.transpose(1, 2).reshape(batch, queries, -1))
        return F.dropout(y, m.hidden_dropout, m.training) + residual, None


class Conv1D(Replaced):
    """GPT-2's projections, whose weight [in, out] lies transposed: in fp32 by `llmops.linear`. In
    16 bits where the processor has no such products, for which torch's own takes fifty times as
    long as one in fp32."""

    weight: Tensor
    bias: Tensor
    forward: Any
    _llmops_own: tuple[torch.dtype, ...]  # dtypes that are not better left to torch

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[no-redef]
        weight = self.weight
        if not (x.is_cpu and x.dtype in self._llmops_own and weight.dtype == x.dtype) or (
            torch.is_autocast_enabled("cpu")
        ):
            return super().forward(x)  # type: ignore[misc]
        if x.dtype == torch.float32:
            return llmops.linear(x, weight.t(), self.bias)
        rows = x.reshape(-1, x.shape[-1]).float()
        y = torch.addmm(self.bias.float(), rows, weight.float()).to(x.dtype)
        return y.view(*x.shape[:-1], weight.shape[1])


def _to_add(mask: Tensor | None, x: Tensor, cache: Any, layer: Any) -> Tensor:
    """The mask that BLOOM's own forward adds."""
    if mask is not None and mask.dtype != torch.bool:
        return mask
    lowest = torch.finfo(x.dtype).min
    if mask is None:  # causal, with as many keys as the cache gives
        queries = x.shape[1]
        keys = queries
        if cache is not None:
            keys, _ = cache.get_mask_sizes(queries, layer)
        mask = torch.ones(queries, keys, dtype=torch.bool, device=x.device)
        if queries > 1:
            mask = mask.tril(0)
        mask = mask[None, None]
    return torch.zeros(mask.shape, dtype=x.dtype, device=x.device).masked_fill(~mask, lowest)


def rule(module: nn.Module) -> Rule | str | None:
    """As patch's own: a rule, a reason, or None."""
    bloom = sys.modules.get("transformers.models.bloom.modeling_bloom")
    if bloom is not None and isinstance(module, bloom.BloomAttention):
        cls = bloom.BloomAttention
        reason = _swap.why_not(module, cls) or _probed(cls)
        hides = ("attention_dropout",)
        return reason or Rule(cls, "attention", BloomAttention, hides=hides)
    name, home = type(module).__name__, type(module).__module__
    if home.startswith("transformers.") and name.endswith("RotaryEmbedding"):
        return "it makes tables; the rotation is a function in the model's file, out of reach"
    if name == "Conv1D" and home == "transformers.pytorch_utils":
        cpu = get("cpu")
        own: tuple[torch.dtype, ...] = ()
        if cpu.available() is None:
            own = tuple(d for d in cpu.DTYPES if cpu.own_products(d))
        if not own:
            return "its weight lies transposed, and torch's own product serves that"
        cls = type(module)
        names = ", ".join(str(d).removeprefix("torch.") for d in own)
        note = f"products of {names}; torch's own for others"
        state = {"_llmops_own": own}
        reason = _swap.why_not(module, cls)
        return reason or Rule(cls, "linear", Conv1D, note=note, state=state)
    return None


_bloom_reason: dict[type, str | None] = {}


def _probed(cls: Any) -> str | None:
    """Whether transformers' layer still computes what ours does, on one of two heads."""
    if cls not in _bloom_reason:
        _bloom_reason[cls] = _probe(cls)
    return _bloom_reason[cls]


def _probe(cls: Any) -> str | None:
    import transformers

    changed = f"BloomAttention of transformers {transformers.__version__} computes something else"
    with (
        torch.no_grad(),
        torch.random.fork_rng(devices=[]),
        torch.device("cpu"),
        torch.autocast("cpu", enabled=False),
        llmops.use_backend("reference"),
    ):
        try:
            config = transformers.BloomConfig(hidden_size=16, n_head=2, n_layer=1, vocab_size=8)
            layer = cls(config, layer_idx=0).float().eval()
            x, residual = (
                torch.randn(2, 5, 16, dtype=torch.float32),
                torch.randn(2, 5, 16, dtype=torch.float32),
            )
            alibi = torch.randn(4, 1, 5, dtype=torch.float32)
            keep = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
            lowest = torch.finfo(torch.float32).min
            added = torch.zeros(1, 1, 5, 5, dtype=torch.float32).masked_fill(~keep, lowest)
            expected = layer(x, residual, alibi, added)[0]
            _swap.swap(layer, BloomAttention)
            for mask in (added, keep, None):
                got = layer(x, residual, alibi, mask)[0]
                if not torch.allclose(got, expected, rtol=1e-4, atol=1e-5):
                    return changed
        except Exception as error:
            return f"{changed} ({type(error).__name__}: {error})"
    return None
