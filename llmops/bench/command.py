"""`llmops bench`: the table on the terminal, and JSON for benchmarks/results."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import llmops
from llmops.bench import cases, harness


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ops", nargs="*", help=f"of {', '.join(cases.names())}; all where none")
    parser.add_argument("--quick", action="store_true", help="one shape per op and dtype")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    parser.add_argument("--seconds", type=float, default=0.6, help="time per row (default 0.6)")
    parser.add_argument("--json", metavar="FILE", help="also write the rows and the machine there")


def run(arguments: argparse.Namespace) -> int:
    if arguments.threads < 1:
        print(f"llmops bench: --threads must be at least 1, got {arguments.threads}")
        return 2
    unknown = [op for op in arguments.ops if op not in cases.names()]
    if unknown:
        names = ", ".join(cases.names())
        print(f"llmops bench: no cases for {', '.join(unknown)}; there are {names}")
        return 2
    torch.set_num_threads(arguments.threads)
    rows: list[harness.Row] = []

    def measured() -> Any:
        collected = cases.collect(arguments.ops, arguments.quick)
        for row in harness.run(collected, arguments.seconds):
            rows.append(row)
            yield row

    for line in harness.table(measured()):
        print(line, flush=True)
    if arguments.json:
        result = {"machine": machine(), "rows": harness.as_json(rows)}
        Path(arguments.json).write_text(json.dumps(result, indent=1) + "\n")
    return 0


def machine() -> dict[str, Any]:
    """What a reader needs to place the numbers."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        model = names[0].split(":", 1)[1].strip() if names else model
    return {
        "cpu": model,
        "isa": torch.ops.llmops_cpu.isa_active(),
        "cores": torch.get_num_threads() if sys.platform != "linux" else _cores(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "llmops": llmops.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
    }


def _cores() -> int:
    import os

    return len(os.sched_getaffinity(0))


def _commit() -> str | None:
    """The source tree's commit, where there is one."""
    root = Path(llmops.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None
