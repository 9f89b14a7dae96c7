"""The Triton kernels, for GPUs. None is there yet: every call is refused with that reason."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmops.dispatch import Call

DEVICE = "cuda"
# What there is of each public operator, for the support table.
PASSES: dict[str, str] = {}


def available() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed; pip install llmops-kernels[triton]"
    return "this version of llmops has no Triton kernels yet"


def supports(call: Call) -> str | None:
    return available() or serves(call)


def serves(call: Call) -> str | None:
    """None where there is a kernel for such a call, usable here or not; else why not."""
    return f"it has no {call.op} yet"


def yields(call: Call) -> str | None:
    return None


def describe(call: Call) -> str:
    return f"Triton {call.op}"
