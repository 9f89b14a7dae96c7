"""`make gpu GPU="--stages install,sanitize"`: the CUDA C++ kernels under compute-sanitizer.

One unit per tool and test file: memcheck (accesses out of range or misaligned),
racecheck (shared memory), synccheck (barriers that diverge). Results and gradients alone: what a
kernel does is the same in the kit's other cases, and each test takes tens of times as long here.
Triton's kernels are left out, whose compiler places the barriers, and so are torch's.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from gpu_run import ROOT, Unit, always

TOOLS = ("memcheck", "racecheck", "synccheck")
FOUND = 77  # exit status where a tool has something to report
OURS = "kns=llmops"  # what their mangled names hold
WANTED = "cuda and not triton and (matches_reference or gradients)"
SECONDS = 240


def executable() -> str:
    found = shutil.which("compute-sanitizer")
    if found is None:
        nvcc = shutil.which("nvcc")  # it is installed beside it, or one folder up
        beside = [] if nvcc is None else [Path(nvcc).resolve().parent]
        places = [p for b in beside for p in (b, b.parent / "compute-sanitizer")]
        found = next((str(p / "compute-sanitizer") for p in places
                      if (p / "compute-sanitizer").is_file()), None)  # fmt: skip
    if found is None:
        raise FileNotFoundError(
            "compute-sanitizer is not on PATH nor beside nvcc; install the CUDA toolkit's "
            "compute-sanitizer, or leave the stage out: --stages install,correctness,bench"
        )
    return found


def read(record: dict[str, Any], text: str, status: int | None) -> str:
    """What a tool reported; a test file without a test of these kernels is no success."""
    record["reports"] = [line for line in text.splitlines() if line.startswith("=========")][:40]
    record["counts"] = {"passed": text.count(" PASSED"), "failed": text.count(" FAILED")}
    if status is None:
        return "cut"
    return "passed" if status == 0 and record["counts"]["passed"] else "failed"


def units(python: str) -> Iterator[Unit]:
    sanitizer = executable()
    files = [f for f in (ROOT / "tests").glob("test_*.py") if "suite(" in f.read_text()]
    from llmops.backends import cuda

    served = [f for f in sorted(files) if f.stem.removeprefix("test_") in cuda.PASSES]
    for tool in TOOLS:
        for file in served:
            command = [sanitizer, "--tool", tool, "--error-exitcode", str(FOUND)]
            command += ["--kernel-name", OURS, "--target-processes", "all"]
            command += [python, "-m", "pytest", "-v", "-x", "--tb=short"]
            command += ["-p", "no:cacheprovider", "-k", WANTED, str(file.relative_to(ROOT))]
            yield Unit(f"{tool} {file.stem}", partial(always, command), SECONDS, read)
