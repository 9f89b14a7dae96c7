"""Compiles csrc/cuda and its bindings for the simulator, and loads the result: a Python module and
torch.ops.llmops_cuda_sim. Objects are kept in build/cuda_sim, named by what they were made of.

    python tests/cuda_sim/build.py     compiles, and prints where the library is
"""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import importlib.util
import os
import platform
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "cuda_sim"
TORCH_TARGET = "0x020b000000000000"  # as setup.py has it
MACHINE = ("scheduler.cpp", "fibers.cpp", "collectives.cpp", "memory.cpp")  # see machine.h
FLAGS = "-std=c++17 -O1 -fPIC -fvisibility=hidden -Wall -Wextra -DLLMOPS_CUDA_SIM"


def why_not() -> str | None:
    """None where the simulator can be built, else the reason."""
    if platform.machine() not in ("x86_64", "AMD64") or sys.platform != "linux":
        return "the CUDA simulator switches stacks in x86-64 assembly for Linux"
    if importlib.util.find_spec("pybind11") is None:
        return "the CUDA simulator needs pybind11; pip install pybind11"
    return None


def kernels() -> list[Path]:
    return sorted((CSRC / "cuda").glob("*.cu"))


def includes() -> list[str]:
    return [f"-I{HERE}", f"-I{CSRC / 'cuda'}", f"-I{CSRC}"]


@functools.cache
def _headers() -> bytes:
    files = [*CSRC.rglob("*.h"), *HERE.glob("*.h")]
    return b"".join(file.read_bytes() for file in sorted(files))


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "g++"))


def compiled(source: Path, flags: list[str]) -> Path:
    """The object of a source, compiled where there is none of the same content and flags."""
    command = [*compiler(), *flags, *includes()]
    key = hashlib.sha256(_headers() + source.read_bytes() + " ".join(command).encode()).hexdigest()
    output = BUILD / f"{source.parent.name}.{source.stem}.{key[:16]}.o"
    if not output.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        language = ["-x", "c++"] if source.suffix == ".cu" else []
        partial = output.with_suffix(f".{os.getpid()}.tmp")
        run([*command, "-c", *language, str(source), "-o", str(partial)])
        partial.replace(output)
    return output


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")


def objects(sources: list[tuple[Path, list[str]]]) -> list[Path]:
    jobs = int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(lambda one: compiled(*one), sources))


def library() -> Path:
    import pybind11
    import torch

    torch_root = Path(torch.__file__).parent
    flags = FLAGS.split()
    torch_flags = [
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
        "-isystem", str(torch_root / "include"),
        "-isystem", str(torch_root / "include/torch/csrc/api/include"),
    ]  # fmt: skip
    python_flags = [
        "-isystem", pybind11.get_include(), "-isystem", sysconfig.get_paths()["include"],
    ]  # fmt: skip
    bindings = [*sorted((CSRC / "bindings" / "cuda").glob("*.cpp")), CSRC / "bindings/common.cpp"]
    sources = [(file, flags) for file in kernels()]
    sources += [(file, [*flags, *torch_flags]) for file in bindings]
    sources += [(HERE / name, flags) for name in ("selftest.cu", *MACHINE)]
    sources.append((HERE / "module.cpp", [*flags, *python_flags]))
    # The longest first, for two compilers to end together.
    sources.sort(key=lambda one: -one[0].stat().st_size)
    made = sorted(objects(sources))
    key = hashlib.sha256("".join(map(str, made)).encode()).hexdigest()[:16]
    output = BUILD / f"llmops_cuda_sim.{key}.so"
    if not output.exists():
        partial = output.with_suffix(f".{os.getpid()}.tmp")
        libs = [f"-L{torch_root / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"]
        run([*compiler(), "-shared", *map(str, made), *libs, "-o", str(partial)])
        partial.replace(output)
    return output


@functools.cache
def load() -> Any:
    """The simulator's module; compiled when it is not, or not of these sources."""
    reason = why_not()
    if reason is not None:
        raise RuntimeError(reason)
    spec = importlib.util.spec_from_file_location("llmops_cuda_sim", library())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    print(library())
