"""`llmops bench --commit-result`: the file of this class of machine in benchmarks/results, remade.

Stages, each a process of its own with a limit of time, together 33 minutes and the row that each is
in when its time is up (a process that has not ended 5 minutes later is ended). Rows are kept beside
the file as they are measured: run the command again and every stage goes on behind the rows it has,
until it says that the file is written. Of whole models and other long cases, which on some machines
take an hour, it has as many as its time allows. What another commit or another machine left is
dropped.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmops.bench import cases, command, machine, memory, providers
from llmops.bench.resume import Kept

SECONDS = ("--seconds", "0.2")
OPS = tuple(name for name in cases.names() if name not in cases.LAST)
LAST_ROW = 300.0  # seconds beyond a stage's limit for the row that has begun


@dataclass
class Stage:
    """One run of the command; `huge_pages` None is the measurement of peak memory. `ops`: all where
    there are none. `partial`: it need not have all of its rows."""

    name: str
    title: str
    minutes: float
    options: tuple[str, ...] = ()
    huge_pages: str | None = "off"
    ops: tuple[str, ...] = ()
    partial: bool = False


STAGES = (
    Stage("plain", "all ops, one thread", 4.0, SECONDS, ops=OPS),
    Stage("huge", "the same, torch with huge pages", 4.0, SECONDS, "on", ops=OPS),
    Stage("threads", "one shape each, all threads", 1.2, ("--quick", "--threads", "all")),
    Stage("providers", "one shape each, all providers", 3.0, ("--quick", "--with", "all")),
    Stage("models", "whole models, long cases", 8.0, SECONDS, ops=cases.LAST, partial=True),
    Stage(
        "long",
        "whole models, prompts of 512 and steps of 4 x 512",
        12.0,
        (*SECONDS, "--with", "peers"),
        ops=("model_long",),
        partial=True,
    ),
    Stage("memory", "peak memory, one shape each", 0.8, huge_pages=None),
)


def make(folder: Path, stages: tuple[Stage, ...] = STAGES, ops: tuple[str, ...] = ()) -> int:
    """Measures what is missing, each stage within its time. Where that was all, writes the file and
    removes the parts: 0. Else 1: run it again."""
    folder.mkdir(parents=True, exist_ok=True)
    here = machine.describe()
    file = folder / f"{machine.machine_class(here)}.json"
    parts = folder / f".{file.stem}"
    parts.mkdir(exist_ok=True)
    print(f"at most {sum(s.minutes for s in stages):g} minutes and the rows that are then begun")
    found: dict[str, Any] = {}
    for stage in stages:
        _drop_foreign(parts / f"{stage.name}.jsonl", here)
        done = parts / f"{stage.name}.json"
        if not done.exists():
            print(f"-- {stage.title} (at most {stage.minutes:g} minutes)", flush=True)
            value = _measure(stage, parts / f"{stage.name}.jsonl", here, ops)
            if value is None:
                print(f"-- {stage.title}: not all yet", flush=True)
                continue
            # Whole or not at all: an interruption while writing leaves no half.
            done.with_suffix(".new").write_text(json.dumps(value))
            done.with_suffix(".new").replace(done)
        else:
            print(f"-- {stage.title}: kept from the run before", flush=True)
        found[stage.name] = json.loads(done.read_text())
    missing = [stage.name for stage in stages if stage.name not in found]
    if missing:
        print(f"not complete: {', '.join(missing)}; what there is is kept: run it again")
        return 1
    result: dict[str, Any] = {"format": command.FORMAT, "machine": here, "runs": []}
    for stage in stages:
        if stage.huge_pages is None:
            result["memory"] = found[stage.name]
        else:
            result["runs"].append({**found[stage.name], "stage": stage.name})
    result["peers"], result["peer_versions"] = providers.availability(), providers.versions()
    file.write_text(json.dumps(result, indent=1) + "\n")
    for left in parts.iterdir():
        left.unlink()
    parts.rmdir()
    print(f"wrote {file}; now: python tools/readme.py")
    return 0


def _drop_foreign(rows: Path, here: dict[str, Any]) -> None:
    """A stage's parts where they are of another commit or machine."""
    try:
        Kept(rows, here, {})
    except ValueError:
        print(f"-- {rows.stem}: dropped what was measured at another commit or on another machine")
        rows.unlink()
        rows.with_suffix(".json").unlink(missing_ok=True)


def _measure(stage: Stage, rows: Path, here: dict[str, Any], ops: tuple[str, ...]) -> Any:
    """The stage's run, or its rows of peak memory; None where its time was too short for all."""
    seconds = 60 * stage.minutes
    if stage.huge_pages is None:
        kept = Kept(rows, here, {"memory": True})
        with contextlib.suppress(TimeoutError):
            for row in memory.rows(list(ops), True, [], seconds, list(kept.rows)):
                kept.add(row)
            return kept.rows
        return None
    options = [
        *(ops or stage.ops),
        *stage.options,
        "--huge-pages",
        stage.huge_pages,
        "--resume",
        str(rows),
    ]
    options += ["--minutes", str(stage.minutes), "--plain"]
    with contextlib.suppress(subprocess.TimeoutExpired):
        run = command.child_run(options, stage.huge_pages, timeout=seconds + LAST_ROW)
        return run if run["complete"] or stage.partial else None
    return None
