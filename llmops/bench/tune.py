"""`llmops tune`: which configuration of the Triton kernels is fastest on this GPU.

The cases of `llmops bench` are run; each (op, key) whose configuration they ask for, and for which
the op's file of llmops.kernels.triton has `candidates(op, key)`, is searched once. A candidate must
give the right result first; those that do are timed once, those near the fastest then in turn, and
one that beats the table by more than GAIN is kept in a file that later processes read (environment
variable LLMOPS_TUNED).

What takes longest is Triton's compiler, one core a kernel: with --jobs so many processes compile
the candidates first, each its share, and the search finds them in Triton's cache.
"""

from __future__ import annotations

import argparse
import importlib
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch

from llmops.backends import get
from llmops.bench import cases
from llmops.bench.clock import timed
from llmops.bench.harness import Case, compare, outcome

GAIN = 0.02
ROUNDS = 7
WITHIN = 1.3  # of the fastest's time: who takes longer once takes no part in the rounds
Time = Callable[[Callable[[], Any], int], float]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("ops", nargs="*", help="as of llmops bench; all where none is named")
    add("--jobs", type=_jobs, default=1, help="processes that compile candidates first (1: none)")
    add("--share", metavar="K/N", help=argparse.SUPPRESS)  # compile the K-th of every N, no more


def _jobs(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"is a number of processes, 1 or more; got {text!r}")
    return int(text)


def run(arguments: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        raise ValueError("llmops tune: needs a CUDA or ROCm GPU, and torch sees none")
    from llmops.dispatch import use_backend
    from llmops.kernels.triton import _config

    if not arguments.share:
        _config.save({})  # a file that cannot be written says so now, not after the search
    with use_backend("triton"):
        collected = cases.collect(arguments.ops, device="cuda")
        if arguments.share:
            compile_share(collected, *map(int, arguments.share.split("/")))
            os._exit(0)  # some die of a thread of torch's at the end (benchmarks/NOTES.md)
        if arguments.jobs > 1:
            _compile_all(arguments.ops, arguments.jobs)
        found = search(collected)
    _config.save(found)
    count = sum(map(len, found.values()))
    print(f"{count} configurations better than the tables' in {_config.file()}")
    return 0


def _compile_all(ops: list[str], jobs: int) -> None:
    command = [sys.executable, "-m", "llmops", "tune", *ops, "--share"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen([*command, f"{k}/{jobs}"], env=environment, stderr=subprocess.DEVNULL)
        for k in range(jobs)
    ]
    failed = [k for k, process in enumerate(running) if process.wait() != 0]
    if failed:
        print(
            f"llmops tune: of {jobs} compiling processes {len(failed)} failed; the search compiles "
            "what they left, one kernel after the other",
            file=sys.stderr,
        )


def _asked(collected: Iterable[Case]) -> Iterable[tuple[Case, str, Any, list[dict[str, Any]]]]:
    """Each (op, key) that the cases ask for a configuration of, once, with what may be tried."""
    from llmops.kernels.triton import _config

    done: set[tuple[str, Any]] = set()
    for case in collected:
        if case.in_place:
            continue
        with _config.watching() as seen:
            case.ours()
        for op, key in dict.fromkeys((op, key) for op, key, _ in seen):
            options = candidates(op, key)
            if (op, key) not in done and options:
                done.add((op, key))
                yield case, op, key, options


def compile_share(collected: Iterable[Case], k: int, n: int) -> int:
    """Runs the k-th of every n candidates once; the number of those that ran."""
    from llmops.kernels.triton import _config

    at = ran = 0
    for case, op, _, options in _asked(collected):
        for option in options:
            at += 1
            if at % n != k:
                continue
            try:
                with _config.override(op, **option):
                    case.ours()
                ran += 1
            except Exception:  # too large for this device: the search will see it, too
                continue
    return ran


def search(
    collected: Iterable[Case], time: Time = timed, show: Callable[[str], None] = print
) -> dict[str, dict[Any, Any]]:
    """op -> key -> the configuration that is faster than what is used now."""
    found: dict[str, dict[Any, Any]] = {}
    for case, op, key, options in _asked(collected):
        best, gain = fastest(case, op, options, time)
        show(f"{op} {key}: {'the table' if best is None else f'{best}, {gain:.2f}x'}")
        if best is not None:
            found.setdefault(op, {})[key] = best
    return found


def candidates(op: str, key: Any) -> list[dict[str, Any]]:
    name = get("triton")._FILES.get(op)
    module = importlib.import_module(f"llmops.kernels.triton.{name}") if name else None
    give = getattr(module, "candidates", None)
    return list(give(op, key)) if give else []


def fastest(
    case: Case, op: str, options: list[dict[str, Any]], time: Time
) -> tuple[dict[str, Any] | None, float]:
    """The option that beats the present configuration, and how many times; None: none does."""
    from llmops.kernels.triton import _config

    want = outcome(case, case.torch)
    right: list[dict[str, Any]] = [{}]  # overrides nothing
    for option in options:
        try:
            with _config.override(op, **option):
                compare(case, outcome(case, case.ours), want)
        except Exception:  # too large for this device, or wrong: no candidate
            continue
        right.append(option)
    once: list[float] = []
    for option in right:
        with _config.override(op, **option):
            once.append(time(case.ours, 2))
    slowest = WITHIN * min(once)
    right = right[:1] + [o for o, t in zip(right, once, strict=True) if t <= slowest and o]
    times: list[list[float]] = [[] for _ in right]
    for turn in range(ROUNDS):
        for i in range(len(right)):
            at = (i + turn) % len(right)
            with _config.override(op, **right[at]):
                times[at].append(time(case.ours, 10))
    medians = [statistics.median(t) for t in times]
    at = medians.index(min(medians))
    gain = medians[0] / medians[at]
    return (right[at], gain) if gain > 1 + GAIN else (None, 1.0)
