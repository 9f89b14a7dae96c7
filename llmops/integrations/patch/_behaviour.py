"""Rules for modules of other libraries, which each write them anew: RMS norms, gated MLPs, GELUs.

A class is taken for what it computes, not for its name: a stand-in of it, with small random weights
and the module's own settings, is run beside the replacement. Where they differ, as after a change
in the library, the module is left alone.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import llmops
from llmops.integrations.patch import _swap
from llmops.integrations.patch._rules import Rule, served
from llmops.integrations.patch._swap import Replaced

_known: dict[Any, Rule | str | None] = {}
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "none": F.gelu,
    "tanh": lambda x: F.gelu(x, approximate="tanh"),
}


class RMSNorm(Replaced):
    weight: Tensor
    forward: Any
    _llmops_eps: str  # the attribute that holds it
    _llmops_offset: float
    _llmops_out: str  # whose dtype the result has: "x", "weight" or "both", the wider one

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[no-redef]
        weight = self.weight
        if not (served(x) and served(weight)):
            return super().forward(x)  # type: ignore[misc]
        dtype = x.dtype
        if weight.dtype != dtype:
            if self._llmops_out == "weight":
                dtype = weight.dtype
            elif self._llmops_out == "both":
                dtype = torch.promote_types(dtype, weight.dtype)
            x = x.to(torch.promote_types(x.dtype, dtype))
        y = llmops.rms_norm(
            x,
            tuple(weight.shape),
            weight,
            getattr(self, self._llmops_eps),
            weight_offset=self._llmops_offset,
        )
        return y if y.dtype == dtype else y.to(dtype)


class Activation(Replaced):
    _llmops_approximate: str
    forward: Any

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[no-redef]
        if not served(input):
            return super().forward(input)  # type: ignore[misc]
        return llmops.gelu(input, approximate=self._llmops_approximate)


class _Gated(Replaced):
    """down(act(gate(x)) * up(x)), the middle in one pass."""

    _llmops_gate: str  # of _ACTIVATIONS
    _llmops_act: str  # the child that holds it
    forward: Any

    def _product(self, gate: Tensor, up: Tensor | None = None) -> Tensor:
        act = getattr(self, self._llmops_act)
        odd = up is not None and gate.dtype != up.dtype
        # Hooks on the activation must see it run.
        if not served(gate) or odd or act._forward_hooks or act._forward_pre_hooks:
            if up is None:
                gate, up = gate.chunk(2, dim=-1)
            return act(gate) * up
        if self._llmops_gate == "silu":
            return llmops.swiglu(gate, up)
        return llmops.geglu(gate, up, approximate=self._llmops_gate)


class GatedMLP(_Gated):
    """Llama's, Gemma's, Qwen's."""

    def forward(self, x: Tensor) -> Tensor:
        m: Any = self
        return m.down_proj(self._product(m.gate_proj(x), m.up_proj(x)))


