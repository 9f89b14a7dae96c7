"""The modules over rope, swiglu and embedding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import llmops
from llmops import nn


def test_embedding_module_replaces_torch() -> None:
    theirs = torch.nn.Embedding(11, 6, padding_idx=3)
    ours = nn.Embedding(11, 6, padding_idx=3)
    ours.load_state_dict(theirs.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    tokens = torch.randint(11, (2, 5))
    tokens[0, 0] = 3
    for module in (theirs, ours):
        module(tokens).square().sum().backward()
    assert torch.equal(ours(tokens), theirs(tokens))
    assert ours.weight.grad is not None and theirs.weight.grad is not None
    assert torch.allclose(ours.weight.grad, theirs.weight.grad)
    assert bool((ours.weight.grad[3] == 0).all())
    assert nn.Embedding.from_pretrained(theirs.weight.detach())(tokens).shape == (2, 5, 6)
    for argument in ({"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}):
        with pytest.raises(NotImplementedError, match=next(iter(argument))):
            nn.Embedding(4, 2, **argument)


def test_swiglu_module() -> None:
    gate, up = torch.randn(3, 8), torch.randn(3, 8)
    module = nn.SwiGLU()
    assert not module.state_dict()
    want = F.silu(gate) * up
    assert torch.allclose(module(gate, up), want, atol=1e-6)
    assert torch.allclose(module(torch.cat((gate, up), -1)), want, atol=1e-6)


def test_rotary_embedding_module_keeps_fp32_tables() -> None:
    module = nn.RotaryEmbedding(16, 32, base=500.0, scaling={"type": "linear", "factor": 2.0})
    assert not module.state_dict()
    q, k, ids = torch.randn(2, 4, 3, 20), torch.randn(2, 1, 3, 20), torch.tensor([4, 9, 31])
    tables = llmops.rope_tables(32, 16, base=500.0, scaling={"type": "linear", "factor": 2.0})
    want = llmops.rope_qk(q, k, *tables, ids, backend="reference")
    got = module(q, k, ids)
    assert torch.allclose(got[0], want[0], atol=1e-6) and torch.allclose(got[1], want[1], atol=1e-6)
    for converted in (module.bfloat16(), module.to(torch.float16), module.double()):
        assert converted.cos.dtype == torch.float32
        assert torch.equal(converted.cos, tables[0]) and torch.equal(converted.sin, tables[1])
    assert module.to("meta").cos.is_meta
    with pytest.raises(IndexError, match="position_ids holds 32"):
        nn.RotaryEmbedding(16, 32)(q, k, torch.tensor([0, 1, 32]))
