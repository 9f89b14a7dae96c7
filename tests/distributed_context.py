"""Checks in four processes: context-parallel attention, by two and by four (distributed_kit.py)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

import llmops
from llmops.distributed import (
    context_parallel,
    context_parallel_attention,
    sequence_positions,
    shard_sequence,
    unshard_sequence,
)


@functools.cache
def groups() -> tuple[Any, Any]:
    """A pair of ranks, twice, and all four."""
    pairs = init_device_mesh("cpu", (2, 2), mesh_dim_names=("other", "pair"))
    return pairs["pair"], None  # a DeviceMesh, and the default group


def qkv(dtype: torch.dtype, kv_heads: int, tokens: int = 24) -> list[Tensor]:
    """The same on every rank."""
    torch.manual_seed(3)
    shapes = ((2, 4, tokens, 8), (2, kv_heads, tokens, 8), (2, kv_heads, tokens, 6))
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]


def oracle(
    attend: Callable[..., Any], inputs: list[Tensor], grads: list[Tensor], causal: bool
) -> list[Tensor]:
    """out, lse and the gradients of q, k and v."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out, lse = attend(*leaves, causal=causal, return_lse=True)
    torch.autograd.backward(
        [out, lse], [g.to(y.dtype) for g, y in zip(grads, (out, lse), strict=True)]
    )
    return [out.detach(), lse.detach(), *(x.grad for x in leaves)]  # type: ignore[misc]


def errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [
        float((f.double() - e).abs().max() / e.abs().max())
        for f, e in zip(found, exact, strict=True)
    ]


def compare(dtype: torch.dtype, causal: bool, kv_heads: int) -> None:
    """Out, lse and gradients within twice (three times) the error of the same attention in one
    process, both against fp64."""
    for group in groups():
        inputs = qkv(dtype, kv_heads)
        torch.manual_seed(4)
        grads = [torch.randn(2, 4, 24, 6).to(dtype), torch.randn(2, 4, 24)]
        exact = oracle(
            functools.partial(llmops.attention, backend="reference"),
            [x.double() for x in inputs],
            [g.double() for g in grads],
            causal,
        )
        alone = errors(oracle(llmops.attention, inputs, grads, causal), exact)
        mine = [shard_sequence(x, 2, group=group, causal=causal) for x in (*inputs, *grads)]
        parallel = functools.partial(context_parallel_attention, group=group)
        parts = oracle(parallel, mine[:3], mine[3:], causal)
        assert parts[0].dtype == dtype and parts[1].dtype == torch.float32
        whole = [unshard_sequence(x, 2, group=group, causal=causal) for x in parts]
        for name, error, limit, allowed in zip(
            ("out", "lse", "dq", "dk", "dv"),
            errors(whole, exact),
            alone,
            (2, 2, 3, 3, 3),
            strict=True,
        ):
            floor = 2 * torch.finfo(torch.float32 if name == "lse" else dtype).eps
            assert error <= allowed * limit + floor, (name, error, limit)


def check_fp32_causal() -> None:
    compare(torch.float32, True, 4)


def check_fp32_all() -> None:
    compare(torch.float32, False, 4)


def check_bf16_causal_gqa() -> None:
    compare(torch.bfloat16, True, 2)


def check_bf16_all_mqa() -> None:
    compare(torch.bfloat16, False, 1)


def check_token_major() -> None:
    """[B, T, H, D] seen as [B, H, T, D] comes back as it lies, and cross-attention has its own
    number of keys."""
    q, k, v = qkv(torch.float32, 2)
    k, v = k[:, :, :16], v[:, :, :16]
    mine = [shard_sequence(x.transpose(1, 2), 1).transpose(1, 2) for x in (q, k, v)]
    out = context_parallel_attention(*mine)
    assert isinstance(out, Tensor) and out.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(unshard_sequence(out, 2), llmops.attention(q, k, v))