class FusedGatedMLP(_Gated):
    """Phi-3's: one projection, the gate in its first half."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        m: Any = self
        return m.down_proj(self._product(m.gate_up_proj(hidden_states)))


class T5GatedMLP(_Gated):
    def forward(self, hidden_states: Tensor) -> Tensor:
        m: Any = self
        h = m.dropout(self._product(m.wi_0(hidden_states), m.wi_1(hidden_states)))
        weight = m.wo.weight  # kept in fp32 in 16-bit models
        if isinstance(weight, Tensor) and weight.dtype not in (h.dtype, torch.int8):
            h = h.to(weight.dtype)
        return m.wo(h)


# Children by which a gated MLP is known, and its projections' sizes in the stand-in.
_MLPS: tuple[tuple[type[_Gated], dict[str, tuple[int, int]]], ...] = (
    (GatedMLP, {"gate_proj": (8, 16), "up_proj": (8, 16), "down_proj": (16, 8)}),
    (FusedGatedMLP, {"gate_up_proj": (8, 32), "down_proj": (16, 8)}),
    (T5GatedMLP, {"wi_0": (8, 16), "wi_1": (8, 16), "wo": (16, 8)}),
)


def rule(module: nn.Module) -> Rule | str | None:
    """A rule, why there is none though it looks like it, or None for what is no such module."""
    examine = _candidate(module)
    if examine is None:
        return None
    cls = type(module)
    key = (cls, _settings(module))
    if key not in _known:
        # Whatever the caller has set: small, in fp32, on the CPU, by the specification.
        with (
            torch.device("cpu"),
            torch.autocast("cpu", enabled=False),
            torch.random.fork_rng(devices=[]),
            llmops.use_backend("reference"),
        ):
            _known[key] = _swap.why_not(module, cls) or examine(module)
    # The instance may have what its class has not.
    return _swap.why_not(module, cls) or _known[key]


def _candidate(module: nn.Module) -> Callable[[Any], Rule | str] | None:
    children = dict(module.named_children())
    parameters = dict(module.named_parameters(recurse=False))
    name = type(module).__name__.lower()
    if not children:
        if set(parameters) == {"weight"} and parameters["weight"].dim() == 1 and _eps(module):
            return _rms_norm if "norm" in name else None
        if not parameters and "gelu" in name:
            return _activation
        return None
    if not parameters and any(set(sizes) <= set(children) for _, sizes in _MLPS):
        return _gated
    return None


def _rms_norm(module: Any) -> Rule | str:
    cls = type(module)
    weights = torch.rand(16, dtype=torch.float32) + 0.5
    inputs = torch.randn(3, 16, dtype=torch.float32)
    halves = (torch.float32, torch.bfloat16)
    for offset, out in product((0.0, 1.0), ("x", "weight", "both")):
        state = {"_llmops_eps": _eps(module), "_llmops_offset": offset, "_llmops_out": out}

        def build(dtype: torch.dtype, state: dict[str, Any] = state) -> Any:
            stand_in = _stand_in(module)
            # Large enough to be seen.
            stand_in.__dict__[state["_llmops_eps"]] = 0.125
            stand_in.weight = nn.Parameter(weights.to(dtype))
            return stand_in

        cases = [(lambda d=w: build(d), inputs.to(x)) for x, w in product(halves, halves)]
        if _same(cls, RMSNorm, state, cases):
            return Rule(cls, "rms_norm", RMSNorm, state=state)
    return _changed(module, "the RMS norm that llmops.rms_norm is")


def _activation(module: Any) -> Rule | str:
    kind = _kind(module)
    if kind not in ("none", "tanh"):
        return _changed(module, "either GELU of llmops.gelu")
    return Rule(type(module), "gelu", Activation, state={"_llmops_approximate": kind})


def _gated(module: Any) -> Rule | str:
    cls = type(module)
    children = dict(module.named_children())
    act = next((n for n in ("act_fn", "activation_fn", "act") if n in children), None)
    kind = None if act is None else _kind(children[act])
    if act is None or kind is None:
        return "its gate is neither SiLU nor GELU"
    for mixin, sizes in _MLPS:
        if not set(sizes) <= set(children):
            continue
        state = {"_llmops_gate": kind, "_llmops_act": act}

        def build(sizes: Any = sizes) -> Any:
            stand_in = _stand_in(module)
            for name, child in children.items():
                if name not in sizes:
                    setattr(stand_in, name, child if name == act else nn.Identity())
            generator = torch.Generator().manual_seed(0)
            for name, (inputs, outputs) in sizes.items():
                linear = nn.Linear(inputs, outputs, dtype=torch.float32)
                for p in linear.parameters():
                    p.data.normal_(generator=generator)
                setattr(stand_in, name, linear)
            return stand_in

        if _same(cls, mixin, state, [(build, torch.randn(3, 8, dtype=torch.float32))]):
            op = "swiglu" if kind == "silu" else "geglu"
            return Rule(cls, op, mixin, hides=(act,), state=state)
    return _changed(module, "the gated MLP that it is built like")


def _kind(act: nn.Module) -> str | None:
    """Which of _ACTIVATIONS it computes."""
    if next(act.parameters(), None) is not None:
        return None
    x = torch.linspace(-8, 8, 257, dtype=torch.float32)
    try:
        with torch.no_grad():
            y = type(act).forward(act, x)
            for name, function in _ACTIVATIONS.items():
                if isinstance(y, Tensor) and torch.allclose(y, function(x), rtol=1e-5, atol=2e-6):
                    return name
    except Exception:
        return None
    return None


# ---- stand-ins -----------------------------------------------------------------------------------


def _eps(module: nn.Module) -> str | None:
    found = [n for n in ("eps", "variance_epsilon") if isinstance(getattr(module, n, None), float)]
    return found[0] if len(found) == 1 else None


def _settings(module: nn.Module) -> Any:
    """What besides its class may decide what a module computes."""
    own = tuple(sorted((n, repr(v)) for n, v in _plain(module).items() if n != "config"))
    return own, tuple((n, type(c), repr(c)) for n, c in module.named_children())


def _plain(module: nn.Module) -> dict[str, Any]:
    return {
        n: v
        for n, v in module.__dict__.items()
        if not n.startswith("_") and n not in ("training", "forward")
    }


def _stand_in(module: nn.Module) -> Any:
    made = type(module).__new__(type(module))
    nn.Module.__init__(made)
    made.__dict__.update(_plain(module))
    return made.eval()


def _same(cls: Any, mixin: type, state: dict[str, Any], cases: list[Any]) -> bool:
    """Whether the replacement gives what the class does: the dtype and, within rounding, values."""
    with torch.no_grad():
        for build, x in cases:
            theirs, ours = build(), build()
            _swap.swap(ours, mixin, state)
            try:
                expected, got = cls.forward(theirs, x), type(ours).forward(ours, x)
            except Exception:
                return False
            if not isinstance(expected, Tensor) or expected.dtype != got.dtype:
                return False
            size = 3 * torch.finfo(expected.dtype if x.dtype == expected.dtype else x.dtype).eps
            size = max(size, 3 * torch.finfo(torch.bfloat16).eps if _half(theirs, x) else 2e-6)
            limit = size * expected.abs().max().item()
            if not torch.allclose(got.float(), expected.float(), rtol=0, atol=limit):
                return False
    return True


def _half(module: nn.Module, x: Tensor) -> bool:
    return any(t.dtype == torch.bfloat16 for t in (x, *module.parameters()))


def _changed(module: nn.Module, what: str) -> str:
    package = type(module).__module__.split(".")[0]
    try:
        from importlib.metadata import version

        package += " " + version(package)
    except ImportError:  # PackageNotFoundError: a module of the user's own
        pass
    return f"{type(module).__name__} of {package} does not compute {what}"
