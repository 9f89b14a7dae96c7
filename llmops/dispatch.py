"""Which backend serves a call: decided once per (op, device, dtype, features), then looked up.

A request comes from the `backend=` argument, else the enclosing `use_backend`, else the environment
variable LLMOPS_BACKEND, else it is "auto". A named backend is strict: it serves or raises with its
reason. "auto" takes the first of the device's list that can, and warns once per reason when that
is the reference.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from llmops.backends import get

# Highest priority first. "reference" closes every list: plain PyTorch runs anywhere.
PRIORITY: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu", "reference"),
    "cuda": ("triton", "cuda", "reference"),
}
NAMES = ("cpu", "triton", "cuda", "reference", "auto")


class FallbackWarning(UserWarning):
    """A call under "auto" runs on the reference, in plain PyTorch, and not on a kernel."""


class Call(NamedTuple):
    """What a backend needs to know to say whether it can serve."""

    op: str
    device: str  # device type: "cpu", "cuda", ...
    dtype: torch.dtype
    features: tuple[str, ...] = ()  # beyond the plain form, e.g. ("mask", "causal")


@dataclass(frozen=True)
class Decision:
    """What `explain` returns: the backend that serves, its kernel, and why the others do not."""

    call: Call
    requested: str
    backend: str | None
    kernel: str | None
    rejected: dict[str, str]

    def __str__(self) -> str:
        call = self.call
        what = f"{call.op} on {call.device}, {str(call.dtype).removeprefix('torch.')}"
        if call.features:
            what += f", {', '.join(call.features)}"
        lines = [f"{what} (requested: {self.requested})"]
        lines.append(f"  served by {self.backend}: {self.kernel}" if self.backend else "  refused")
        lines += [f"  not {name}: {reason}" for name, reason in self.rejected.items()]
        return "\n".join(lines)


class _State(threading.local):
    """The innermost `use_backend` of this thread."""

    requested: Any = None


state = _State()
# One entry per request that is open in any thread: while there is none, which is nearly always, no
# one need ask for this thread's, which costs more.
opened: list[Any] = []
_is_compiling = torch.compiler.is_compiling
_table: dict[Any, str] = {}
_warned: set[tuple[str, str]] = set()


class _Explain:
    """Stands in for a request during `explain`: it misses the table, so `_decide` sees it."""

    def __init__(self, requested: str) -> None:
        self.requested = requested


class _Explained(Exception):
    def __init__(self, decision: Decision) -> None:
        self.decision = decision


def _check_name(name: object, where: str) -> None:
    if name not in NAMES:
        raise ValueError(f"{where}: backend is one of {', '.join(NAMES)}; got {name!r}")


class use_backend:
    """Context manager: calls inside, in this thread, use `name` unless they name another.

    >>> with llmops.use_backend("reference"):
    ...     y = llmops.softmax(x)
    """

    def __init__(self, name: str) -> None:
        _check_name(name, "llmops.use_backend")
        self.name = name
        self.previous: list[Any] = []

    def __enter__(self) -> use_backend:
        self.previous.append(state.requested)
        opened.append(self.name)
        # What would be chosen anyway is no request: the short ways stay open.
        state.requested = None if self.name == _environment() == "auto" else self.name
        return self

    def __exit__(self, *exc: object) -> None:
        state.requested = self.previous.pop()
        opened.pop()


def resolve(
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    features: tuple[str, ...] = (),
    backend: str | None = None,
) -> str:
    """The name of the backend that serves this call; raises where a named one cannot."""
    enclosing = state.requested
    if _is_compiling():
        requested = backend if backend is not None else enclosing
        return _resolve_constant(op, device.type, dtype, features, requested)
    # The enclosing explain() must see the call even when an argument names the backend.
    if type(enclosing) is _Explain:
        return _decide(op, device, dtype, features, backend, enclosing)
    requested = backend if backend is not None else enclosing
    key = (op, device, dtype, features, requested)
    found = _table.get(key)
    if found is None:
        found = _table[key] = _decide(op, device, dtype, features, requested, None)
    return found


def _resolve_constant(
    op: str, device: str, dtype: torch.dtype, features: tuple[str, ...], requested: str | None
) -> str:
    """resolve() for torch.compile, which need not trace how the answer was found."""
    learn_sharding()
    return _decide(op, torch.device(device), dtype, features, requested, None)


# What torch.compiler.assume_constant_result sets; calling it would import all of torch._dynamo,
# which takes as long as importing torch.
_resolve_constant._dynamo_marked_constant = True  # type: ignore[attr-defined]


_sharding_known = False


def learn_sharding() -> None:
    """Loads DTensor's rules of our operators once there can be a DTensor: who has one has imported
    its module, and nobody else pays for it."""
    global _sharding_known
    if _sharding_known or "torch.distributed.tensor" not in sys.modules:
        return
    try:
        importlib.import_module("llmops.distributed")
    except (ImportError, AttributeError) as error:  # a torch whose internals are others
        warnings.warn(
            f"llmops: the sharding rules for DTensor do not load with torch {torch.__version__} "
            f"({error}); operators will refuse DTensors, and serve all others as before",
            RuntimeWarning,
            stacklevel=2,
        )
    _sharding_known = True


def requested(backend: str | None = None) -> str | None:
    """What a call asks for: its argument, the enclosing use_backend or the environment; None inside
    explain, which wants an answer and no error."""
    if type(state.requested) is _Explain:
        return None
    return backend or state.requested or _environment()


def _environment() -> str:
    name = os.environ.get("LLMOPS_BACKEND", "auto")
    _check_name(name, "environment variable LLMOPS_BACKEND")
    return name


def _decide(
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    features: tuple[str, ...],
    requested: str | None,
    explain: _Explain | None,
) -> str:
    if explain is not None:
        requested = requested or explain.requested
    if requested is None:
        requested = _environment()
    _check_name(requested, f"llmops.{op}")
    call = Call(op, device.type, dtype, features)
    decision = decide(call, requested)
    if explain is not None:
        raise _Explained(decision)
    if decision.backend is None:
        reason = decision.rejected[requested]
        raise NotImplementedError(
            f'llmops.{op}: backend "{requested}" cannot serve this call: {reason}. '
            'Use backend="auto" to let one that can serve it.'
        )
    reference = get("reference")
    if requested == "auto" and decision.backend == "reference" and op not in reference.TORCHS_OWN:
        if device.type != "meta":  # where nothing is computed
            _warn_fallback(decision)
    return decision.backend


def decide(call: Call, requested: str = "auto") -> Decision:
    """The whole decision for a call, without running or warning."""
    if requested == "auto":
        # Meta and other devices without kernels take the CPU's answer for shapes.
        order = PRIORITY.get(call.device, ("reference",))
    else:
        order = (requested,)
    rejected: dict[str, str] = {}
    for name in order:
        backend = get(name)
        reason = backend.supports(call)
        if reason is None and requested == "auto":
            reason = backend.yields(call)
        if reason is None:
            return Decision(call, requested, name, backend.describe(call), rejected)
        rejected[name] = reason
    return Decision(call, requested, None, None, rejected)


def _warn_fallback(decision: Decision) -> None:
    reasons = "; ".join(f"{name}: {why}" for name, why in decision.rejected.items())
    key = (decision.call.op, reasons)
    if key in _warned:
        return
    _warned.add(key)
    warnings.warn(
        f"llmops.{decision.call.op} runs on the reference (plain PyTorch, slower): "
        f"{reasons or 'no backend for device ' + decision.call.device}. "
        'backend="reference" asks for it without this warning.',
        FallbackWarning,
        stacklevel=5,
    )


def explain(op: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Decision:
    """Which backend and kernel would serve this call, and why the others would not.

    Args:
        op: a public function's name or the function itself, e.g. "softmax".
        *args, **kwargs: the call's arguments, `backend` included. They are checked as in a call;
            nothing is computed.

    Returns:
        Decision, with `backend`, `kernel`, `rejected` (name -> reason); printing it tells it all.

    >>> print(llmops.explain("softmax", torch.randn(4, 8), causal=True))
    """
    import llmops

    function = op
    if isinstance(op, str):
        if op not in llmops.OPERATORS:
            raise ValueError(
                f"llmops.explain: no operator {op!r}; there are {', '.join(llmops.OPERATORS)}"
            )
        function = getattr(llmops, op)
    assert callable(function)
    previous = state.requested
    opened.append(op)
    state.requested = _Explain(previous if isinstance(previous, str) else _environment())
    try:
        function(*args, **kwargs)
    except _Explained as explained:
        return explained.decision
    finally:
        state.requested = previous
        opened.pop()
    raise ValueError(f"llmops.explain: {op!r} does not choose a backend")


_clearing: list[Callable[[], None]] = [_table.clear]


def on_clear(forget: Callable[[], None]) -> None:
    """`forget` is called by clear(): for whoever keeps decisions of its own."""
    _clearing.append(forget)


def clear() -> None:
    """Forgets all decisions, so that a changed environment or instruction set is seen."""
    for forget in _clearing:
        forget()
