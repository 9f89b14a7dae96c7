"""What `make gpu` is made of: stages of units, each a process of its own with a limit of time, run
until they have ended or the time is up, and kept as JSON from which a later call goes on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STATE = ROOT / "build" / "gpu"
LEAST = 20.0  # seconds: with less left no unit is begun
ENDED = ("passed", "failed", "killed")


@dataclass
class Unit:
    """A process. `command` may look at what an earlier, interrupted run of it left in its record;
    `read` adds to the record what the output and the exit status say, and returns the new state:
    one of ENDED, or "cut" where it is to be continued."""

    name: str
    command: Callable[[dict[str, Any]], list[str]]
    seconds: float
    read: Callable[[dict[str, Any], str, int | None], str]
    environment: dict[str, str] | None = None


@dataclass
class Stage:
    name: str
    minutes: float
    units: Callable[[], list[Unit]]
    workers: int = 1  # units at a time


def python() -> str:
    """The interpreter of the later stages: this one, or the venv where it must stay as it is."""
    managed = Path(sysconfig.get_path("stdlib")) / "EXTERNALLY-MANAGED"
    inside = sys.prefix != sys.base_prefix
    if managed.exists() and not inside:
        return str(STATE / "venv/bin/python")
    return sys.executable


def tree() -> str:
    """A hash of the sources that decide the results."""
    files = [ROOT / "setup.py"]
    for folder in ("llmops", "kernels", "csrc", "tests"):
        files += (f for f in (ROOT / folder).rglob("*") if f.suffix in (".py", ".cpp", ".h", ".cu"))
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(str(file.relative_to(ROOT)).encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def execute(
    command: list[str], seconds: float, environment: Any = None, name: str = "unit"
) -> tuple[str, int | None]:
    """Output and exit status; None where the time was up and the process group was killed."""
    log = STATE / f"{name.replace(' ', '-')}.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        status: int | None
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return log.read_text(errors="replace"), status


def save(name: str, record: dict[str, Any], out: Path) -> None:
    for folder in dict.fromkeys((STATE, out)):
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f".{name}.new"
        part.write_text(json.dumps(record, indent=1) + "\n")
        part.replace(folder / f"{name}.json")


def load(name: str) -> dict[str, Any]:
    try:
        found = json.loads((STATE / f"{name}.json").read_text())
    except (OSError, ValueError):
        found = None
    if isinstance(found, dict) and isinstance(found.get("units"), dict):
        return found
    return {"stage": name, "units": {}}


def go(stage: Stage, end: float, out: Path, keep: bool = False, only: str = "") -> dict[str, Any]:
    """Runs what the stage still lacks until its own time or `end` (time.monotonic) is up; of its
    units those in whose names `only`, a regular expression, is found."""
    record, here = load(stage.name), tree()
    end = min(end, time.monotonic() + 60 * stage.minutes)
    kept = {n: u for n, u in record["units"].items() if keep or u.get("tree") == here}
    units = stage.units()
    # In the stage's order; one that no run has begun is "pending".
    done = {u.name: kept.get(u.name, {"state": "pending", "seconds": 0.0}) for u in units}
    record = {"stage": stage.name, "state": "unfinished", "units": done}
    save(stage.name, record, out)
    one_at_a_time = threading.Lock()  # only processes run side by side

    def run(unit: Unit) -> None:
        own = done[unit.name]
        limit = min(unit.seconds, end - time.monotonic())
        with one_at_a_time:
            own["tree"], command = here, unit.command(own)
        start = time.monotonic()
        text, status = execute(command, limit, unit.environment, unit.name)
        with one_at_a_time:
            own["seconds"] = round(own["seconds"] + time.monotonic() - start, 1)
            own.update(status=status, tail=text[-1500:])
            own["state"] = unit.read(own, text, status)
            if status is None and own["state"] not in ENDED and limit == unit.seconds:
                own["state"] = "cut" if own.get("continues") else "killed"
            save(stage.name, record, out)
            print(f"{stage.name} {unit.name}: {own['state']}, {own['seconds']:g} s", flush=True)

    def work() -> None:
        """What its limit cut stands behind those that no one has begun."""
        while True:
            try:
                unit = waiting.popleft()
            except IndexError:
                return
            if end - time.monotonic() >= min(LEAST, unit.seconds):
                run(unit)
                if done[unit.name]["state"] not in ENDED:
                    waiting.append(unit)

    chosen = (u for u in units if re.search(only, u.name))
    waiting = deque(u for u in chosen if done[u.name]["state"] not in ENDED)
    with ThreadPoolExecutor(stage.workers) as pool:
        for worker in [pool.submit(work) for _ in range(stage.workers)]:
            worker.result()
    states = [u["state"] for u in done.values()]
    if all(s in ENDED for s in states):
        record["state"] = "passed" if all(s == "passed" for s in states) else "failed"
    save(stage.name, record, out)
    return record


def always(command: list[str], record: dict[str, Any]) -> list[str]:
    """A unit's command that does not look at its record."""
    return command


def plain(record: dict[str, Any], text: str, status: int | None) -> str:
    return "cut" if status is None else "failed" if status else "passed"
