"""Finds and loads the compiled library, once, and remembers why it could not."""

from __future__ import annotations

import importlib
import os
import warnings
from pathlib import Path

import torch

_PACKAGE = Path(__file__).resolve().parent.parent
ISA_NAMES = ("scalar", "avx2", "avx512", "avx512_bf16", "amx")


def _load() -> str | None:
    """None when the library is loaded, else the reason it is not."""
    try:
        # The library links against libtorch, which `import torch` above has brought in.
        importlib.import_module("llmops._C")
    except ImportError as error:
        if (_PACKAGE.parent / "setup.py").exists() and not list(_PACKAGE.glob("_C.*")):
            return (
                f"the source tree {_PACKAGE.parent} is imported and its extension is not built; "
                "run `pip install -e .` there, or start Python in another directory to use an "
                "installed llmops"
            )
        if not list(_PACKAGE.glob("_C.*")):
            return (
                "this installation has no compiled extension (built with LLMOPS_BUILD=0, or for "
                "another platform); reinstall it with a C++17 compiler at hand"
            )
        return f"the compiled extension does not load: {error}"
    return None


REASON = _load()


def select_isa(name: str) -> None:
    """Runs the CPU kernels on this instruction set from now on, in the whole process."""
    if name not in ISA_NAMES:
        raise ValueError(f"CPU instruction set is one of {', '.join(ISA_NAMES)}; got {name!r}")
    if not torch.ops.llmops_cpu.isa_select(name):
        best = torch.ops.llmops_cpu.isa_best()
        raise ValueError(
            f"CPU instruction set {name!r} is not supported by this machine, whose best is {best!r}"
        )


def _isa_from_environment() -> None:
    wanted = os.environ.get("LLMOPS_CPU_ISA")
    if wanted is None:
        return
    try:
        select_isa(wanted)
    except ValueError as error:
        raise ImportError(f"environment variable LLMOPS_CPU_ISA: {error}") from None


if REASON is None:
    _isa_from_environment()
elif (_PACKAGE.parent / "setup.py").exists():
    warnings.warn(f"llmops has no compiled kernels: {REASON}", RuntimeWarning, stacklevel=2)
