"""gelu: the Gaussian error linear unit, exact or in its tanh form."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from llmops import backends, reference
from llmops.dispatch import resolve
from llmops.ops import _check
from llmops.ops._op import Op, is_tracing, shortcut


def gelu(x: Tensor, *, approximate: str = "none", backend: str | None = None) -> Tensor:
    """y = x Phi(x), Phi the standard normal distribution; approximate="tanh":
    y = x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2.

    Args:
        x: any shape, fp32/bf16/fp16 (fp64 on the reference), any strides.
        approximate: "none" or "tanh", as torch.nn.functional.gelu.
        backend: "cpu", "triton", "cuda", "reference" or "auto"; None follows use_backend.

    Returns:
        Tensor of x's shape and dtype, contiguous.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        NotImplementedError: a named backend cannot serve the call.

    Numerics: fp32, one rounding. Absolute error below 3e-7 max(1, |x|) in fp32, for both forms. In
    16 bits half a unit of the last place and, of "none", 3e-6 |x| more.

    Source: Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016.
    """
    raw = _gelu_raw(x) if backend is None and not is_tracing() else None
    if raw is not None and approximate in ("none", "tanh"):
        return raw(x, approximate == "tanh")  # type: ignore[no-any-return]
    _check.floating("gelu", "x", x)
    check_approximate("gelu", approximate)
    name = resolve("gelu", x.device, x.dtype, (), backend)
    if name == "reference":
        return reference.gelu(x, approximate=approximate)
    return _gelu(x, approximate, name)  # type: ignore[no-any-return]


def check_approximate(op: str, approximate: Any) -> None:
    if approximate not in ("none", "tanh"):
        raise ValueError(f'llmops.{op}: approximate must be "none" or "tanh"; got {approximate!r}')


# ---- the operators -------------------------------------------------------------------------------

_gelu_raw = shortcut("gelu")


def _forward(x: Tensor, approximate: str, backend: str) -> Tensor:
    if backend != "cpu":
        backend = resolve("gelu", x.device, x.dtype, (), backend)
    if backend == "reference":
        return reference.gelu(x, approximate=approximate).contiguous()
    return backends.get(backend).gelu(x, approximate == "tanh")  # type: ignore[no-any-return]


def _fake(x: Tensor, approximate: str, backend: str) -> Tensor:
    return x.new_empty(x.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.approximate, ctx.backend = inputs
    ctx.save_for_backward(x)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (x,) = ctx.saved_tensors
    return _gelu_bwd(grad, x, ctx.approximate, ctx.backend), None, None


def _forward_bwd(grad: Tensor, x: Tensor, approximate: str, backend: str) -> Tensor:
    if backend != "cpu":
        backend = resolve("gelu_bwd", x.device, x.dtype, (), backend)
    if backend == "reference":
        return reference.gelu_bwd(grad, x, approximate).contiguous()
    return backends.get(backend).gelu_bwd(grad, x, approximate == "tanh")  # type: ignore[no-any-return]


def _fake_bwd(grad: Tensor, x: Tensor, approximate: str, backend: str) -> Tensor:
    return x.new_empty(x.shape)


_gelu_bwd = Op(
    "gelu_bwd(Tensor grad, Tensor x, str approximate, str backend) -> Tensor",
    forward=_forward_bwd,
    fake=_fake_bwd,
    reference=reference.gelu_bwd,
)
_gelu = Op(
    "gelu(Tensor x, str approximate, str backend) -> Tensor",
    forward=_forward,
    fake=_fake,
    setup=_setup,
    backward=_backward,
)
