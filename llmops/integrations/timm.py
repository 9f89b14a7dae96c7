"""timm: the modules that it writes itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

import llmops
from llmops.integrations.patch._rules import LayerNorm, Rule, served
from llmops.integrations.patch._swap import Replaced


class Attention(Replaced):
    forward: Any

    def forward(  # type: ignore[no-redef]
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        m: Any = self
        # The form that holds all scores is asked for where they are looked at.
        if not (served(x) and m.fused_attn):
            return super().forward(x, attn_mask, is_causal)  # type: ignore[misc]
        batch, tokens, _ = x.shape
        gate = getattr(m, "gate", None)
        factor = None if gate is None else gate(x).sigmoid()
        qkv = m.qkv(x).unflatten(-1, (3, m.num_heads, m.head_dim)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        out = llmops.scaled_dot_product_attention(
            m.q_norm(q),
            m.k_norm(k),
            v,
            attn_mask=attn_mask,
            dropout_p=m.attn_drop.p if m.training else 0.0,
            is_causal=is_causal,
        )
        y = m.norm(out.transpose(1, 2).reshape(batch, tokens, m.attn_dim))
        if factor is not None:
            y = y * factor
        return m.proj_drop(m.proj(y))


def _norm_unless(module: Any) -> str | None:
    return "timm's fast norm was asked for" if module._fast_norm else None


def rules() -> Iterator[Rule]:
    import timm.layers

    yield Rule(timm.layers.LayerNorm, "layer_norm", LayerNorm, _norm_unless)
    yield Rule(timm.layers.Attention, "attention", Attention, _attention_unless)


def _attention_unless(module: Any) -> str | None:
    from llmops.integrations.patch._behaviour import _changed

    expected = ("qkv", "q_norm", "k_norm", "attn_drop", "norm", "proj", "proj_drop", "attn_dim")
    if all(hasattr(module, name) for name in expected):
        return None if module.fused_attn else "it is set to hold all scores (fused_attn=False)"
    return _changed(module, "the attention that this was written for")
