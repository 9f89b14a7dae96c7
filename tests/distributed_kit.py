"""Four processes that run checks together, over gloo, for the tests of llmops.distributed.

As a module of a test it gives `run`. As a script it is the parent of the four: it imports torch
once and forks, before torch has threads, so that a start costs a few seconds, not a few for each.
Each check runs in all four. A collective that waits for longer than a minute raises, and `run` ends
everything that has not ended by itself and tells which check each rank was in.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

RANKS = 4
WAIT = 60  # seconds for one collective
MEET = 20  # seconds that a rank which is done with a check waits for the others
LIMIT = 120  # for a start of the processes, and LIMIT_EACH for each check
LIMIT_EACH = 20
FOLDER = Path(__file__).resolve().parent
MODULES = ("distributed_rules", "distributed_tensors", "distributed_models", "distributed_context")


def names() -> list[str]:
    """The checks, by the functions' names: to know them, nothing is imported."""
    found = []
    for module in MODULES:
        body = ast.parse((FOLDER / f"{module}.py").read_text()).body
        found += [
            f"{module.removeprefix('distributed_')}-{node.name.removeprefix('check_')}"
            for node in body
            if isinstance(node, ast.FunctionDef) and node.name.startswith("check_")
        ]
    return found


def run(checks: Iterable[str], meet: int = MEET) -> dict[str, str]:
    """What each check has to complain of, empty where it passed."""
    results: dict[str, list[str]] = {check: [] for check in checks}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, folder, str(meet), *results]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        said = Path(folder, "stderr")
        with (
            open(said, "w") as stderr,
            subprocess.Popen(
                command, env=environment, stderr=stderr, start_new_session=True
            ) as parent,
        ):
            try:
                parent.wait(LIMIT + LIMIT_EACH * len(results))
            except subprocess.TimeoutExpired:
                os.killpg(parent.pid, 9)
        for rank in range(RANKS):
            log = Path(folder, f"{rank}.jsonl")
            text = log.read_text() if log.exists() else ""
            lines = [json.loads(line) for line in text.splitlines()]
            done = {line["check"]: line.get("error") for line in lines}
            stopped = next((check for check in results if done.get(check) is None), None)
            for check, of_check in results.items():
                error = done.get(check, f"not run, since {stopped} did not end")
                if error is None:
                    error = f"did not end; the processes said: {said.read_text()[-3000:]}"
                if error:
                    of_check.append(f"rank {rank}: {error}")
        # A rank that fails takes the others' connections with it, and their errors say no more.
        return {
            check: "\n".join([e for e in found if "Connection closed" not in e][:1] or found[:1])
            for check, found in results.items()
        }


# ---- in the processes ----------------------------------------------------------------------------


def alone() -> None:
    """A check that fails in one rank, for whom the others wait: the test of this kit."""
    import torch
    import torch.distributed as dist

    if dist.get_rank() == 2:
        raise AssertionError("alone")
    dist.all_reduce(torch.ones(1))


def _work(
    rank: int, folder: Path, meet: int, checks: list[str], found: dict[str, Callable[[], Any]]
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    # As under torchrun: transformers reads them.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS))
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=WAIT),
    )
    # Where the ranks meet after each check. One that failed alone, while the others wait for it in
    # some collective, waits here in vain and goes, which ends their waiting.
    meeting = dist.new_group(timeout=timedelta(seconds=meet))
    with open(folder / f"{rank}.jsonl", "w", buffering=1) as log:
        for check in checks:
            log.write(json.dumps({"check": check}) + "\n")
            start, error = time.perf_counter(), ""
            torch.manual_seed(0)
            try:
                found[check]()
            except BaseException:
                error = traceback.format_exc(limit=-5)
            took = time.perf_counter() - start
            log.write(json.dumps({"check": check, "error": error, "seconds": took}) + "\n")
            dist.barrier(meeting)
    os._exit(0)


def _main() -> None:
    import importlib

    folder, meet, checks = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    found: dict[str, Callable[[], Any]] = {"kit-alone": alone, "kit-after": lambda: None}
    for module in MODULES:
        loaded = vars(importlib.import_module(module))
        for name, value in loaded.items():
            if name.startswith("check_"):
                key = f"{module.removeprefix('distributed_')}-{name.removeprefix('check_')}"
                found[key] = value
        found.update(loaded.get("MORE", {}))
    children = []
    for rank in range(RANKS):
        child = os.fork()
        if child == 0:
            try:
                _work(rank, folder, meet, checks, found)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)


if __name__ == "__main__":
    _main()
