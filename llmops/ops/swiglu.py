"""swiglu and geglu: a gated activation of two tensors, or of the halves of one projection."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from llmops import backends, reference
from llmops.dispatch import resolve
from llmops.ops import _check
from llmops.ops._op import Op, is_tracing, shortcut
from llmops.ops.gelu import check_approximate


def swiglu(gate: Tensor, up: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """y = silu(gate) up, silu(g) = g / (1 + exp(-g)).

    Args:
        gate: any shape, fp32/bf16/fp16 (fp64 on the reference), any strides.
        up: gate's shape and dtype. None: gate is a fused projection [..., 2n], the gate in the
            first half of its last dimension, up in the second; the backward then writes one
            gradient of that shape.
        backend: "cpu", "triton", "cuda", "reference" or "auto"; None follows use_backend.

    Returns:
        Tensor of up's shape ([..., n] for a fused projection), contiguous.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        NotImplementedError: a named backend cannot serve the call.

    Numerics: fp32, one rounding per result; the backward recomputes silu and saves only its inputs.

    Source: Shazeer, "GLU Variants Improve Transformer", 2020.
    """
    raw = _swiglu_raw(gate, up) if backend is None and not is_tracing() else None
    if raw is not None:
        try:
            # An argument left to its default costs the call less than a None.
            return raw(gate) if up is None else raw(gate, up)  # type: ignore[no-any-return]
        except RuntimeError:
            pass  # the checks below say what is wrong
    _check_operands("swiglu", gate, up)
    name = resolve("swiglu", gate.device, gate.dtype, (), backend)
    if name == "reference":
        return reference.swiglu(gate, up)
    return _swiglu(gate, up, name)  # type: ignore[no-any-return]


def geglu(
    gate: Tensor,
    up: Tensor | None = None,
    *,
    approximate: str = "none",
    backend: str | None = None,
) -> Tensor:
    """y = gelu(gate) up; approximate "none" or "tanh" as `gelu`, everything else as `swiglu`."""
    raw = _geglu_raw(gate, up) if backend is None and not is_tracing() else None
    if raw is not None and approximate in ("none", "tanh"):
        try:
            return raw(gate, up, approximate == "tanh")  # type: ignore[no-any-return]
        except RuntimeError:
            pass  # the checks below say what is wrong
    _check_operands("geglu", gate, up)
    check_approximate("geglu", approximate)
    name = resolve("geglu", gate.device, gate.dtype, (), backend)
    if name == "reference":
        return reference.geglu(gate, up, approximate=approximate)
    return _geglu(gate, up, approximate, name)  # type: ignore[no-any-return]


def _check_operands(op: str, gate: Tensor, up: Tensor | None) -> None:
    _check.floating(op, "gate", gate)
    if up is None:
        if gate.dim() == 0 or gate.shape[-1] % 2:
            raise ValueError(
                f"llmops.{op}: without up, gate is a fused projection [..., 2n]; got shape "
                f"{tuple(gate.shape)}; pass up, or an even last dimension"
            )
        return
    _check.floating(op, "up", up)
    if up.shape != gate.shape:
        raise ValueError(
            f"llmops.{op}: up must have gate's shape {tuple(gate.shape)}; got {tuple(up.shape)}"
        )
    if up.dtype != gate.dtype:
        raise TypeError(
            f"llmops.{op}: up has dtype {_check.dtype_name(up.dtype)} and gate "
            f"{_check.dtype_name(gate.dtype)}; convert one, e.g. up.to(gate.dtype)"
        )
    if up.device != gate.device:
        _check.same_device(op, "gate", gate, "up", up)


# ---- the operators -------------------------------------------------------------------------------

_swiglu_raw, _geglu_raw = shortcut("swiglu"), shortcut("geglu")
# The raw kernels' numbers of the activations.
_CODES = {"silu": 0, "gelu": 1, "gelu_tanh": 2}


def _result_like(gate: Tensor, up: Tensor | None) -> Tensor:
    if up is not None:
        return gate.new_empty(gate.shape)
    return gate.new_empty((*gate.shape[:-1], gate.shape[-1] // 2))


def _forward(gate: Tensor, up: Tensor | None, backend: str) -> Tensor:
    if backend != "cpu":
        backend = resolve("swiglu", gate.device, gate.dtype, (), backend)
    if backend == "reference":
        return reference.swiglu(gate, up).contiguous()
    swiglu = backends.get(backend).swiglu
    # An argument left to its default costs the call less than a None.
    return swiglu(gate) if up is None else swiglu(gate, up)  # type: ignore[no-any-return]


def _fake(gate: Tensor, up: Tensor | None, backend: str) -> Tensor:
    return _result_like(gate, up)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, ctx.backend = inputs
    ctx.activation = "silu"
    ctx.save_for_backward(gate, up)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    gate, up = ctx.saved_tensors
    if up is None:
        return _glu_bwd_fused(grad, gate, ctx.activation, ctx.backend), None
    return _glu_bwd(grad, gate, up, ctx.activation, ctx.backend)  # type: ignore[no-any-return]


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return (*_gradients(ctx, grad), None)


def _forward_geglu(gate: Tensor, up: Tensor | None, approximate: str, backend: str) -> Tensor:
    if backend != "cpu":
        backend = resolve("geglu", gate.device, gate.dtype, (), backend)
    if backend == "reference":
        return reference.geglu(gate, up, approximate=approximate).contiguous()
    return backends.get(backend).geglu(gate, up, approximate == "tanh")  # type: ignore[no-any-return]


def _fake_geglu(gate: Tensor, up: Tensor | None, approximate: str, backend: str) -> Tensor:
    return _result_like(gate, up)


def _setup_geglu(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, approximate, ctx.backend = inputs
    ctx.activation = "gelu" if approximate == "none" else "gelu_tanh"
    ctx.save_for_backward(gate, up)


def _backward_geglu(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return (*_gradients(ctx, grad), None, None)


def _forward_bwd(
    grad: Tensor, gate: Tensor, up: Tensor, activation: str, backend: str
) -> tuple[Tensor, Tensor]:
    if backend != "cpu":
        backend = resolve("glu_bwd", gate.device, gate.dtype, (), backend)
    if backend == "reference":
        dgate, dup = reference.glu_bwd(grad, gate, up, activation)
        return dgate.contiguous(), dup.contiguous()
    return backends.get(backend).glu_bwd(grad, gate, up, _CODES[activation])  # type: ignore[no-any-return]


def _fake_bwd(
    grad: Tensor, gate: Tensor, up: Tensor, activation: str, backend: str
) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


def _forward_bwd_fused(grad: Tensor, x: Tensor, activation: str, backend: str) -> Tensor:
    if backend != "cpu":
        backend = resolve("glu_bwd_fused", x.device, x.dtype, (), backend)
    if backend == "reference":
        return reference.glu_bwd_fused(grad, x, activation)
    return backends.get(backend).glu_bwd_fused(grad, x, _CODES[activation])  # type: ignore[no-any-return]


def _fake_bwd_fused(grad: Tensor, x: Tensor, activation: str, backend: str) -> Tensor:
    return x.new_empty(x.shape)


_glu_bwd = Op(
    "glu_bwd(Tensor grad, Tensor gate, Tensor up, str activation, str backend) -> (Tensor, Tensor)",
    forward=_forward_bwd,
    fake=_fake_bwd,
    reference=reference.glu_bwd,
)
_glu_bwd_fused = Op(
    "glu_bwd_fused(Tensor grad, Tensor x, str activation, str backend) -> Tensor",
    forward=_forward_bwd_fused,
    fake=_fake_bwd_fused,
    reference=reference.glu_bwd_fused,
)
_swiglu = Op(
    "swiglu(Tensor gate, Tensor? up, str backend) -> Tensor",
    forward=_forward,
    fake=_fake,
    setup=_setup,
    backward=_backward,
)
_geglu = Op(
    "geglu(Tensor gate, Tensor? up, str approximate, str backend) -> Tensor",
    forward=_forward_geglu,
    fake=_fake_geglu,
    setup=_setup_geglu,
    backward=_backward_geglu,
)
