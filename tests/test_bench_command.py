"""The benchmark command: its files, its comparison with earlier ones, and the committed result.

Nothing here asserts a speed: the machine that runs the tests is not a quiet one.
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest
import torch

from llmops.bench import (
    cases,
    command,
    commit_result,
    compare,
    machine,
    measure,
    providers,
    report,
    resume,
)
from llmops.bench.harness import Case
from llmops.bench.limits import Limits
from llmops.cli import main

SMALL = Limits(megabytes=8)


# ---- comparison ----------------------------------------------------------------------------------


def row(ours: float, torch_us: float, iqr: float = 0.01) -> measure.Row:
    results = [
        measure.Result("llmops", ours, ours * iqr),
        measure.Result("torch", torch_us, torch_us * iqr),
    ]
    return measure.Row(
        "gelu", "fwd", "float32", "8", 1, ours_us=ours, torch_us=torch_us,
        ratio=torch_us / ours, results=results,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "verdict"),
    [
        (row(10, 20), row(10.3, 20), "same"),
        (row(10, 20), row(15, 20), "slower"),
        (row(15, 20), row(10, 20), "faster"),
        (row(10, 20), row(15, 30), "same"),  # a busier machine
        (row(10, 30), row(10, 20), "same"),  # torch became faster
        (row(10, 20, 0.3), row(13, 20, 0.3), "same"),  # noisy
    ],
)
def test_bench_compare_tells_moves_from_noise(
    old: measure.Row, new: measure.Row, verdict: str
) -> None:
    (move,) = compare.compare([old], [new])
    assert move.verdict == verdict


def test_bench_compare_of_another_machine_uses_ratios() -> None:
    assert compare.compare([row(10, 20)], [row(5, 5)], same_machine=False)[0].verdict == "slower"
    assert compare.compare([row(10, 20)], [row(30, 60)], same_machine=False)[0].verdict == "same"


# ---- the command ---------------------------------------------------------------------------------

QUICK = ["bench", "gelu", "--quick", "--seconds", "0.001", "--dtype", "float32", "--plain"]


def test_bench_command_writes_and_compares(tmp_path: Path, capsys: Any) -> None:
    files = {kind: tmp_path / f"r.{kind}" for kind in ("json", "csv", "html")}
    options = [x for kind, file in files.items() for x in (f"--{kind}", str(file))]
    assert main([*QUICK, *options, "--with", "isa"]) == 0
    shown = capsys.readouterr().out
    assert "limits measured now" in shown and "llmops scalar" in shown
    result = json.loads(files["json"].read_text())
    assert result["format"] == command.FORMAT and result["runs"][0]["complete"]
    assert {"cpu", "isa", "cores", "clocks", "torch", "commit"} <= set(result["machine"])
    rows = result["runs"][0]["rows"]
    assert rows == measure.as_json(map(measure.from_json, rows))
    with files["csv"].open() as file:
        lines = list(csv.DictReader(file))
    assert {line["provider"] for line in lines} >= {"llmops", "torch (eager)", "llmops scalar"}


def doctored(file: Path, factor: float, target: Path) -> Path:
    """The result in `file` as if ours had taken `factor` times as long."""
    result = json.loads(file.read_text())
    for row in result["runs"][0]["rows"]:
        row["ours_us"], row["ratio"] = row["ours_us"] * factor, row["ratio"] / factor
        for r in row["results"]:
            if r["provider"] == "llmops":
                r["us"], r["iqr_us"] = r["us"] * factor, r["iqr_us"] * factor
    target.write_text(json.dumps(result))
    return target


@pytest.mark.parametrize(
    ("factor", "status", "counts"),
    [
        (1 / 3, 1, "4 slower, 0 faster, 0 within noise"),
        (1.0, 0, "0 slower, 0 faster, 4 within noise"),
        (3.0, 0, "0 slower, 4 faster, 0 within noise"),
    ],
)
def test_bench_compare_exit_status(
    factor: float, status: int, counts: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    """All of the command but the clock: every provider takes a microsecond, so that a busy machine
    moves nothing."""
    monkeypatch.setattr(measure, "times_of", lambda entrants, seconds: [[1e-6] * 3] * len(entrants))
    new = tmp_path / "new.json"
    assert main([*QUICK, "--json", str(new)]) == 0
    capsys.readouterr()
    assert main([*QUICK, "--compare", str(doctored(new, factor, tmp_path / "old.json"))]) == status
    said = capsys.readouterr().out
    assert f"{counts}, 0 not in the old file" in said
    assert said.count("  slower: gelu fwd float32 512x3072: 0.3 -> 1.0 us") == status


@pytest.mark.parametrize(("factor", "status"), [(0.001, 1), (1000.0, 0)])
def test_bench_compare_exit_status_of_the_process(
    factor: float, status: int, tmp_path: Path
) -> None:
    new = tmp_path / "new.json"
    assert bench_process(*QUICK[1:], "--json", new).returncode == 0
    old = doctored(new, factor, tmp_path / "old.json")
    ended = bench_process(*QUICK[1:], "--seconds", "0.05", "--compare", old)
    assert ended.returncode == status, ended.stdout[-2000:]


def bench_process(*options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llmops", "bench", *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def test_bench_on_a_terminal_shows_progress_and_a_table() -> None:
    pytest.importorskip("rich", reason="pip install rich")
    options = [x for x in QUICK if x != "--plain"]
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 200, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "NO_COLOR", "CI")}
    process = subprocess.Popen(
        [sys.executable, "-m", "llmops", *options],
        stdout=terminal,
        env={**environment, "TERM": "xterm-256color"},
    )
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # EIO: the other end is closed
        while block := os.read(controller, 65536):
            shown += block
    os.close(controller)
    assert process.wait() == 0
    text = shown.decode()
    assert "\x1b[" in text  # colours, and the cursor going back over the bar
    # Some row's name: the bar is drawn ten times a second, and a row may take less than that.
    row_name = r"gelu (?:fwd|bwd) float32 (?:tanh )?512x3072"
    assert re.search(row_name + r" [^\r]*━[^\r]*0/1", text), text[:2000]
    table = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).split("ratio")[1]
    assert len(re.findall(r"gelu +(?:fwd|bwd) +float32 +(?:tanh )?512x3072", table)) == 4, table


def test_bench_command_exits_1_on_a_regression(tmp_path: Path, monkeypatch: Any) -> None:
    machine = {"cpu": "c", "isa": "i", "commit": "x", "torch": "t"}
    old = {"machine": machine, "rows": measure.as_json([row(10, 20)])}
    lines, regressed = compare.report(old, [row(20, 20)], machine)
    assert regressed and any("slower: gelu" in line for line in lines)
    assert not compare.report(old, [row(10, 20)], machine)[1]
    lost = row(10, 20)
    lost.ours_us = lost.ratio = None
    lost.results[0] = measure.Result("llmops", note="WRONG: results differ")
    lines, regressed = compare.report(old, [lost], machine)
    assert regressed and any("lost its number" in line for line in lines)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nothing"], "no cases for nothing"),
        (["gelu", "--threads", "0"], "--threads must be numbers of at least 1"),
        (["gelu", "--seconds", "0"], "--seconds must be above 0"),
        (["gelu", "--json", "/nowhere/x.json"], "its folder does not exist"),
        (["gelu", "--compare", "/nowhere/x.json"], "no such file"),
    ],
)
def test_bench_command_rejects(options: list[str], message: str, capsys: Any) -> None:
    assert main(["bench", *options]) == 1
    assert message in capsys.readouterr().err


def test_bench_huge_pages_are_another_process() -> None:
    run = command.child_run([*QUICK[1:], "--huge-pages", "on"], "on")
    assert run["torch_huge_pages"] is True and run["rows"][0]["ours_us"]


def test_bench_report_needs_nothing_from_outside() -> None:
    one = measure.measure(next(cases.collect(["softmax"], True)), SMALL, 0.001)
    one.shape = "<64&128>"
    run = {"threads": 1, "torch_huge_pages": False, "limits": SMALL.as_json()}
    machine = {"cpu": "c", "isa": "i", "cores": 1, "torch": "t", "llmops": "l", "commit": "x"}
    curve = [
        measure.Row(**{**vars(row(10, 20)), "bytes": 8 * n, "curve": ("gelu over rows", n),
                       "rate_unit": "GB/s"})
        for n in (1, 10, 100)
    ]  # fmt: skip
    rows = measure.as_json([one, *curve])
    html = report.html({"machine": machine, "runs": [{**run, "rows": rows}]})
    assert not re.search(r"https?:|//|src=|<link|<script|url\(|@import", html)
    assert "prefers-color-scheme:dark" in html and "<svg" in html and "Scaling" in html
    assert "<64&128>" not in html and "&lt;64&amp;128&gt;" in html


def keys(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    return [tuple(row[k] for k in ("op", "passes", "dtype", "shape")) for row in rows]


def test_bench_resume_goes_on_behind_the_last_row(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    measured_now: list[str] = []

    def stops(case: Case, *rest: Any) -> measure.Row:
        if len(measured_now) == 2:
            raise KeyboardInterrupt
        measured_now.append(str(case))
        return whole(case, *rest)

    whole = measure.measure
    part, result = tmp_path / "part.jsonl", tmp_path / "r.json"
    monkeypatch.setattr(measure, "measure", stops)
    assert main([*QUICK, "--resume", str(part)]) == 130
    with part.open("a") as file:
        file.write('{"setting": {"thr')  # cut off while it was written
    before, measured_now = measured_now, []
    assert main([*QUICK, "--resume", str(part), "--json", str(result)]) == 0
    rows = json.loads(result.read_text())["runs"][0]["rows"]
    assert len(before) == len(measured_now) == 2 and len(set(keys(rows))) == 4
    assert [" ".join(k) for k in keys(rows)] == before + measured_now

    # Another setting is not mixed in; another machine neither, and that is said.
    measured_now = []
    monkeypatch.setattr(measure, "measure", whole)
    assert main([*QUICK, "--resume", str(part), "--seconds", "0.002"]) == 0
    assert len(part.read_text().splitlines()) == 1 + 4 + 4
    part.write_text(part.read_text().replace(f'"torch": "{torch.__version__}"', '"torch": "0.1"'))
    assert main([*QUICK, "--resume", str(part)]) == 1
    assert "was begun with torch 0.1" in capsys.readouterr().err


TINY = (
    commit_result.Stage("plain", "p", 0.001, tuple(QUICK[2:])),
    commit_result.Stage("huge", "h", 1.0, tuple(QUICK[2:])),
    commit_result.Stage("memory", "m", 1.0, huge_pages=None),
)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A stage's process is this one, and its limits are measured on little memory."""

    def child_run(options: list[str], huge_pages: str, timeout: float) -> Any:
        file = tmp_path / "run.json"
        assert main(["bench", *options, "--json", str(file)]) == 0
        run = json.loads(file.read_text())["runs"][0]
        file.unlink()
        return run

    monkeypatch.setattr(command, "Limits", lambda device: SMALL)
    monkeypatch.setattr(command, "child_run", child_run)


