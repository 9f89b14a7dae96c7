"""`make gpu`'s compile stage: python tools/gpu_compile.py K N OPS... runs the K-th of every N cases
of `llmops bench` once, so that the benchmarks find Triton's kernels compiled. One core compiles
one kernel; of N processes each has its share.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence


def compile_share(k: int, n: int, ops: Sequence[str]) -> int:
    """How many cases ran; one that fails is left for the benchmark, which shows it."""
    import torch

    from llmops.bench import cases

    ran = 0
    for i, case in enumerate(cases.collect(ops, device="cuda")):
        if i % n != k:
            continue
        try:
            with case.setting():
                case.ours()
            torch.cuda.synchronize()
            ran += 1
        except Exception as error:
            print(f"{case}: {type(error).__name__}: {error}")
    return ran


if __name__ == "__main__":
    print(compile_share(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]), "cases", flush=True)
    # Past the interpreter's end: some died there of a thread of torch's (benchmarks/NOTES.md).
    os._exit(0)
