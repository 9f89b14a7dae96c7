"""The CPU kernels and their bindings under AddressSanitizer (with undefined behaviour) and
ThreadSanitizer: builds them so, one family of ops after the other, and runs the family's oracle and
gradient tests on this processor's best instruction set.

    python tools/sanitize.py                       every family, both sanitizers
    python tools/sanitize.py softmax --only thread this family, this one
    python tools/sanitize.py --part head/10        one of ten of the runs, by the commit

What is not of the family is linked as the plain build has it. torch itself is not instrumented; its
tensors come from malloc, so that a read or write past one is seen. Under ThreadSanitizer the
bindings start threads of their own (csrc/bindings/common.h): OpenMP's barriers are unknown to it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import rotation  # noqa: E402

# Stems of the sources begin with these words; the tests are those of tests/test_<stem>.py.
FAMILIES = {
    "attention": "attention merge_attention",
    "cross_entropy": "cross_entropy",
    "elementwise": "gelu swiglu",
    "embedding": "embedding kv_cache_append_",
    "layer_norm": "layer_norm norm",
    "linear": "linear matmul",
    "rms_norm": "rms_norm norm",
    "rope": "rope",
    "sample": "sample",
    "softmax": "softmax",
}
SANITIZERS = {"address": "asan", "thread": "tsan"}


def run(family: str, sanitizer: str) -> bool:
    print(f"== {family} under {SANITIZERS[sanitizer]}", flush=True)
    stems = FAMILIES[family].split()
    folder = ROOT / "build" / sanitizer
    # The build instruments the best instruction set: no other one may be what runs.
    setting = {k: v for k, v in os.environ.items() if k != "LLMOPS_CPU_ISA"}
    best = _best(setting)
    setting |= {"LLMOPS_SANITIZE": sanitizer, "LLMOPS_SANITIZE_ONLY": " ".join(stems)}
    build = [sys.executable, "setup.py", "-q", "build", "--build-lib", str(folder)]
    subprocess.run(build, cwd=ROOT, env=setting, check=True)
    files = [str(f) for s in stems for f in sorted((ROOT / "tests").glob(f"test_{s}*.py"))]
    setting |= {
        "LD_PRELOAD": _runtime(SANITIZERS[sanitizer]),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": "halt_on_error=1 ignore_noninstrumented_modules=1",
        "OMP_NUM_THREADS": "4",
    }
    chosen = f"{best} and (matches or gradients or long_sequences)"
    tests = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    # No ASLR: ThreadSanitizer's shadow does not fit every layout of a recent kernel.
    command = ["setarch", "-R", *tests, "-k", chosen, "--capture=sys"]
    return subprocess.run(command, cwd=folder, env=setting, check=False).returncode == 0


def _runtime(name: str) -> str:
    command = [*os.environ.get("CXX", "c++").split(), f"-print-file-name=lib{name}.so"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _best(setting: dict[str, str]) -> str:
    command = [sys.executable, "-c", "from llmops.backends import cpu; print(cpu.isa())"]
    done = subprocess.run(
        command, cwd=ROOT, env=setting, check=True, capture_output=True, text=True
    )
    # AMX has no kernels of its own but attention's and linear's (csrc/cpu/isa.h).
    return done.stdout.strip().replace("amx", "(avx512_bf16 or amx)")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("families", nargs="*", metavar="family", help="all where none")
    parser.add_argument("--only", choices=SANITIZERS, help="this sanitizer")
    parser.add_argument("--part", default="all", help="as LLMOPS_TEST_PART: head/10, 3/10, all")
    arguments = parser.parse_args()
    unknown = [f for f in arguments.families if f not in FAMILIES]
    if unknown:
        parser.error(f"no family {', '.join(unknown)}; there are {', '.join(FAMILIES)}")
    runs = [(f, s) for f in arguments.families or FAMILIES for s in SANITIZERS]
    runs = [r for r in runs if arguments.only in (None, r[1])]
    part = rotation.parse(arguments.part)
    if part:
        runs = runs[part.index :: part.of]
    failed = [f"{f} ({s})" for f, s in runs if not run(f, s)]
    print(f"{len(runs)} runs under sanitizers, failed: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
