"""A plugin of pytest: the kit's Triton tests without a GPU, each kernel compiled for sm_90
and run by ptx_emulator.py, its shared memory watched. Minutes for an operator:

    PYTHONPATH=tests python -m pytest -p ptx_kit tests/test_softmax.py -k "triton- and gradients"
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path += [
    str(Path(__file__).resolve().parent),
    str(Path(__file__).resolve().parent / "../tools"),
]

import aot_compile
import ptx_emulator
import ptx_races
import triton
from llmops.kernels.triton import _launch

from llmops.backends import triton as backend

TARGET = "sm_90"
_compiled: dict[Any, tuple[Any, str]] = {}


def _launched(kernel: Any, grid: tuple[int, ...], arguments: Any, constants: Any) -> None:
    given = dict(zip(kernel.arg_names, arguments, strict=False))
    kinds = (_launch._kind(a if isinstance(a, int) else _launch._value(a)) for a in arguments)
    key = (id(kernel), *constants.items(), *kinds)
    if key not in _compiled:
        launch = _launch.Launch(kernel, grid, given, constants)
        source, options, _ = aot_compile._specialize(launch, "", TARGET)
        ptx = triton.compile(source, aot_compile.TARGETS[TARGET], options).asm["ptx"]
        _compiled[key] = source.signature, ptx
    signature, ptx = _compiled[key]
    passed = [given[name] for name, kind in signature.items() if kind != "constexpr"]
    ptx_emulator.run(ptx, grid, passed, ptx_races.BLOCK)


# As under the interpreter the backend takes tensors of the CPU; the tables are the target's.
backend.INTERPRETED, backend.DEVICE = True, "cpu"
_launch.INTERPRETED, _launch._architecture = False, TARGET.replace("_", "")
_launch._launch = _launched
