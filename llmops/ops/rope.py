"""rope: rotary position embedding of one tensor, or of q and k in one launch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmops import backends, reference
from llmops.backends._measured import size_of
from llmops.dispatch import learn_sharding, resolve
from llmops.ops import _check
from llmops.ops._op import LIBRARY, Op, is_tracing, refuse_transforms, shortcut
from llmops.ops._rope_checks import check_heads, check_pair, check_tables

_is_grad_enabled = torch.is_grad_enabled
_is_compiling = torch.compiler.is_compiling
_dispatch_modes = torch._C._len_torch_dispatch_stack


def rope(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    *,
    interleaved: bool = False,
    inverse: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Rotary position embedding: pair i of every head turns by the angle of its token's position.

    a' = a cos - b sin,  b' = b cos + a sin   with (a, b) = (x[i], x[i + R/2]), halves, or
    (x[2i], x[2i + 1]), interleaved; elements from R on pass through.

    Args:
        x: [B, H, T, D], fp32/bf16/fp16 (fp64 on the reference), any strides.
        cos, sin: [N, R/2] tables indexed by position (see rope_tables), or already gathered
            [B, T, R/2] (or [1, T, R/2]). R <= D. Any float dtype; the kernels compute with fp32,
            so fp32 tables cost no conversion. They take no gradient on the kernels.
        position_ids: [T] or [B, T], int64 or int32, each in [0, N); None means 0 to T-1. Not with
            gathered tables.
        interleaved: pairs of neighbours (GPT-J), not halves (GPT-NeoX, Llama).
        inverse: turns back: rope(rope(x), inverse=True) is x.
        backend: "cpu", "triton", "cuda", "reference" or "auto"; None follows use_backend.

    Returns:
        Tensor of x's shape and dtype. In memory [B, T, H, D] when x is stored so (a transposed
        projection), else [B, H, T, D]; the gradient likewise.

    Raises:
        TypeError, ValueError, IndexError (a position outside the tables): naming the argument, what
        was expected and what came. On "triton", which does not wait for the GPU's answer, such a
        position reads nothing and its token's turned elements are NaN.
        NotImplementedError: a named backend cannot serve the call.

    Numerics: fp32, one rounding to x's dtype. The backward is the inverse rotation of the gradient.

    Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.
    """
    check_heads("rope", "x", x)
    check_tables("rope", x, cos, sin, position_ids)
    name = _resolve("rope", x, cos, sin, position_ids, backend)
    if name == "reference":
        return reference.rope(x, cos, sin, position_ids, interleaved=interleaved, inverse=inverse)
    cos, sin = _tables(cos, sin, x, position_ids)
    return _rope(x, cos, sin, position_ids, interleaved, inverse, _token_major(x), name)  # type: ignore[no-any-return]


