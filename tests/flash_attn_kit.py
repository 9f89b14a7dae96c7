"""What the tests of llmops.integrations.flash_attn share: flash-attn's documented semantics in
plain PyTorch, [B, T, H, D]; not by llmops.reference, so that neither hides a fault of the other."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from llmops.testing import assert_close
from llmops.testing.specs._attention_floors import of_delta

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
# (query heads, key/value heads): multi-head, grouped-query, multi-query.
HEADS = {"mha": (6, 6), "gqa": (6, 2), "mqa": (6, 1)}
BATCH = 2
Pair = tuple[Tensor, Tensor]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    softmax_scale: float | None = None,
    keep: Tensor | None = None,
) -> Pair:
    """out [B, Tq, H, D] and softmax_lse [B, H, Tq], in the inputs' dtype. `keep` [B, H, Tq, Tk]
    multiplies the weights, as dropout does."""
    queries, keys, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scale = q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    # The last query stands at the last key.
    ahead = torch.arange(keys) - torch.arange(keys - queries, keys)[:, None]
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.reshape(-1, q.shape[2], 1, 1).to(q.dtype) * ahead.abs()
    left, right = window_size
    seen = torch.ones(queries, keys, dtype=torch.bool)
    if causal:
        seen &= ahead <= 0
    if left >= 0:
        seen &= -ahead <= left
    if right >= 0:
        seen &= ahead <= right
    blind = ~seen.any(-1, keepdim=True)
    lse = scores.masked_fill(~seen & ~blind, -math.inf).logsumexp(-1, keepdim=True)
    weights = torch.exp(scores - lse).masked_fill(~seen, 0.0)
    if keep is not None:
        weights = weights * keep
    out = torch.einsum("bhij,bjhd->bihd", weights.to(v.dtype), v)
    lse = lse.masked_fill(blind, -math.inf) if keys else torch.full_like(lse, -math.inf)
    return out, lse.squeeze(-1)


def check_dropped(dropped: Tensor, q: Tensor, k: Tensor, arguments: dict[str, Any]) -> None:
    """S_dmask's sizes are the weights, by way of values e_j: attention gives back the weights."""
    unit = torch.eye(k.shape[1], dtype=torch.float64)[None, :, None].expand(*k.shape[:3], -1)
    weights, _ = attend(q.double(), k.double(), unit, **arguments)
    # The kit's floor, and the error of a score in q's dtype: a few of its eps.
    tolerance = 16 * torch.finfo(q.dtype).eps
    torch.testing.assert_close(
        dropped.abs().double(), weights.transpose(1, 2), rtol=tolerance, atol=tolerance
    )


def rotate(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool = False
) -> Tensor:
    """x [B, T, H, D] turned as complex numbers; positions [B, T]."""
    half = cos.shape[1]
    angle = torch.complex(cos, sin)[positions.long()][:, :, None]  # [B, T, 1, R/2]
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    pairs = turned.unflatten(-1, (half, 2) if interleaved else (2, half))
    pairs = pairs if interleaved else pairs.transpose(-1, -2)
    pairs = pairs.clone(memory_format=torch.contiguous_format)  # aligned for complex numbers
    pairs = torch.view_as_real(torch.view_as_complex(pairs) * angle)
    pairs = pairs if interleaved else pairs.transpose(-1, -2)
    return torch.cat([pairs.flatten(-2), rest], -1)


def check(
    shim: Callable[..., Any], plain: Callable[..., Pair], inputs: tuple[Tensor, ...], what: str
) -> None:
    """Results and gradients of shim(*inputs) -> (out, lse) against `plain` in fp64. Allowed is what
    the kit allows: a multiple of the error of `plain` in the inputs' dtype."""
    results, floors = [], [torch.zeros(())] * len(inputs)
    for fn, dtype in ((shim, None), (plain, torch.float64), (plain, None)):
        leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
        out, lse = fn(*leaves)
        generator = torch.Generator().manual_seed(0)
        cotangent = torch.randn(out.shape, generator=generator).bfloat16().to(out.dtype)
        grads = torch.autograd.grad(out, leaves, cotangent, retain_graph=True, allow_unused=True)
        if dtype is not None and inputs[0].dtype == torch.float32:
            turned = (x.transpose(-3, -2) for x in (out, cotangent))  # lse has the heads first
            floors = of_delta(next(turned), lse, next(turned), leaves, torch.float32)
        grads = [
            torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)
        ]
        results.append((out, lse, grads))
    (out, lse, grads), (out_o, lse_o, grads_o), (out_y, lse_y, grads_y) = results
    assert out.dtype == inputs[0].dtype and lse.dtype == torch.float32
    assert_close(out, out_o, out_y, factor=2.0, what=f"{what}: out")
    for i, (g, x) in enumerate(zip(grads, inputs, strict=True)):
        assert g.dtype == x.dtype and g.shape == x.shape, f"{what}: gradient {i}"
    # Held to the whole tensor as to one row, flash-attn's own rule: a gradient is near zero where a
    # query sees one or two keys, an lse where log and maximum cancel. Either is then the difference
    # of two rounded numbers, and its own size bounds nothing. (lse has one number to a row anyway.)
    whole = [("lse", 2.0, lse, lse_o, lse_y)]
    whole += [
        (f"gradient {i}", 3.0, *g) for i, g in enumerate(zip(grads, grads_o, grads_y, strict=True))
    ]
    for (name, factor, *tensors), floor in zip(whole, (torch.zeros(()), *floors), strict=True):
        got, oracle, yardstick = (x.flatten() for x in tensors)
        own = floor.expand_as(tensors[0]).flatten()
        assert_close(got, oracle, yardstick, factor=factor, what=f"{what}: {name}", floor=own)


def combinations(*shapes: Any) -> Any:
    """Every combination of alibi, local, causal and (dropout_p, softcap), each at sizes of its own;
    every other one asks for the deterministic backward."""
    flags = itertools.product((False, True), repeat=3)
    for n, (alibi, local, causal) in enumerate(flags):
        for m, (dropout_p, softcap) in enumerate(((0.0, 0.0), (0.17, 0.0), (0.0, 5.0))):
            arguments: dict[str, Any] = {"causal": causal, "softcap": softcap}
            extra = {"deterministic": bool((n + m) % 2), "dropout_p": dropout_p}
            yield alibi, local, arguments, extra, *(s[(3 * n + m) % len(s)] for s in shapes)


def modifiers(
    arguments: dict[str, Any], alibi: bool, local: bool, heads: int, keys: int, batch: int = BATCH
) -> dict[str, Any]:
    """`arguments` with random slopes and a random window."""
    if alibi:
        arguments["alibi_slopes"] = torch.rand(batch, heads) * 0.3
    if local:
        # (With one key to every row all of dq would be cancellation.)
        arguments["window_size"] = tuple(torch.randint(min(3, keys - 1), keys, (2,)).tolist())
    return arguments


def describe(*arguments: dict[str, Any]) -> str:
    """Arguments for a message; of tensors the shape."""
    items = [item for given in arguments for item in given.items()]
    return " ".join(
        f"{k}={tuple(v.shape) if isinstance(v, Tensor) else v}" for k, v in items if v is not False
    )
