"""embedding: the conformance kit, and what is particular to it."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

import llmops
from llmops import reference
from llmops.testing import Make, Target, assert_close, suite, targets
from llmops.testing.specs.embedding import SPEC, torch_embedding

globals().update(suite(SPEC))

TARGETS = pytest.mark.parametrize("target", targets("embedding"), ids=str)


@TARGETS
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_embedding_hypothesis(target: Target, data: st.DataObject) -> None:
    """Shapes, strides, id types and positions at random, forward and backward."""
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    rows, dim = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 80))
    dtype = data.draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16)))
    ids = data.draw(st.sampled_from((torch.int64, torch.int32)))
    make = Make(dtype, target.device, seed=data.draw(st.integers(0, 1000)))
    tokens = make.ints(*shape, high=rows, dtype=ids)
    order = data.draw(st.permutations(range(len(shape))))
    tokens = tokens.permute(*order)
    weight = make(rows, dim + 2, grad=False)[:, : dim + 2 - data.draw(st.integers(0, 2))]
    weight = weight.requires_grad_()
    arguments = {}
    if data.draw(st.booleans()):
        arguments["position_weight"] = make(tokens.shape[-1] + 1, weight.shape[1])
        if data.draw(st.booleans()):
            wanted = [data.draw(st.sampled_from((1, s))) for s in tokens.shape]
            arguments["positions"] = make.ints(*wanted, high=tokens.shape[-1] + 1, dtype=ids)
    if data.draw(st.booleans()):
        arguments["padding_idx"] = data.draw(st.integers(-rows, rows - 1))
    with target.active():
        got = llmops.embedding(tokens, weight, backend=target.backend, **arguments)
        cotangent = make(*got.shape, grad=False)
        (grad,) = torch.autograd.grad(got, weight, cotangent)
    wide = weight.detach().double().requires_grad_()
    wide_arguments = {k: v.double() if k == "position_weight" else v for k, v in arguments.items()}
    oracle = reference.embedding(tokens, wide, **wide_arguments)
    yardstick = torch_embedding(tokens, weight, **arguments)
    assert_close(got, oracle, yardstick, factor=2.0, what="embedding")
    (want,) = torch.autograd.grad(oracle, wide, cotangent.double())
    (theirs,) = torch.autograd.grad(yardstick, weight, cotangent)
    assert_close(grad, want, theirs, factor=3.0, what="embedding gradient")


@TARGETS
def test_embedding_lookup_is_exact(target: Target) -> None:
    tokens, weight = torch.randint(100, (7, 5)), torch.randn(100, 37)
    with target.active():
        assert torch.equal(
            llmops.embedding(tokens, weight, backend=target.backend), F.embedding(tokens, weight)
        )


@TARGETS
def test_embedding_padding_row_gets_zero(target: Target) -> None:
    weight = torch.randn(5, 8, requires_grad=True)
    tokens = torch.tensor([[0, 3, 3, 1]])
    with target.active():
        y = llmops.embedding(tokens, weight, padding_idx=3, backend=target.backend)
        y.sum().backward()
    assert torch.equal(y[0, 1], weight[3])
    assert weight.grad is not None
    assert weight.grad.sum(1).tolist() == [8.0, 8.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("backend", ("cpu", "reference"))
def test_embedding_rejects_ids_outside_the_table(backend: str) -> None:
    weight, positions = torch.randn(5, 4), torch.randn(3, 4)
    for bad in (-1, 5, 2**40):
        with pytest.raises(
            IndexError, match=rf"tokens holds {bad}, but weight has 5 rows \(0 to 4"
        ):
            llmops.embedding(torch.tensor([[1, bad]]), weight, backend=backend)
    with pytest.raises(IndexError, match="positions holds 3, but position_weight has 3 rows"):
        llmops.embedding(
            torch.zeros(2, dtype=torch.int64),
            weight,
            positions=torch.tensor([0, 3]),
            position_weight=positions,
            backend=backend,
        )
    with pytest.raises(IndexError, match="4 tokens, but position_weight has 3 rows"):
        llmops.embedding(
            torch.zeros(1, 4, dtype=torch.int64), weight, position_weight=positions, backend=backend
        )
    with pytest.raises(IndexError, match="ids holds 5"):
        torch.ops.llmops_cpu.embedding_bwd(torch.randn(1, 4), torch.tensor([5]), 5, -1)


def test_embedding_rejects_bad_input() -> None:
    weight, tokens = torch.randn(5, 4), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(
        TypeError, match=r"tokens must be an int64 or int32 Tensor; got dtype float"
    ):
        llmops.embedding(torch.zeros(2), weight)
    with pytest.raises(TypeError, match="weight has dtype int64"):
        llmops.embedding(tokens, weight.long())
    with pytest.raises(ValueError, match=r"weight must be \[rows, D\]; got shape \(4,\)"):
        llmops.embedding(tokens, weight[0])
    with pytest.raises(ValueError, match=r"padding_idx must be in \[-5, 4\], weight's rows; got 5"):
        llmops.embedding(tokens, weight, padding_idx=5)
    with pytest.raises(ValueError, match="positions need a position_weight"):
        llmops.embedding(tokens, weight, positions=tokens)
    with pytest.raises(ValueError, match=r"position_weight must be \[P, 4\] of float32"):
        llmops.embedding(tokens, weight, position_weight=torch.randn(9, 5))
    with pytest.raises(ValueError, match="positions of shape.*do not broadcast"):
        llmops.embedding(tokens, weight, positions=tokens[:, :2], position_weight=torch.randn(9, 4))
    with pytest.raises(NotImplementedError, match="float64"):
        llmops.embedding(tokens, weight.double(), backend="cpu")
