"""transformers' attention interface, argument by argument: served, or refused aloud."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from patch_kit import BY_NAME, distance, inputs
from torch import Tensor, nn

import llmops
from llmops.integrations.transformers.attention import attention

B, H, HKV, T, D = 2, 4, 2, 9, 8


def layer(causal: bool = True) -> nn.Module:
    made = nn.Module()
    made.is_causal = causal
    return made


def qkv(tq: int = T, tk: int = T, batch: int = B) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return (
        torch.randn(batch, H, tq, D),
        torch.randn(batch, HKV, tk, D),
        torch.randn(batch, HKV, tk, D),
    )


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, **given: Any) -> Tensor:
    """In fp64, mask bool or added, [B, Tq, H, D]."""
    q, k, v = q.double(), *(x.double().repeat_interleave(H // HKV, 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * (given.get("scale") or D**-0.5)
    if cap := given.get("softcap"):
        scores = cap * torch.tanh(scores / cap)
    if mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    else:
        scores = scores + mask
    if (sinks := given.get("sinks")) is not None:
        sinks = sinks.double().view(1, H, 1, 1).expand(*scores.shape[:3], 1)
        return ((torch.cat((scores, sinks), -1)).softmax(-1)[..., :-1] @ v).transpose(1, 2)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def seen(tq: int = T, tk: int = T) -> Tensor:
    return torch.ones(tq, tk, dtype=torch.bool)


def band(window: int) -> Tensor:
    return seen().tril() & seen().triu(1 - window)


BIAS = torch.linspace(-1, 1, H * T * T).view(1, H, T, T)
LOWEST = torch.finfo(torch.float32).min
CASES: dict[str, tuple[dict[str, Any], Tensor, dict[str, Any]]] = {
    "causal": ({}, seen().tril(), {}),
    "is_causal=False": ({"is_causal": False}, seen(), {}),
    "scaling": ({"scaling": 0.7}, seen().tril(), {"scale": 0.7}),
    "softcap": ({"softcap": 0.5}, seen().tril(), {"softcap": 0.5}),
    "sinks": ({"s_aux": torch.arange(4.0)}, seen().tril(), {"sinks": torch.arange(4.0)}),
    "sliding_window": ({"sliding_window": 3}, band(3), {}),
    "bool mask": ({"attention_mask": band(4)[None, None]}, band(4), {}),
    "mask and window": ({"attention_mask": band(4)[None, None], "sliding_window": 2}, band(4), {}),
    "longer mask": ({"attention_mask": torch.nn.functional.pad(band(4), (0, 3))[None, None]},
                    band(4), {}),
    "added mask": ({"attention_mask": torch.where(band(4), 0.0, LOWEST)[None, None]}, band(4), {}),
    "position_bias": ({"position_bias": BIAS},
                      torch.where(seen().tril(), BIAS, -torch.inf), {}),
    "position_bias, mask": ({"position_bias": BIAS, "attention_mask": band(4)[None, None]},
                            torch.where(band(4), BIAS, -torch.inf), {}),
    "position_bias, added mask": (
        {"position_bias": BIAS, "attention_mask": torch.where(band(4), 0.0, LOWEST)[None, None]},
        torch.where(band(4), BIAS, -torch.inf), {}),
    "not for attention": ({"position_ids": torch.arange(T)[None], "use_cache": True}, seen().tril(),
                          {}),
}  # fmt: skip


@pytest.mark.parametrize("weights", [False, True], ids=["kernel", "all scores"])
@pytest.mark.parametrize("name", CASES)
def test_transformers_attention_serves(name: str, weights: bool) -> None:
    given, mask, more = CASES[name]
    q, k, v = qkv()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", llmops.FallbackWarning)
        out, scores = attention(layer(), q, k, v, output_attentions=weights, **given)
    assert out.shape == (B, T, H, D) and out.is_contiguous()
    assert distance(out, plain(q, k, v, mask, **more)) < 1e-5
    assert (scores is not None) == weights
    if scores is not None:
        total = torch.einsum("bhqk,bhkd->bqhd", scores, v.repeat_interleave(H // HKV, 1))
        assert distance(total, out) < 1e-5


def test_transformers_attention_position_bias_takes_a_gradient() -> None:
    q, k, v = qkv()
    bias = BIAS.clone().requires_grad_()
    mask = band(4)
    out, _ = attention(layer(), q, k, v, mask[None, None], position_bias=bias)
    (got,) = torch.autograd.grad(out.square().sum(), bias)
    exact = BIAS.double().requires_grad_()
    expected = plain(q, k, v, torch.where(mask, exact, -torch.inf)).square().sum()
    assert distance(got, torch.autograd.grad(expected, exact)[0]) < 1e-5


def test_transformers_attention_alignment_is_sdpas() -> None:
    """Without a mask: several queries beside a longer cache are its first tokens; one sees all."""
    q, k, v = qkv(4, T)
    out, _ = attention(layer(), q, k, v)
    assert distance(out, plain(q, k, v, seen(4, T).tril())) < 1e-5
    q, k, v = qkv(1, T)
    out, _ = attention(layer(), q, k, v)
    assert distance(out, plain(q, k, v, seen(1, T))) < 1e-5
    out, _ = attention(layer(), q, k, v, sliding_window=3)
    assert distance(out, plain(q, k, v, seen(1, T).triu(T - 3))) < 1e-5
    q, k, v = qkv(4, T)
    out, _ = attention(layer(causal=False), q, k, v)
    assert distance(out, plain(q, k, v, seen(4, T))) < 1e-5
    out, _ = attention(layer(causal=False), q[:1], k, v)
    assert distance(out, plain(q[:1].expand(2, -1, -1, -1), k, v, seen(4, T))) < 1e-5


@pytest.mark.parametrize("form", ["alone", "window", "mask", "weights"])
def test_transformers_attention_packed_sequences(form: str) -> None:
    q, k, v = qkv(batch=1)
    cu = torch.tensor([0, 4, 9], dtype=torch.int32)
    of = torch.tensor([0] * 4 + [1] * 5)
    mask = seen().tril() & (of[:, None] == of)
    more: dict[str, Any] = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 5}
    if form == "window":
        mask = mask & band(2)
        more["sliding_window"] = 2
    elif form == "mask":  # one of the model's own, which knows of no sequences
        more["attention_mask"] = band(3)[None, None]
        mask = mask & band(3)
    elif form == "weights":
        more["output_attentions"] = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", llmops.FallbackWarning)
        out, _ = attention(layer(), q, k, v, **more)
    assert distance(out, plain(q, k, v, mask)) < 1e-5


def test_transformers_attention_refuses() -> None:
    q, k, v = qkv()
    with pytest.raises(NotImplementedError, match="passes temperature, which it has no form for"):
        attention(layer(), q, k, v, temperature=2.0)
    attention(layer(), q, k, v, temperature=None)
    with pytest.raises(ValueError, match=r"shape \(2, 9\); \[batch, heads or 1, queries, keys\]"):
        attention(layer(), q, k, v, torch.ones(2, 9, dtype=torch.bool))
    cu = torch.tensor([0, 9])
    with pytest.raises(ValueError, match="with a batch of 1"):
        attention(layer(), q, k, v, cu_seq_lens_q=cu, cu_seq_lens_k=cu)
    with pytest.raises(NotImplementedError, match="sliding_window=3 in attention that is not"):
        attention(layer(False), q, k, v, sliding_window=3)


def test_transformers_attention_weights_come_aloud() -> None:
    q, k, v = qkv()
    factor = torch.tensor([1.0, 0.0, 2.0, 1.0]).view(1, H, 1, 1)
    with pytest.warns(llmops.FallbackWarning, match="holds all scores"):
        out, weights = attention(layer(), q, k, v, head_mask=factor)
    assert weights is not None
    expected = plain(q, k, v, seen().tril()) * factor.view(1, 1, H, 1)
    assert distance(out, expected) < 1e-5


def test_transformers_attention_dropout() -> None:
    q, k, v = qkv()
    ones = torch.ones_like(v)
    torch.manual_seed(0)
    out = torch.stack([attention(layer(), q, k, ones, dropout=0.25)[0] for _ in range(200)])
    assert not torch.equal(out[0], out[1])
    assert (out.mean(0) - 1).abs().max() < 0.25  # unbiased


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_transformers_packed_by_positions(name: str) -> None:
    """Two sequences in one row, told apart by position_ids: as each alone."""
    family = BY_NAME[name]
    model = family.build()
    llmops.patch(model)
    ids = inputs(family, None)["input_ids"][:1]
    positions = torch.tensor([[*range(4), *range(7)]])
    with torch.no_grad():
        packed = model(ids, position_ids=positions, use_cache=False).logits
        apart = [model(part, use_cache=False).logits for part in (ids[:, :4], ids[:, 4:])]
    assert distance(packed, torch.cat(apart, 1)) < 1e-5
