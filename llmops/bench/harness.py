"""What a case of `llmops bench` is, and when two providers of it agree.

Cases stand in cases/<op>.py; providers.py finds who else can compute them, measure.py times them.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llmops.backends import get

# A provider's call: takes nothing, returns the results to compare. Where another library's are
# arranged in another way, its call has a member `comparable` that arranges them as ours are.
Call = Callable[[], Any]


@dataclass
class Case:
    """One row: an op, a pass, a dtype, a shape; `ours` and `torch` compute the same thing.

    Args:
        op, passes, dtype, shape: what the row is called; passes is "fwd", "bwd" or "fwd+bwd".
        ours, torch: the calls, best made by with_backward: then further providers (torch.compile,
            other backends, peak memory) are derived from them. Neither changes its inputs, unless
            `in_place` says so.
        bytes: that must be read and written at least.
        flops: that must be computed. Where both are given, the one that takes longer at the
            machine's limits bounds the row, as in a roofline.
        tolerance: relative to the largest value; None takes 20 eps of the dtype.
        torch_name: what `torch` is; attention's kernel is named by itself.
        in_place: the inputs are changed. Results of with_backward calls are then compared on
            copies; of other calls not at all, and the row says so.
        read_only: the bytes are read and hardly any written: the limit is read bandwidth.
        others: more providers, name -> call.
        peers: makers of other libraries' calls that belong to this case alone, name -> maker, for
            peers.py; a maker raises peers.Absent where the library cannot serve.
        model: the model that the shape is of.
        tokens: that one call processes, for tokens/s of whole models.
        evidence: what to compare of a call's results, where not the results themselves.
        setting: entered around all of the case's calls, outside what is timed.
        curve: (name of a scaling curve, place on its x axis), e.g. ("attention over T", 512).
        device: where its tensors are; cases.collect sets it.
    """

    op: str
    passes: str
    dtype: torch.dtype
    shape: str
    ours: Call
    torch: Call
    bytes: int = 0
    flops: int = 0
    tolerance: float | None = None
    torch_name: str = "eager"
    in_place: bool = False
    read_only: bool = False
    others: dict[str, Call] = field(default_factory=dict)
    peers: dict[str, Callable[[], Call]] = field(default_factory=dict)
    model: str = ""
    tokens: int = 0
    evidence: Callable[[Any], Any] | None = None
    setting: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    curve: tuple[str, int] | None = None
    device: str = "cpu"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        return f"{self.op} {self.passes} {self.dtype_name} {self.shape}"


@dataclass
class Parts:
    """What with_backward made a call from."""

    passes: str
    function: Callable[..., Any]
    inputs: tuple[Any, ...]


def parts_of(call: Call) -> Parts | None:
    """None for a call that with_backward did not make."""
    return getattr(call, "parts", None)


def flat(result: Any) -> list[Tensor]:
    results = result if isinstance(result, (tuple, list)) else (result,)
    return [t for t in results if t is not None]


def with_backward(passes: str, function: Callable[..., Any], inputs: tuple[Any, ...]) -> Call:
    """The call for a pass: "fwd" under no_grad, "bwd" from a saved graph, "fwd+bwd" both."""
    call = _pass(passes, function, inputs)
    call.__dict__["parts"] = Parts(passes, function, inputs)
    return call


def _pass(passes: str, function: Callable[..., Any], inputs: tuple[Any, ...]) -> Call:
    def forward() -> Any:
        with torch.no_grad():
            return function(*inputs)

    if passes == "fwd":
        return forward
    leaves = [t for t in inputs if isinstance(t, Tensor) and t.requires_grad]

    def differentiable() -> list[Tensor]:
        return [r for r in flat(function(*inputs)) if r.requires_grad]

    def gradients_for(results: list[Tensor]) -> list[Tensor]:
        if not results:
            return []
        device = results[0].device  # where they are: a large one takes a CPU seconds
        generator = torch.Generator(device).manual_seed(1)
        drawn = (torch.randn(r.shape, generator=generator, device=device) for r in results)
        return [grad.to(r) for grad, r in zip(drawn, results, strict=True)]

    # Both by the first call: to make a case costs no more than its inputs.
    @functools.cache
    def graph() -> tuple[list[Tensor], list[Tensor]]:
        results = differentiable()
        return results, gradients_for(results)

    @functools.cache
    def gradients() -> list[Tensor]:
        return gradients_for(differentiable())

    def backward() -> Any:
        results, grads = graph()
        return torch.autograd.grad(results, leaves, grads, retain_graph=True)

    def both() -> Any:
        return torch.autograd.grad(differentiable(), leaves, gradients())

    return backward if passes == "bwd" else both


def trains_slowly(dtype: torch.dtype) -> bool:
    """Whether a training step with a model's products takes torch minutes here: on a CPU for which
    it has no product of this dtype. Such a step is left out."""
    if dtype == torch.float32 or torch.get_default_device().type != "cpu":
        return False
    cpu = get("cpu")
    return cpu.available() is not None or bool(cpu.widens_products(dtype))


def passes_of(rows: int, forward: int, backward: int) -> tuple[tuple[str, int], ...]:
    """(pass, factor) pairs of a row op on `rows` rows. A decode step, of few rows, has no backward:
    nobody trains on one token."""
    return (("fwd", forward),) if rows <= 8 else (("fwd", forward), ("bwd", backward))


class Wrong(ValueError):
    """A provider computes something else."""


def outcome(case: Case, call: Call) -> list[Tensor] | None:
    """All that a call computes: of a backward its gradients and the values they belong to. None
    where it cannot be compared: it changes its inputs, or draws at random."""
    parts = parts_of(call)
    if case.in_place:
        if parts is None:
            return None
        copies = (t.clone() if isinstance(t, Tensor) else t for t in parts.inputs)
        with torch.no_grad():
            return flat(parts.function(*copies))
    results = call()
    results = getattr(call, "comparable", lambda same: same)(results)
    results = flat(results if case.evidence is None else case.evidence(results))
    if parts is not None and parts.passes != "fwd":
        with torch.no_grad():
            results += flat(parts.function(*parts.inputs))
    return results


def compare(case: Case, got: list[Tensor] | None, want: list[Tensor] | None) -> None:
    """Raises Wrong where they differ by more than the case allows."""
    if got is None or want is None:
        return
    if [t.shape for t in got] != [t.shape for t in want]:
        shapes = [[tuple(t.shape) for t in side] for side in (got, want)]
        raise Wrong(f"shapes differ: {shapes[0]}, torch has {shapes[1]}")
    tolerance = 20 * torch.finfo(case.dtype).eps if case.tolerance is None else case.tolerance
    for a, b in zip(got, want, strict=True):
        if not a.numel():
            continue
        error = (a.float() - b.float()).abs_().max().item()
        if not math.isfinite(error):  # inf - inf, as of scores under a mask, is no difference
            error = torch.where(a == b, 0.0, (a.float() - b.float()).abs()).max().item()
        limit = tolerance * max(b.abs().max().item(), 1e-30)
        if not error <= limit:
            raise Wrong(f"results differ by {error:.3g}, allowed {limit:.3g}")


def check(case: Case) -> None:
    """Raises Wrong (a ValueError) where ours and torch do not compute the same."""
    try:
        compare(case, outcome(case, case.ours), outcome(case, case.torch))
    except Wrong as wrong:
        raise Wrong(f"llmops bench: {case}: {wrong}; a wrong provider gets no number") from None
