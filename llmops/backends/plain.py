"""The backend "reference": llmops.reference, in plain PyTorch, on any device and dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmops import reference

if TYPE_CHECKING:
    from llmops.dispatch import Call


def available() -> str | None:
    return None


def supports(call: Call) -> str | None:
    return None if hasattr(reference, call.op) else f"it has no {call.op}"


def describe(call: Call) -> str:
    return f"plain PyTorch (llmops.reference.{call.op})"
