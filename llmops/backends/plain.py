"""The backend "reference": llmops.reference, in plain PyTorch, on any device and dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmops import reference

if TYPE_CHECKING:
    from llmops.dispatch import Call


# Operators whose plain form is torch's own kernel: nothing to be warned of.
TORCHS_OWN = {"linear": "torch's own matrix product"}


def available() -> str | None:
    return None


def supports(call: Call) -> str | None:
    return serves(call)


def serves(call: Call) -> str | None:
    return None if hasattr(reference, call.op) else f"it has no {call.op}"


def yields(call: Call) -> str | None:
    return None


def describe(call: Call) -> str:
    if call.op in TORCHS_OWN:
        return TORCHS_OWN[call.op]
    return f"plain PyTorch (llmops.reference.{call.op})"
