"""`llmops bench --commit-result`: the file of this class of machine in benchmarks/results, remade.

Stages, each a process of its own with a limit of time, together below 15 minutes. A stage's result
is kept beside the file until all are there: run the command again after an interruption and it goes
on with the stages that are missing, unless the commit or the machine changed.
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmops.bench import command, machine, memory

SECONDS = "0.2"


@dataclass
class Stage:
    """One run of the command; `huge_pages` None is the measurement of peak memory."""

    name: str
    title: str
    minutes: float
    options: tuple[str, ...] = ()
    huge_pages: str | None = "off"


STAGES = (
    Stage("plain", "all cases, one thread", 4.0, ("--seconds", SECONDS)),
    Stage("huge", "the same, torch with huge pages", 4.0, ("--seconds", SECONDS), "on"),
    Stage("threads", "one shape each, all threads", 1.2, ("--quick", "--threads", "all")),
    Stage(
        "providers",
        "one shape each, all providers",
        3.0,
        ("--quick", "--with", "all"),
    ),
    Stage("memory", "peak memory, one shape each", 0.8, huge_pages=None),
)


def make(folder: Path, stages: tuple[Stage, ...] = STAGES, ops: tuple[str, ...] = ()) -> int:
    """Measures what is missing, writes the file, removes the parts."""
    folder.mkdir(parents=True, exist_ok=True)
    here = machine.describe()
    file = folder / f"{machine.machine_class(here)}.json"
    parts = folder / f".{file.stem}"
    parts.mkdir(exist_ok=True)
    runs: list[dict[str, Any]] = []
    result: dict[str, Any] = {"format": command.FORMAT, "machine": here, "runs": runs}
    for stage in stages:
        part = parts / f"{stage.name}.json"
        value = _kept(part, here)
        if value is None:
            print(f"-- {stage.title} (at most {stage.minutes:g} minutes)", flush=True)
            value = _measure(stage, ops)
            # Whole or not at all: an interruption while writing leaves no half.
            part.with_suffix(".new").write_text(json.dumps({"machine": here, "value": value}))
            part.with_suffix(".new").replace(part)
        else:
            print(f"-- {stage.title}: kept from the run before", flush=True)
        if stage.huge_pages is None:
            result["memory"] = value
        else:
            value["stage"] = stage.name
            runs.append(value)
    file.write_text(json.dumps(result, indent=1) + "\n")
    for left in parts.iterdir():
        left.unlink()
    parts.rmdir()
    print(f"wrote {file}; now: python tools/readme.py")
    return 0


def _kept(part: Path, here: dict[str, Any]) -> Any:
    """A stage's earlier result, where it is of this commit on this machine."""
    if not part.exists():
        return None
    held = json.loads(part.read_text())
    same = all(held["machine"][k] == here[k] for k in ("cpu", "isa", "cores", "commit", "torch"))
    return held["value"] if same else None


def _measure(stage: Stage, ops: tuple[str, ...]) -> Any:
    seconds = 60 * stage.minutes
    if stage.huge_pages is None:
        return memory.measure(list(ops), True, [], timeout=seconds)
    options = [*ops, *stage.options, "--huge-pages", stage.huge_pages]
    options += ["--minutes", str(stage.minutes), "--plain"]
    try:
        # A row that has begun ends: the margin is for that and for the start.
        return command.child_run(options, stage.huge_pages, timeout=seconds + 180)
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"llmops bench: stage {stage.name!r} hung; the stages before it are kept, run again"
        ) from None