@pytest.mark.usefixtures("in_process")
def test_bench_committed_result_completes_by_running_again(tmp_path: Path, capsys: Any) -> None:
    """The first stage has time for one row per run; the file is written with the last."""
    statuses: list[int] = []
    while 0 not in statuses and len(statuses) < 6:
        statuses.append(commit_result.make(tmp_path, TINY, ("gelu",)))
        files = list(tmp_path.glob("*.json"))
        assert bool(files) == (statuses[-1] == 0)
        assert files or "not complete: plain;" in capsys.readouterr().out
    assert statuses == [1, 1, 1, 0]
    assert list(tmp_path.iterdir()) == files
    result = json.loads(files[0].read_text())
    assert [run["stage"] for run in result["runs"]] == ["plain", "huge"]
    for run in result["runs"]:
        assert run["complete"] and len(set(keys(run["rows"]))) == len(run["rows"]) == 4
    assert len(set(keys(result["memory"]))) == len(result["memory"]) > 4
    assert set(result["peer_versions"]) <= set(result["peers"]) == set(providers.PEERS)


@pytest.mark.usefixtures("in_process")
def test_bench_committed_result_drops_what_another_commit_left(tmp_path: Path) -> None:
    here = machine.describe()
    part = tmp_path / f".{machine.machine_class(here)}" / "huge.jsonl"
    part.parent.mkdir()
    resume.Kept(part, {**here, "commit": "other"}, {"memory": True}).add({"op": "foreign"})
    part.with_suffix(".json").write_text('{"rows": ["foreign"]}')
    assert commit_result.make(tmp_path, TINY[1:2], ("gelu",)) == 0
    assert part.exists() is False and "foreign" not in next(tmp_path.glob("*.json")).read_text()


def test_bench_committed_result_says_how_long_it_takes() -> None:
    minutes = sum(stage.minutes for stage in commit_result.STAGES)
    assert f"together {minutes:g} minutes" in " ".join((commit_result.__doc__ or "").split())
