"""`make gpu`: what is to be known of these kernels on the GPU at hand, within ten minutes.

    install       the package, from this tree, with no network and only this GPU's architecture
    correctness   the conformance kit on its device targets, some test files at a time: what takes
                  long is not the GPU but Triton's compiler, one core a process
    compile       Triton's kernels of the benchmarks, a share to each core
    bench         `llmops bench --device cuda`, one op after the other, then beside torch.compile
    tune          where --stages names it: `llmops tune`, compiled by all cores; what it finds is
                  kept in build/gpu/tuned.json and takes part in nothing else
    sanitize      where --stages names it: the CUDA kernels under compute-sanitizer
    summary       one JSON of all this

A stage is a list of units, each a process of its own with a limit of time: one that hangs, or
leaves the GPU in an error state, takes nothing else along. The units that tell most come first.
After each unit the stage's JSON is written, whole or not at all, to build/gpu and to --out. A call
goes on where the one before stopped: what has ended stays, failures too, unless the sources changed
since (--keep: even then); --fresh forgets all. Exit status: 0 nothing failed, though some may be
left for the next call; 1 something did; 2 there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import gpu_run
import gpu_sanitize
import gpu_tests
from gpu_run import Stage, Unit, always, go, load, plain, python, save

# ---- install -------------------------------------------------------------------------------------


def architecture(major: int, minor: int) -> str:
    """9.0 -> "90a", 10.0 -> "100a": those whose instructions need the "a"; 12.0 -> "120"."""
    return f"{major}{minor}" + "a" * (major in (9, 10))


DESCRIBE = "import json; from llmops.bench import machine; print(json.dumps(machine.describe()))"
IMPORTS = (
    "import torch; from llmops.backends import cuda; reason = cuda.available(); assert not reason"
)


def read_machine(record: dict[str, Any], text: str, status: int | None) -> str:
    if status == 0:
        record["machine"] = json.loads(text.splitlines()[-1])
    return plain(record, text, status)


def forget_missing_install() -> None:
    """The results may have been brought to another machine, on which nothing is installed yet."""
    if load("install")["units"]:
        try:
            subprocess.run([python(), "-c", IMPORTS], cwd="/", check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            (gpu_run.STATE / "install.json").unlink()


def install_units() -> list[Unit]:
    import torch

    options = ["--no-index", "--no-build-isolation", "--no-deps", "-q", "-e", "."]
    environment = {
        "LLMOPS_CUDA": "1",
        "LLMOPS_CUDA_ARCHS": architecture(*torch.cuda.get_device_capability()),
    }
    venv = [sys.executable, "-m", "venv", "--system-site-packages", str(gpu_run.STATE / "venv")]
    pip = [python(), "-m", "pip", "install", *options]
    found = [
        Unit("pip", lambda own: pip, 270, plain, environment),
        Unit("machine", lambda own: [python(), "-c", DESCRIBE], 60, read_machine),
    ]
    if python() != sys.executable:
        found.insert(0, Unit("venv", lambda own: venv, 60, plain))
    return found


# ---- bench ---------------------------------------------------------------------------------------


def read_bench(record: dict[str, Any], text: str, status: int | None) -> str:
    file = gpu_run.STATE / "bench-unit.json"
    if status in (0, 1) and file.exists():
        record["result"] = json.loads(file.read_text())
        record["complete"] = all(run["complete"] for run in record["result"]["runs"])
        notes = (r["results"] for run in record["result"]["runs"] for r in run["rows"])
        record["wrong"] = [r["note"] for row in notes for r in row if r["note"][:5] == "WRONG"]
    return plain(record, text, status)


def bench_command(options: list[str], record: dict[str, Any]) -> list[str]:
    file = gpu_run.STATE / "bench-unit.json"
    file.unlink(missing_ok=True)
    limits = ["--seconds", "0.1", "--minutes", "0.4", "--device", "cuda", "--plain"]
    return [python(), "-m", "llmops", "bench", *options, *limits, "--json", str(file)]


FIRST = ("overhead", "attention_grid", "bandwidth", "attention", "attention_kvcache")


def compile_units() -> list[Unit]:
    """Of the first benchmarks; a kernel of a later one is compiled where its row is measured."""
    share = [python(), str(Path(__file__).resolve().parent / "gpu_compile.py")]
    commands = [[*share, str(k), str(WORKERS), *FIRST, "rope"] for k in range(WORKERS)]
    return [
        Unit(f"share {k}", partial(always, command), 90, plain, {"OMP_NUM_THREADS": "1"})
        for k, command in enumerate(commands)
    ]


def bench_units() -> list[Unit]:
    """Every op beside torch, its named kernels and peers; then one shape each, as a compiler runs
    per row, beside torch.compile."""
    from llmops.bench import cases

    groups = [x for group in ("sdpa", "backends", "peers") for x in ("--with", group)]
    compiled = ["--quick", "--with", "compile"]
    kinds = (("", groups, 60), (" torch.compile", compiled, 75))
    names = [*FIRST, *(name for name in cases.names() if name not in FIRST)]
    return [
        Unit(op + kind, partial(bench_command, [op, *options]), seconds, read_bench)
        for kind, options, seconds in kinds
        for op in names
    ]


# ---- tune ----------------------------------------------------------------------------------------

TUNED = ("attention_grid", "bandwidth", "attention_kvcache", "rope")


def read_tune(record: dict[str, Any], text: str, status: int | None) -> str:
    record["found"] = re.findall(r"^(\w+ \(.*\): .*)$", text, re.MULTILINE)
    return plain(record, text, status)


def tune_units() -> list[Unit]:
    jobs = max(1, (os.cpu_count() or 1) - 1)
    environment = {"LLMOPS_TUNED": str(gpu_run.STATE / "tuned.json")}
    units = []
    for op in TUNED:
        command = [python(), "-m", "llmops", "tune", op, "--jobs", str(jobs)]
        units.append(Unit(op, partial(always, command), 200, read_tune, environment))
    return units


# ---- summary -------------------------------------------------------------------------------------


def summary(names: Iterable[str]) -> dict[str, Any]:
    """In the form of benchmarks/results: machine, runs, and under "stages" what each came to."""
    records = {name: load(name) for name in names}
    stages: dict[str, Any] = {}
    runs, machine = [], None
    for name, record in records.items():
        units = {}
        for unit, own in record["units"].items():
            units[unit] = {k: v for k, v in own.items() if k not in ("result", "seen", "tail")}
            # Of tests `failures` says it, and their output names the machine's folders.
            if own["state"] in ("failed", "killed") and "failures" not in own:
                units[unit]["tail"] = own.get("tail", "")
            machine = own.get("result", own).get("machine", machine)  # the last has busy clocks
            for run in own.get("result", {}).get("runs", ()):
                runs.append({"stage": unit, **run})
        stages[name] = {"state": record.get("state", "not run"), "units": units}
    return {"format": 2, "machine": machine, "tree": gpu_run.tree(), "runs": runs, "stages": stages}


WORKERS = max(1, min(14, (os.cpu_count() or 1) - 2))
STAGES = (
    Stage("install", 5.0, install_units),
    Stage("correctness", 4.0, gpu_tests.test_units, workers=WORKERS),
    Stage("compile", 1.5, compile_units, workers=WORKERS),
    Stage("bench", 5.0, bench_units),
    Stage("tune", 9.0, tune_units),
    Stage("sanitize", 9.0, lambda: list(gpu_sanitize.units(python())), workers=WORKERS),
)
USUAL = "install,correctness,compile,bench"


def work(
    stages: Iterable[Stage], minutes: float, out: Path, keep: bool = False, only: str = ""
) -> dict[str, Any]:
    """The stages in order, `minutes` in all, then the summary. Without an install nothing runs."""
    end = time.monotonic() + 60 * minutes
    stages = tuple(stages)
    for stage in stages:
        try:
            if stage.name == "install":
                forget_missing_install()
            chosen = "" if stage.name == "install" else only
            record = go(stage, end, out, keep, chosen)
        except Exception as error:  # the stages after it still have their say
            record = {**load(stage.name), "state": "failed", "error": repr(error)}
            save(stage.name, record, out)
        print(f"-- {stage.name}: {record['state']}", flush=True)
        if stage.name == "install" and record["state"] != "passed":
            break
    found = summary([s.name for s in STAGES] + [s.name for s in stages if s not in STAGES])
    save("summary", found, out)
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    add = parser.add_argument
    default = os.environ.get("OUT") or str(gpu_run.STATE)
    add("--out", type=Path, default=Path(default), help="folder of the JSON files (build/gpu)")
    names = [s.name for s in STAGES]
    add("--stages", default=USUAL, help=f"some of {', '.join(names)} (default {USUAL})")
    add("--minutes", type=float, default=9.5, help="for all stages together (9.5)")
    add("--units", default="", help="of tests and benchmarks, those with this regular expression")
    add("--fresh", action="store_true", help="forget what earlier calls found")
    add("--keep", action="store_true", help="go on although the sources changed since")
    add("--commit", action="store_true", help="also write benchmarks/results/<device>.json")
    options = parser.parse_args(arguments)
    chosen = options.stages.split(",")
    if unknown := [name for name in chosen if name not in names]:
        parser.error(f"--stages: no stage {', '.join(unknown)}; there are {', '.join(names)}")
    try:
        re.compile(options.units)
    except re.error as error:
        parser.error(f"--units: {options.units!r} is no regular expression: {error}")
    try:
        import torch
    except ImportError:
        print("make gpu: needs a Python with torch; set PYTHON to it", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("make gpu: needs a CUDA GPU, and torch sees none; nothing was run", file=sys.stderr)
        return 2
    if options.fresh:
        shutil.rmtree(gpu_run.STATE, ignore_errors=True)
    gpu_run.STATE.mkdir(parents=True, exist_ok=True)
    sys.path.insert(0, str(gpu_run.ROOT))
    found = work(
        [s for s in STAGES if s.name in chosen],
        options.minutes,
        options.out,
        options.keep,
        options.units,
    )
    if options.commit:
        from llmops.bench.machine import machine_class

        here = {"gpu": torch.cuda.get_device_name()}
        file = gpu_run.ROOT / "benchmarks" / "results" / f"{machine_class(here, 'cuda')}.json"
        file.write_text(json.dumps(found, indent=1) + "\n")
        print(f"wrote {file}")
    states = {name: stage["state"] for name, stage in found["stages"].items()}
    print(", ".join(f"{name} {state}" for name, state in states.items()), f"in {options.out}")
    return int("failed" in states.values())


if __name__ == "__main__":
    sys.exit(main())
