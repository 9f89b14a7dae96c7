"""The modules Attention, Linear, Softmax and GELU beside the torch modules they replace."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import llmops
from llmops import nn

E, H = 24, 4


def pair(**settings: Any) -> tuple[torch.nn.MultiheadAttention, nn.Attention]:
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(E, H, **settings)
    for parameter in theirs.parameters():  # biases start at zero, which would hide them
        torch.nn.init.normal_(parameter, std=0.3)
    ours = nn.Attention(E, H, **settings)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def gradients(module: torch.nn.Module, out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    weighted = out * torch.linspace(-1, 1, out.numel()).view(out.shape)
    return list(torch.autograd.grad(weighted.sum(), [*inputs, *module.parameters()]))


def same(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def masks(kind: str, batch: int, queries: int, keys: int) -> dict[str, Tensor]:
    """In torch's convention, True drops; the first key always stays."""
    rng = torch.Generator().manual_seed(1)

    def drop(*shape: int) -> Tensor:
        dropped = torch.rand(shape, generator=rng) < 0.4
        dropped[..., 0] = False
        return dropped

    found: dict[str, Tensor] = {}
    if "bool" in kind:
        found["attn_mask"] = drop(queries, keys)
    if "heads" in kind:
        found["attn_mask"] = drop(batch * H, queries, keys)
    if "float" in kind:
        found["attn_mask"] = torch.randn(queries, keys, generator=rng)
    if "padding" in kind:
        found["key_padding_mask"] = drop(batch, keys)
    if "added" in kind:
        found["key_padding_mask"] = torch.randn(batch, keys, generator=rng)
    return found


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch-first": {"batch_first": True},
    "no-bias": {"bias": False},
    "bias-kv": {"add_bias_kv": True},
    "zero-attn": {"add_zero_attn": True},
    "both-extra": {"add_bias_kv": True, "add_zero_attn": True},
    "kdim-vdim": {"kdim": 10, "vdim": 12},
}
MASKS = ("none", "bool", "heads", "float", "padding", "bool-padding", "float-added")


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_attention_module_matches_torch(setting: str, mask: str) -> None:
    """Outputs, weights and the gradients of inputs and parameters; cross-attention."""
    theirs, ours = pair(**SETTINGS[setting])
    batch, queries, keys = 2, 5, 7
    first = theirs.batch_first

    def make(tokens: int, width: int) -> Tensor:
        shape = (batch, tokens, width) if first else (tokens, batch, width)
        return torch.randn(shape, requires_grad=True)

    inputs = [make(queries, E), make(keys, theirs.kdim), make(keys, theirs.vdim)]
    given = masks(mask, batch, queries, keys)
    want, want_weights = theirs(*inputs, **given, average_attn_weights=False)
    got, weights = ours(*inputs, **given, average_attn_weights=False)
    same(got, want)
    same(weights, want_weights)
    same(gradients(ours, got, inputs), gradients(theirs, want, inputs))
    want, want_weights = theirs(*inputs, **given)
    same(ours(*inputs, **given)[1], want_weights)
    got, weights = ours(*inputs, **given, need_weights=False)
    assert weights is None
    same(got, want)
    same(gradients(ours, got, inputs), gradients(theirs, want, inputs))


@pytest.mark.parametrize("batch_first", (False, True))
@pytest.mark.parametrize("need_weights", (False, True))
def test_attention_module_self_causal_and_unbatched(need_weights: bool, batch_first: bool) -> None:
    theirs, ours = pair(batch_first=batch_first)
    theirs, ours = theirs.eval(), ours.eval()
    limit = torch.nn.Transformer.generate_square_subsequent_mask(6)
    for shape in ((6, 6, E), (6, E)):
        x = torch.randn(shape)
        kwargs = {"need_weights": need_weights}
        want = theirs(x, x, x, attn_mask=limit, is_causal=True, **kwargs)
        for extra in ({}, {"attn_mask": limit}, {"attn_mask": limit.isinf()}):
            got = ours(x, is_causal=True, **extra, **kwargs)
            same(got, want)
            same(ours(x, x, x, is_causal=True, **extra, **kwargs), want)
    memory = torch.randn(9, E)  # key and value one tensor, query another; top-left limit
    want = theirs(x, memory, memory, attn_mask=torch.ones(6, 9).triu(1).bool(), **kwargs)
    same(ours(x, memory, is_causal=True, **kwargs), want)


def test_attention_module_dropout_as_torch() -> None:
    theirs, ours = pair(dropout=0.5)
    x = torch.randn(6, 2, E)
    for need_weights in (True, False):
        torch.manual_seed(3)
        first = ours(x, need_weights=need_weights)[0]
        torch.manual_seed(3)
        assert torch.equal(first, ours(x, need_weights=need_weights)[0])
        assert not torch.equal(first, ours(x, need_weights=need_weights)[0])
    dropped = (ours(x, average_attn_weights=False)[1] == 0).float().mean().item()
    assert 0.3 < dropped < 0.7
    mean = torch.stack([ours(x, need_weights=False)[0] for _ in range(3000)]).mean(0)
    same(ours.eval()(x)[0], theirs.eval()(x, x, x)[0])
    # 3000 draws of deviation about 1: the mean is within 5 / sqrt(3000).
    assert (mean - ours(x)[0]).abs().max() < 0.1 * ours(x)[0].abs().max() + 0.1


