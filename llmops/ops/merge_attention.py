"""merge_attention: combines partial attention over disjoint sets of keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmops import reference
from llmops.backends import get
from llmops.dispatch import resolve
from llmops.ops import _check
from llmops.ops._op import Op


def merge_attention(
    out_a: Tensor,
    lse_a: Tensor,
    out_b: Tensor,
    lse_b: Tensor,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The attention over two disjoint sets of keys, from the attention over each.

    lse = log(exp(lse_a) + exp(lse_b));  out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b

    Args:
        out_a, out_b: [..., D], fp32/bf16/fp16 (fp64 on the reference), any strides, of one shape
            and dtype.
        lse_a, lse_b: [...], fp32 (fp64 with fp64 out), natural log, as attention's return_lse
            gives them.
        backend: "cpu", "triton", "cuda", "reference" or "auto"; None follows use_backend.

    Returns:
        (out, lse): [..., D] in out_a's dtype, [...] fp32. A part with lse -inf weighs nothing;
        where both are -inf: zeros and -inf. All four inputs are differentiable.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        NotImplementedError: a named backend cannot serve the call.

    Source: the online softmax of Milakov and Gimelshein, 2018, taken over parts.
    """
    _check.floating("merge_attention", "out_a", out_a)
    lse_type = torch.float64 if out_a.dtype == torch.float64 else torch.float32
    expected = (
        ("out_b", out_b, out_a.shape, out_a.dtype),
        ("lse_a", lse_a, out_a.shape[:-1], lse_type),
        ("lse_b", lse_b, out_a.shape[:-1], lse_type),
    )
    if out_a.dim() == 0:
        raise ValueError("llmops.merge_attention: out_a must be [..., D]; got a scalar")
    for name, x, shape, dtype in expected:
        _check.floating("merge_attention", name, x)
        if x.shape != shape or x.dtype != dtype:
            raise (ValueError if x.shape != shape else TypeError)(
                f"llmops.merge_attention: {name} must be {_check.dtype_name(dtype)} "
                f"{tuple(shape)}, to go with out_a {tuple(out_a.shape)}; got "
                f"{_check.dtype_name(x.dtype)} {tuple(x.shape)}"
            )
        _check.same_device("merge_attention", "out_a", out_a, name, x)
    name = resolve("merge_attention", out_a.device, out_a.dtype, (), backend)
    if name == "reference":
        return reference.merge_attention(out_a, lse_a, out_b, lse_b)
    merged: tuple[Tensor, Tensor] = _merge(out_a, lse_a, out_b, lse_b, name)
    return merged


# ---- the operators -------------------------------------------------------------------------------


def _forward(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    if backend != "cpu":
        backend = resolve("merge_attention", out_a.device, out_a.dtype, (), backend)
    if backend == "reference":
        out, lse = reference.merge_attention(out_a, lse_a, out_b, lse_b)
        return out.contiguous(), lse.contiguous()
    return get(backend).merge_attention(out_a, lse_a, out_b, lse_b)


def _fake(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    return out_a.new_empty(out_a.shape), lse_a.new_empty(lse_a.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.backend = inputs[4]


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
    return (*_merge_bwd(grad_out, grad_lse, *ctx.saved_tensors, ctx.backend), None)


def _forward_bwd(
    grad_out: Tensor,
    grad_lse: Tensor,
    out_a: Tensor,
    lse_a: Tensor,
    out_b: Tensor,
    lse_b: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if backend != "cpu":
        backend = resolve("merge_attention_bwd", out_a.device, out_a.dtype, (), backend)
    arguments = (grad_out, grad_lse, out_a, lse_a, out_b, lse_b)
    if backend == "reference":
        a, la, b, lb = reference.merge_attention_bwd(*arguments)
        return a.contiguous(), la.contiguous(), b.contiguous(), lb.contiguous()
    return get(backend).merge_attention_bwd(*arguments)


def _fake_bwd(
    grad_out: Tensor,
    grad_lse: Tensor,
    out_a: Tensor,
    lse_a: Tensor,
    out_b: Tensor,
    lse_b: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out, lse = out_a.shape, lse_a.shape
    return out_a.new_empty(out), lse_a.new_empty(lse), out_b.new_empty(out), lse_b.new_empty(lse)


_merge_bwd = Op(
    "merge_attention_bwd(Tensor grad_out, Tensor grad_lse, Tensor out_a, Tensor lse_a, "
    "Tensor out_b, Tensor lse_b, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    forward=_forward_bwd,
    fake=_fake_bwd,
    reference=reference.merge_attention_bwd,
)
_merge = Op(
    "merge_attention(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b, str backend) -> "
    "(Tensor out, Tensor lse)",
    forward=_forward,
    fake=_fake,
    setup=_setup,
    backward=_backward,
)
