"""Compiles code on csrc/cpu/simd.h for one instruction set, for tests beneath the kernels."""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path

from llmops.testing import targets

ROOT = Path(__file__).resolve().parent.parent
ISAS = [t.isa for t in targets() if t.isa]


def isa_flags(isa: str) -> list[str]:
    """The flags that the build uses for this instruction set (LLMOPS_EMULATE_AVX512 included)."""
    text = (ROOT / "setup.py").read_text()
    scope: dict[str, object] = {"os": os, "ROOT": ROOT, "IS_X86": "avx2" in ISAS}
    exec(text[text.index("ISA_FLAGS = {") : text.index("COMMON = ")], scope)
    return str(scope["ISA_FLAGS"][isa]).split()  # type: ignore[index]


def compile_simd(source: str, isa: str, folder: Path) -> ctypes.CDLL:
    """A library of the extern "C" functions of `source`, which may include "simd.h"."""
    (folder / "simd_test.cpp").write_text(source)
    output = folder / f"simd_{isa}.so"
    command = [os.environ.get("CXX", "c++"), "-std=c++17", "-O3", "-shared", "-fPIC", "-w"]
    command += [f"-I{ROOT / 'csrc/cpu'}", f"-DLLMOPS_ISA={isa}"]
    command += [*isa_flags(isa), str(folder / "simd_test.cpp"), "-o", str(output)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(output))