def test_attention_module_masked_rows_are_zero() -> None:
    _, ours = pair()
    x = torch.randn(5, 2, E, requires_grad=True)
    everything = torch.ones(2, 5, dtype=torch.bool)
    for need_weights in (True, False):
        out = ours(x, key_padding_mask=everything, need_weights=need_weights)[0]
        same(out, ours.out_proj.bias.expand(5, 2, E))
        assert bool((torch.autograd.grad(out.sum(), x)[0] == 0).all())


@pytest.mark.parametrize("need_weights", (False, True))
def test_attention_module_grouped_heads_and_rotary(need_weights: bool) -> None:
    """Against the same model with its key and value heads written out, and rope by hand."""
    torch.manual_seed(0)
    D, kv = E // H, 2
    rotary = nn.RotaryEmbedding(D, 16)
    ours = nn.Attention(E, H, num_kv_heads=kv, rotary=rotary, batch_first=True)
    torch.nn.init.normal_(ours.in_proj_bias)
    assert ours.in_proj_weight.shape == (E + 2 * kv * D, E)
    assert set(ours.state_dict()) == {
        "in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias",
    }  # fmt: skip
    x, ids = torch.randn(2, 7, E), torch.tensor([3, 4, 5, 6, 7, 8, 9])
    q, k, v = F.linear(x, ours.in_proj_weight, ours.in_proj_bias).split((E, kv * D, kv * D), -1)
    q, k, v = (t.unflatten(-1, (-1, D)).transpose(1, 2) for t in (q, k, v))
    q, k = llmops.rope_qk(q, k, rotary.cos, rotary.sin, ids, backend="reference")
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    want = ours.out_proj(out.transpose(1, 2).flatten(2))
    same(ours(x, is_causal=True, position_ids=ids, need_weights=need_weights)[0], want)


def test_attention_module_low_precision_and_autocast() -> None:
    theirs, ours = pair(batch_first=True)
    x = torch.randn(2, 40, E)
    want = theirs(x, x, x)[0]
    for dtype in (torch.bfloat16, torch.float16):
        got = ours.to(dtype)(x.to(dtype), need_weights=False)[0]
        assert got.dtype == dtype
        assert (got.float() - want).norm() < 0.02 * want.norm()
    ours.float()
    ours.load_state_dict(theirs.state_dict())
    for need_weights in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = ours(x, need_weights=need_weights)[0]
        assert got.dtype == torch.bfloat16
        assert (got.float() - want).norm() < 0.02 * want.norm()


def test_attention_module_compiles() -> None:
    _, ours = pair(batch_first=True)
    x = torch.randn(2, 5, E)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    same(
        compiled(x, is_causal=True, need_weights=False), ours(x, is_causal=True, need_weights=False)
    )


def test_attention_module_rejects() -> None:
    _, ours = pair()
    x = torch.randn(5, 2, E)
    nested = torch.nested.nested_tensor([torch.randn(2, E)], layout=torch.jagged)
    for arguments, error, match in (
        ({"query": torch.randn(5, 2, E + 1)}, ValueError, r"query must be \[tokens, 24\]"),
        ({"query": x, "key": torch.randn(5, E)}, ValueError, "key must be"),
        ({"query": x, "key": torch.randn(5, 3, E)}, ValueError, r"do not agree in batch"),
        ({"query": nested}, TypeError, "query must be a dense Tensor; got a nested one"),
        ({"query": x, "attn_mask": torch.ones(5, 5).long()}, TypeError, "attn_mask must be bool"),
        ({"query": x, "attn_mask": torch.ones(4, 5)}, ValueError, r"attn_mask must .*\(5, 5\)"),
        ({"query": x, "key_padding_mask": torch.ones(5, 2)}, ValueError, r"key_padding_mask must"),
        ({"query": x, "position_ids": torch.arange(5)}, ValueError, "position_ids need rotary"),
    ):
        with pytest.raises(error, match=match):
            ours(**arguments)
    with pytest.raises(ValueError, match="num_kv_heads must divide num_heads=4; got 3"):
        nn.Attention(E, H, num_kv_heads=3)
    for extra in ({"kdim": 3}, {"add_bias_kv": True}, {"add_zero_attn": True}):
        with pytest.raises(NotImplementedError, match="does not go together with kdim"):
            nn.Attention(E, H, num_kv_heads=2, **extra)


def test_simple_modules_replace_torch() -> None:
    x = torch.randn(3, 5, 24, requires_grad=True)
    for theirs, ours in (
        (torch.nn.Linear(24, 7), nn.Linear(24, 7)),
        (torch.nn.Linear(24, 7, bias=False), nn.Linear(24, 7, bias=False)),
        (torch.nn.GELU(), nn.GELU()),
        (torch.nn.GELU("tanh"), nn.GELU("tanh")),
        (torch.nn.Softmax(dim=1), nn.Softmax(dim=1)),
        (torch.nn.Softmax(-1), nn.Softmax(-1)),
    ):
        assert repr(ours) == repr(theirs)
        ours.load_state_dict(theirs.state_dict())
        for mode, grad in itertools.product((True, False), repeat=2):
            given = x[0, :1] if grad and isinstance(ours, nn.Linear) else x
            want, got = theirs.train(mode)(given), ours.train(mode)(given)
            same(got, want)
            same(gradients(ours, got, [x]), gradients(theirs, want, [x]))
    with pytest.raises(ValueError, match="name the dimension"):
        nn.Softmax()
