"""Peak memory of a case's forward and of its forward and backward, ours beside torch's.

    python -m llmops.bench.memory '{"cases": {"ops": ["softmax"], "quick": true}, "done": []}'

prints JSON lines.

How: a process of one thread makes the inputs, then forks per measurement; the child runs the call
once and reports how far its peak resident set (ru_maxrss) rose above what it began with. That
counts everything, scratch that no allocator of torch's sees included. Blocks of 64 KiB and more are
mapped for themselves and given back when freed (MALLOC_MMAP_THRESHOLD_), so that what earlier
calls left behind hides nothing. Resolution: about 0.2 MiB. CPU only.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from llmops.bench.harness import Call, Case, Parts, flat, parts_of

OVERSTATES_BELOW = 1 << 20  # bytes: below, the noise of one page here and there shows


def _call(parts: Parts, backward: bool) -> Call:
    """A whole step, so that what the forward saves for the backward counts."""

    def forward() -> Any:
        with torch.no_grad():
            return parts.function(*parts.inputs)

    leaves = [t for t in parts.inputs if isinstance(t, Tensor) and t.requires_grad]

    def both() -> Any:
        outputs = [r for r in flat(parts.function(*parts.inputs)) if r.requires_grad]
        return torch.autograd.grad(outputs, leaves, [torch.ones_like(r) for r in outputs])

    return both if backward else forward


def peak_of(call: Call) -> int | None:
    """Bytes of resident memory that one call adds at its peak; None where it fails."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            # A child maps the libraries' code as it runs; after one call, whose memory is given
            # back, what the process holds is what the peak rises from.
            call()
            page = os.sysconf("SC_PAGE_SIZE")
            with open("/proc/self/statm") as file:
                before = int(file.read().split()[1]) * page
            kept = call()  # held: results count
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            os.write(writer, str(max(peak - before, 0)).encode())
            del kept
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return int(text) if text else None


def _measured(cases: Iterator[Case], done: Iterable[list[str]]) -> Iterator[dict[str, Any]]:
    seen = set(map(tuple, done))
    for case in cases:
        ours, theirs = parts_of(case.ours), parts_of(case.torch)
        if ours is None or theirs is None or case.in_place or case.bytes < OVERSTATES_BELOW:
            continue
        backward = case.passes != "fwd"
        passes = "fwd+bwd" if backward else "fwd"
        key = (case.op, passes, case.dtype_name, case.shape)
        if key in seen:
            continue
        seen.add(key)
        yield {
            "op": case.op,
            "passes": passes,
            "dtype": case.dtype_name,
            "shape": case.shape,
            "ours_bytes": peak_of(_call(ours, backward)),
            "torch_bytes": peak_of(_call(theirs, backward)),
        }


KEY = ("op", "passes", "dtype", "shape")


def rows(
    ops: list[str],
    quick: bool,
    dtypes: list[str],
    timeout: float = 600,
    done: Iterable[dict[str, Any]] = (),
) -> Iterator[dict[str, Any]]:
    """The rows of these cases but those `done`, from a process of their own, as they come.

    Raises:
        TimeoutError: `timeout` seconds were over before the last one.
    """
    wanted = {"ops": ops, "quick": quick, "dtypes": dtypes}
    keys = [[row[k] for k in KEY] for row in done]
    settings = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    process = subprocess.Popen(
        [sys.executable, "-m", "llmops.bench.memory", json.dumps({"cases": wanted, "done": keys})],
        env={**os.environ, **settings},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    end = threading.Timer(timeout, process.kill)
    end.start()
    try:
        for line in process.stdout:
            if line.startswith("{") and line.endswith("}\n"):
                yield json.loads(line)
        if process.wait():
            raise TimeoutError(
                f"llmops bench: peak memory: ended with {process.returncode}, the time was "
                f"{timeout:g} seconds"
            )
    finally:
        end.cancel()
        process.kill()
        process.wait()


def main() -> None:
    from llmops.bench import cases

    torch.set_num_threads(1)
    request = json.loads(sys.argv[1])
    for row in _measured(cases.collect(**request["cases"]), request["done"]):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