def check_messages() -> None:
    """ranks - 1 of K and V forward; backward as many, and ranks of dK and dV: no more than a ring
    needs, each of one rank's part."""
    sent: list[tuple[int, torch.dtype]] = []
    send = context_parallel._Ring.send_on

    def counted(ring: Any, buffer: Tensor) -> Any:
        sent.append((buffer.numel(), buffer.dtype))
        return send(ring, buffer)

    context_parallel._Ring.send_on = counted  # type: ignore[method-assign]
    try:
        for group, ranks in zip(groups(), (2, 4), strict=True):
            inputs = qkv(torch.bfloat16, 2)
            mine = [shard_sequence(x, 2, group=group, causal=True) for x in inputs]
            leaves = [x.requires_grad_() for x in mine]
            size = leaves[1].numel() + leaves[2].numel()
            keys = (size, torch.bfloat16)
            out = context_parallel_attention(*leaves, group=group, causal=True)
            assert sent == [keys] * (ranks - 1), sent
            sent.clear()
            out.float().sum().backward()  # type: ignore[union-attr]
            assert sorted(sent, key=str) == sorted(
                [keys] * (ranks - 1) + [(size, torch.float32)] * ranks, key=str
            ), sent
            sent.clear()
    finally:
        context_parallel._Ring.send_on = send  # type: ignore[method-assign]


class Largest(TorchDispatchMode):
    """Of all tensors that come into being, the largest number of elements."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
        return result


def check_memory() -> None:
    """No tensor in forward or backward is larger than this rank's keys and values: nothing is of
    the whole sequence's size, nor of a score matrix's."""
    tokens = 256
    leaves = [
        shard_sequence(x, 2, causal=True).requires_grad_()
        for x in qkv(torch.float32, 4, tokens=tokens)
    ]
    with Largest() as largest:
        out = context_parallel_attention(*leaves, causal=True)
        out.sum().backward()  # type: ignore[union-attr]
    assert largest.elements <= leaves[1].numel() + leaves[2].numel()
    assert largest.elements < 2 * 4 * (tokens // dist.get_world_size()) ** 2


def check_same_bits() -> None:
    results = []
    for _ in range(2):
        leaves = [
            shard_sequence(x, 2, causal=True).requires_grad_() for x in qkv(torch.bfloat16, 2)
        ]
        out = context_parallel_attention(*leaves, causal=True)
        out.float().sum().backward()  # type: ignore[union-attr]
        results.append([out, *(x.grad for x in leaves)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)  # type: ignore[arg-type]


def check_positions() -> None:
    """A layer with rope at the positions of its tokens is the layer over the whole sequence."""
    rank = dist.get_rank()
    at = sequence_positions(16, causal=True)
    assert at.tolist() == [2 * rank, 2 * rank + 1, 14 - 2 * rank, 15 - 2 * rank]
    assert sequence_positions(16).tolist() == list(range(4 * rank, 4 * rank + 4))
    q, k, v = qkv(torch.float32, 2, tokens=16)
    cos, sin = llmops.rope_tables(16, 8)
    expected = llmops.attention(*llmops.rope_qk(q, k, cos, sin), v, causal=True)
    q, k, v = (shard_sequence(x, 2, causal=True) for x in (q, k, v))
    q, k = llmops.rope_qk(q, k, cos, sin, at)
    out = context_parallel_attention(q, k, v, causal=True)
    assert isinstance(out, Tensor)
    torch.testing.assert_close(unshard_sequence(out, 2, causal=True), expected)


def check_compiles() -> None:
    """Within a compiled function: the graph is cut around the ring, the numbers are the same."""
    mine = [shard_sequence(x, 2, causal=True).requires_grad_() for x in qkv(torch.float32, 2)]

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = context_parallel_attention(q * 2, k, v, causal=True)
        assert isinstance(out, Tensor)
        return out.square().sum()

    results = []
    for function in (layer, torch.compile(layer, backend="aot_eager")):
        loss = function(*mine)
        results.append([loss, *torch.autograd.grad(loss, mine)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def check_refusals() -> None:
    q, k, v = qkv(torch.float32, 4)

    with pytest.raises(ValueError, match="pad the sequence to 24"):
        shard_sequence(q[:, :, :23], 2, causal=True)
    with pytest.raises(ValueError, match="the same even number"):
        context_parallel_attention(q[:, :, :3], k, v, causal=True)
    with pytest.raises(ValueError, match="head_dim"):
        context_parallel_attention(q[0], k, v)
    with pytest.raises(NotImplementedError, match="cannot serve"):
        context_parallel_attention(q, k, v, backend="triton")
    leaf = shard_sequence(q, 2).requires_grad_()
    out = context_parallel_attention(leaf, *(shard_sequence(x, 2) for x in (k, v)))
    (grad,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
