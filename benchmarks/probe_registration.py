"""What each way of registering an operator costs per call, and what it can do.

    python benchmarks/probe_registration.py

Every form wraps the same raw C++ kernel (llmops_cpu::softmax_fwd/_bwd on a [2, 4] tensor), so that
differences are the registration's. The result decided how all ops are registered: benchmarks/
NOTES.md has the reading.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmops.backends import cpu  # noqa: F401  (loads the extension)

LIB = torch.library.Library("llmops_probe", "FRAGMENT")
RAW_FWD = torch.ops.llmops_cpu.softmax_fwd.default
RAW_BWD = torch.ops.llmops_cpu.softmax_bwd.default


def forward(x: Tensor) -> Tensor:
    return RAW_FWD(x, 1.0, None, False, x.dtype)


def backward(grad: Tensor, y: Tensor) -> Tensor:
    return RAW_BWD(grad, y, 1.0, y.dtype)


# Form 1: Python kernel under CompositeExplicitAutograd, torch.library.register_autograd.
LIB.define("registered(Tensor x) -> Tensor")
LIB.impl("registered", forward, "CompositeExplicitAutograd")
torch.library.register_fake("llmops_probe::registered", torch.empty_like, lib=LIB)
torch.library.register_autograd(
    "llmops_probe::registered",
    lambda ctx, g: backward(g, ctx.saved_tensors[0]),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(output),
    lib=LIB,
)
REGISTERED = torch.ops.llmops_probe.registered.default


# Form 2: torch.autograd.Function around the raw operator, outside the dispatcher.
class Softmax(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return forward(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return backward(grad, ctx.saved_tensors[0])


class SoftmaxWithContext(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = forward(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return backward(grad, ctx.saved_tensors[0])


# Form 3: a Python kernel at the Autograd key that applies the Function.
LIB.define("autograd_key(Tensor x) -> Tensor")
LIB.impl("autograd_key", forward, "CPU")
LIB.impl("autograd_key", lambda x: Softmax.apply(x), "Autograd")
AUTOGRAD_KEY = torch.ops.llmops_probe.autograd_key.default


# Form 4: torch.library.custom_op.
@torch.library.custom_op("llmops_probe::custom", mutates_args=())
def custom(x: Tensor) -> Tensor:
    return forward(x)


def front_door(x: Tensor) -> Tensor:
    if torch.is_grad_enabled() and x.requires_grad:
        return Softmax.apply(x)
    return forward(x)


FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "torch.softmax": lambda x: torch.softmax(x, -1),
    "raw C++ operator": forward,
    "register_autograd": REGISTERED,
    "autograd.Function (setup_context)": lambda x: Softmax.apply(x),
    "autograd.Function (ctx)": lambda x: SoftmaxWithContext.apply(x),
    "Autograd-key kernel": AUTOGRAD_KEY,
    "custom_op": custom,
    "front door: raw, or Function": front_door,
}


def microseconds(call: Callable[[], Any], repeats: int = 9, number: int = 2000) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(number):
            call()
        times.append((time.perf_counter() - start) / number * 1e6)
    return statistics.median(times)


def can(check: Callable[[], bool]) -> str:
    try:
        return "yes" if check() else "WRONG"
    except Exception as error:  # the table shows what kind of failure
        return type(error).__name__


def row(name: str, form: Callable[[Tensor], Tensor]) -> str:
    x, one = torch.randn(2, 4), torch.ones(2, 4)
    leaf = x.clone().requires_grad_()

    def loss(t: Tensor) -> Tensor:
        return form(t).square().sum()

    with torch.inference_mode():
        inference = microseconds(lambda: form(x))
    with torch.no_grad():
        no_grad = microseconds(lambda: form(leaf))
    grad = microseconds(lambda: form(leaf))
    both = float("nan")
    if name not in ("raw C++ operator", "custom_op"):  # these have no gradient
        both = microseconds(lambda: torch.autograd.grad(form(leaf), leaf, one))
    want = torch.func.grad(lambda t: torch.softmax(t, -1).square().sum())(x)
    func = can(lambda: torch.allclose(torch.func.grad(loss)(x), want))
    return f"{name:36} {inference:9.2f} {no_grad:8.2f} {grad:8.2f} {both:8.2f}  {func}"


def main() -> None:
    torch.set_num_threads(1)
    print(
        f"{'us per call':36} {'inference':>9} {'no_grad':>8} {'grad fwd':>8} {'fwd+bwd':>8}  func"
    )
    for name, form in FORMS.items():
        print(row(name, form))


if __name__ == "__main__":
    main()