def rope_qk(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    *,
    interleaved: bool = False,
    inverse: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`rope` of q [B, Hq, T, D] and k [B, Hk, T, D] in one launch; head counts may differ.

    Arguments, errors and numerics as `rope`. Both results take the memory order of q.

    Returns:
        (q, k), turned.
    """
    check_pair("rope_qk", q, k)
    check_tables("rope_qk", q, cos, sin, position_ids)
    name = _resolve("rope_qk", q, cos, sin, position_ids, backend)
    if name == "reference":
        return reference.rope_qk(
            q, k, cos, sin, position_ids, interleaved=interleaved, inverse=inverse
        )
    cos, sin = _tables(cos, sin, q, position_ids)
    return _rope_qk(q, k, cos, sin, position_ids, interleaved, inverse, _token_major(q), name)  # type: ignore[no-any-return]


def rope_qk_(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    *,
    interleaved: bool = False,
    inverse: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`rope_qk` in place: q and k are overwritten, and returned. For inference.

    Arguments as `rope_qk`. q and k must each be dense in D and hold no element twice (no expanded
    or overlapping memory), and share none; slices of one fused projection are fine.

    Raises:
        RuntimeError: q or k requires a gradient while gradients are recorded, or shares memory as
            above.
        Others as `rope`.
    """
    raw = _rope_qk_raw_(q, k, cos, sin) if backend is None and not is_tracing() else None
    if raw is not None:
        try:
            if interleaved or inverse:
                raw(q, k, cos, sin, position_ids, interleaved, inverse)
            elif position_ids is not None:
                raw(q, k, cos, sin, position_ids)
            else:
                raw(q, k, cos, sin)
        except (RuntimeError, ValueError, IndexError):
            pass  # nothing was written, and the checks below say what is wrong
        else:
            _written(q, k)
            return q, k
    check_pair("rope_qk_", q, k)
    check_tables("rope_qk_", q, cos, sin, position_ids)
    _refuse_gradients(q, k)
    name = _resolve("rope_qk_", q, cos, sin, position_ids, backend)
    if not _is_compiling():
        for argument, tensor in (("q", q), ("k", k)):
            if tensor.shape[3] > 1 and tensor.stride(3) != 1:
                raise RuntimeError(
                    f"llmops.rope_qk_: {argument} has stride {tensor.stride(3)} in its last "
                    "dimension, expected 1; use llmops.rope_qk, which writes new tensors"
                )
    if name != "reference":
        cos, sin = _tables(cos, sin, q, position_ids)
    if _is_compiling() or type(q) is not Tensor or type(k) is not Tensor or _dispatch_modes():
        learn_sharding()
        torch.ops.llmops.rope_qk_(q, k, cos, sin, position_ids, interleaved, inverse, name)
    else:
        _forward_qk_(q, k, cos, sin, position_ids, interleaved, inverse, name)
    return q, k


# ---- what a call needs to know ------------------------------------------------------------------


def _refuse_gradients(q: Tensor, k: Tensor) -> None:
    refuse_transforms("rope_qk_", "use llmops.rope_qk", q, k)
    if _is_grad_enabled() and (q.requires_grad or k.requires_grad):
        raise RuntimeError(
            f"llmops.rope_qk_: {'q' if q.requires_grad else 'k'} requires a gradient, which an "
            "in-place rotation does not record; use llmops.rope_qk, or torch.no_grad() around it"
        )


def _resolve(
    op: str, x: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None, backend: str | None
) -> str:
    name = resolve(op, x.device, x.dtype, size_of(op, x), backend)
    if name == "reference":
        if position_ids is not None and not _is_compiling():
            remedy = "; make longer tables with llmops.rope_tables"
            _check.within(
                op, "position_ids", position_ids, cos.shape[0], "cos and sin have", remedy
            )
    elif (cos.requires_grad or sin.requires_grad) and _is_grad_enabled():
        raise NotImplementedError(
            f'llmops.{op}: cos or sin requires a gradient, which backend "{name}" does not '
            'compute; use backend="reference", or pass cos.detach() and sin.detach()'
        )
    return name


def _tables(
    cos: Tensor, sin: Tensor, x: Tensor, position_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The tables as the operators take them."""
    if cos.dtype != torch.float32 or sin.dtype != torch.float32:
        cos, sin = cos.float(), sin.float()
    # With a row per token, a DTensor's tokens may be split over ranks, and the rows with them.
    if type(x) is not Tensor and position_ids is None and cos.dim() == 2:
        tokens = x.shape[2]
        cos, sin = cos[:tokens], sin[:tokens]
    return cos, sin


def _token_major(x: Tensor) -> bool:
    """True when x lies in memory as [B, T, H, D]: results and gradients then do as well, and the
    projection around needs no copy."""
    return x.shape[2] > 1 and x.stride(1) < x.stride(2)


# ---- the operators -------------------------------------------------------------------------------

_rope_qk_raw_ = shortcut("rope_qk_")


def _ordered(x: Tensor, token_major: bool) -> Tensor:
    """x in the memory order that the operator promises."""
    return x.transpose(1, 2).contiguous().transpose(1, 2) if token_major else x.contiguous()


def _empty(x: Tensor, token_major: bool) -> Tensor:
    b, h, t, d = x.shape
    if token_major:
        return x.new_empty((b, t, h, d)).transpose(1, 2)
    return x.new_empty((b, h, t, d))


def _forward(
    x: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None,
    interleaved: bool, inverse: bool, token_major: bool, backend: str,
) -> Tensor:  # fmt: skip
    if backend != "cpu":
        backend = resolve("rope", x.device, x.dtype, (), backend)
    if backend == "reference":
        turned = reference.rope(x, cos, sin, position_ids, interleaved=interleaved, inverse=inverse)
        return _ordered(turned, token_major)
    raw = backends.get(backend).rope
    # Arguments left to their defaults cost the call nothing: a microsecond of a decode step.
    if not (interleaved or inverse or token_major):
        return raw(x, cos, sin, position_ids)  # type: ignore[no-any-return]
    return raw(x, cos, sin, position_ids, interleaved, inverse, token_major)  # type: ignore[no-any-return]


def _fake(
    x: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None,
    interleaved: bool, inverse: bool, token_major: bool, backend: str,
) -> Tensor:  # fmt: skip
    return _empty(x, token_major)


def _save(ctx: Any, inputs: tuple[Any, ...], first: int) -> None:
    cos, sin, position_ids, *flags = inputs[first:]
    ctx.save_for_backward(cos, sin, position_ids)
    ctx.flags = flags
    ctx.set_materialize_grads(False)


def _inverse(ctx: Any, table_position: int) -> tuple[Any, ...]:
    """The arguments of the backward's call of the same operator: the rotation turned back."""
    if ctx.needs_input_grad[table_position] or ctx.needs_input_grad[table_position + 1]:
        raise NotImplementedError(
            "llmops.rope: the kernels compute no gradient of cos and sin; use "
            'backend="reference", or detach them'
        )
    interleaved, inverse, token_major, backend = ctx.flags
    return (*ctx.saved_tensors, interleaved, not inverse, token_major, backend)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _save(ctx, inputs, 1)


def _backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 8
    return (_rope(grad, *_inverse(ctx, 1)), *(None,) * 7)


def _forward_qk(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None,
    interleaved: bool, inverse: bool, token_major: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if backend != "cpu":
        backend = resolve("rope_qk", q.device, q.dtype, (), backend)
    if backend == "reference":
        turned = reference.rope_qk(
            q, k, cos, sin, position_ids, interleaved=interleaved, inverse=inverse
        )
        return _ordered(turned[0], token_major), _ordered(turned[1], token_major)
    raw = backends.get(backend).rope_qk
    if not (interleaved or inverse or token_major):
        return raw(q, k, cos, sin, position_ids)  # type: ignore[no-any-return]
    return raw(q, k, cos, sin, position_ids, interleaved, inverse, token_major)  # type: ignore[no-any-return]


def _fake_qk(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None,
    interleaved: bool, inverse: bool, token_major: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _empty(q, token_major), _empty(k, token_major)


def _setup_qk(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _save(ctx, inputs, 2)


def _backward_qk(ctx: Any, grad_q: Tensor | None, grad_k: Tensor | None) -> tuple[Any, ...]:
    if grad_q is not None and grad_k is not None:
        dq, dk = _rope_qk(grad_q, grad_k, *_inverse(ctx, 2))
        return (dq, dk, *(None,) * 7)
    dq = None if grad_q is None else _rope(grad_q, *_inverse(ctx, 2))
    dk = None if grad_k is None else _rope(grad_k, *_inverse(ctx, 2))
    return (dq, dk, *(None,) * 7)


def _forward_qk_(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None,
    interleaved: bool, inverse: bool, backend: str,
) -> None:  # fmt: skip
    _refuse_gradients(q, k)
    if backend != "cpu":
        backend = resolve("rope_qk_", q.device, q.dtype, (), backend)
    if backend == "reference":
        reference.rope_qk_(q, k, cos, sin, position_ids, interleaved=interleaved, inverse=inverse)
        return
    raw = backends.get(backend).rope_qk_
    if interleaved or inverse:
        raw(q, k, cos, sin, position_ids, interleaved, inverse)
    else:
        raw(q, k, cos, sin, position_ids)
    _written(q, k)


def _written(q: Tensor, k: Tensor) -> None:
    """Tells autograd that earlier operations which saved q or k must not use them any more."""
    if not torch.is_inference_mode_enabled():
        torch.autograd.graph.increment_version([t for t in (q, k) if not t.is_inference()])


_FLAGS = "Tensor cos, Tensor sin, Tensor? position_ids, bool interleaved, bool inverse"
_rope = Op(
    f"rope(Tensor x, {_FLAGS}, bool token_major, str backend) -> Tensor",
    forward=_forward,
    fake=_fake,
    setup=_setup,
    backward=_backward,
)
_rope_qk = Op(
    f"rope_qk(Tensor q, Tensor k, {_FLAGS}, bool token_major, str backend) -> (Tensor, Tensor)",
    forward=_forward_qk,
    fake=_fake_qk,
    setup=_setup_qk,
    backward=_backward_qk,
)
# In place: no autograd, so no Op. It mutates, and says so in its schema.
LIBRARY.define(
    f"rope_qk_(Tensor(a!) q, Tensor(b!) k, {_FLAGS}, str backend) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.impl("rope_qk_", _forward_qk_, "CompositeExplicitAutograd")
torch.library.register_fake("llmops::rope_qk_", lambda *args: None, lib=LIBRARY)
