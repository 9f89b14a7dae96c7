"""`llmops tune`: which configuration of the Triton kernels is fastest on this GPU.

The cases of `llmops bench` are run; each (op, key) whose configuration they ask for, and for which
the op's file of llmops.kernels.triton has `candidates(op, key)`, is searched once. A candidate must
give the right result first; those that do are timed in turn, and one that beats the table by more
than GAIN is kept in a file that later processes read (environment variable LLMOPS_TUNED).
"""

from __future__ import annotations

import argparse
import importlib
import statistics
from collections.abc import Callable, Iterable
from typing import Any

import torch

from llmops.backends import get
from llmops.bench import cases
from llmops.bench.clock import timed
from llmops.bench.harness import Case, compare, outcome

GAIN = 0.02
ROUNDS = 7
Time = Callable[[Callable[[], Any], int], float]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ops", nargs="*", help="as of llmops bench; all where none is named")


def run(arguments: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        raise ValueError("llmops tune: needs a CUDA or ROCm GPU, and torch sees none")
    from llmops.dispatch import use_backend
    from llmops.kernels.triton import _config

    with use_backend("triton"):
        found = search(cases.collect(arguments.ops, device="cuda"))
    _config.save(found)
    count = sum(map(len, found.values()))
    print(f"{count} configurations better than the tables' in {_config.file()}")
    return 0


def search(
    collected: Iterable[Case], time: Time = timed, show: Callable[[str], None] = print
) -> dict[str, dict[Any, Any]]:
    """op -> key -> the configuration that is faster than what is used now."""
    from llmops.kernels.triton import _config

    found: dict[str, dict[Any, Any]] = {}
    done: set[tuple[str, Any]] = set()
    for case in collected:
        if case.in_place:
            continue
        with _config.watching() as seen:
            case.ours()
        for op, key in dict.fromkeys(seen):
            options = candidates(op, key)
            if (op, key) in done or not options:
                continue
            done.add((op, key))
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
