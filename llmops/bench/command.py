"""`llmops bench`: plans the runs, shows them, writes JSON, CSV and HTML, compares with earlier.

A run is one process setting: a number of threads, and torch with or without huge pages. Huge pages
(THP_MEM_ALLOC_ENABLE) are read when a process starts, so the run with the other setting is this
same command again in a process of its own.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from llmops.bench import cases, compare, machine, measure, memory, providers, table
from llmops.bench.harness import Case
from llmops.bench.limits import Limits
from llmops.bench.resume import Kept

FORMAT = 2
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
QUICK_MINUTES = 1.5  # of limits and rows; with the start and the last row, below two


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("ops", nargs="*", help=f"of {', '.join(cases.known())}; all but the last where none")
    add("--quick", action="store_true", help="one shape per op and dtype, within two minutes")
    add("--threads", default="1", help='a number, "all", or several as in 1,all (default 1)')
    add("--dtype", action="append", choices=cases.DTYPES, help="only this one; may be repeated")
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add(
        "--huge-pages",
        choices=("off", "on", "both"),
        help="for torch on CPU (default: both; with --quick: off)",
    )
    add(
        "--with",
        dest="groups",
        action="append",
        choices=(*providers.GROUPS, "all"),
        help="further providers: our other instruction sets and backends, torch.compile, other "
        "libraries; may be repeated",
    )
    add("--memory", action="store_true", help="also the peak memory of forward and backward")
    add("--seconds", type=float, help="time per row (default 0.6; with --quick 0.15)")
    add("--minutes", type=float, help="begin no row after this time in a run")
    add(
        "--resume",
        metavar="FILE",
        help="rows go there as they are measured, and those that it has already are not measured "
        "again: a run that is cut short goes on when it is begun again",
    )
    add("--json", metavar="FILE", help="write the rows, the limits and the machine there")
    add("--csv", metavar="FILE", help="write the rows there")
    add("--html", metavar="FILE", help="write a report with charts there, one file")
    add("--compare", metavar="FILE", help="with an earlier --json; exit status 1 on a regression")
    add("--plain", action="store_true", help="lines instead of a progress bar and a rich table")
    add(
        "--commit-result",
        nargs="?",
        const="benchmarks/results",
        metavar="FOLDER",
        help="remake this class of machine's file in FOLDER (default %(const)s); it goes on where "
        "an interrupted one stopped",
    )


def run(arguments: argparse.Namespace) -> int:
    _validate(arguments)
    if arguments.commit_result:
        from llmops.bench.commit_result import make

        return make(Path(arguments.commit_result))
    quick = arguments.quick
    wanted = arguments.huge_pages or ("off" if quick or arguments.device != "cpu" else "both")
    here = "on" if os.environ.get(HUGE_PAGES) == "1" else "off"
    old = json.loads(Path(arguments.compare).read_text()) if arguments.compare else None
    runs: list[dict[str, Any]] = []
    for setting in ("off", "on") if wanted == "both" else (wanted,):
        for threads in _threads(arguments.threads):
            if setting == here:
                runs.append(_run_here(arguments, threads))
            else:
                runs.append(_run_elsewhere(arguments, threads, setting))
    result: dict[str, Any] = {"format": FORMAT, "machine": machine.describe(), "runs": runs}
    if arguments.memory:
        print("peak memory ...", flush=True)
        result["memory"] = list(memory.rows(arguments.ops, quick, arguments.dtype or []))
        for row in result["memory"]:
            print(_memory_line(row))
    if "peers" in _groups(arguments):
        result["peers"] = providers.availability()
        result["peer_versions"] = providers.versions()
        print("other libraries:")
        for name, state in result["peers"].items():
            version = result["peer_versions"].get(name, "")
            print(f"  {name} {version}: {state or 'takes part where it has the op'}")
    write(result, arguments.json, arguments.csv, arguments.html)
    rows = [measure.from_json(r) for one in runs for r in one["rows"]]
    status = 1 if any(row.wrong for row in rows) else 0
    if old is not None:
        plain = [measure.from_json(r) for r in runs[0]["rows"]]
        lines, regressed = compare.report(old, plain, result["machine"])
        print("\n".join(lines))
        status = status or int(regressed)
    return status


def _validate(arguments: argparse.Namespace) -> None:
    unknown = [op for op in arguments.ops if op not in cases.known()]
    if unknown:
        raise ValueError(
            f"llmops bench: no cases for {', '.join(unknown)}; there are {', '.join(cases.known())}"
        )
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("llmops bench: --device cuda needs a CUDA GPU, and torch sees none")
    if arguments.device != "cpu" and arguments.memory:
        raise ValueError("llmops bench: --memory reads the CPU's memory; leave out --device cuda")
    for name in ("seconds", "minutes"):
        value = getattr(arguments, name)
        if value is not None and not value > 0:
            raise ValueError(f"llmops bench: --{name} must be above 0, got {value}")
    _threads(arguments.threads)
    if arguments.compare and not Path(arguments.compare).is_file():
        raise FileNotFoundError(f"llmops bench: --compare {arguments.compare}: no such file")
    for name in ("json", "csv", "html", "resume"):  # now, not after the minutes of measuring
        file = getattr(arguments, name)
        if file and not Path(file).absolute().parent.is_dir():
            raise FileNotFoundError(f"llmops bench: --{name} {file}: its folder does not exist")


def _threads(text: str) -> list[int]:
    counts = []
    for word in text.split(","):
        count = machine.cores() if word == "all" else int(word) if word.isdigit() else 0
        if count < 1:
            raise ValueError(
                f'llmops bench: --threads must be numbers of at least 1 or "all", got {text!r}'
            )
        if count not in counts:
            counts.append(count)
    return counts


def _groups(arguments: argparse.Namespace) -> list[str]:
    groups = arguments.groups or []
    return list(providers.GROUPS) if "all" in groups else list(dict.fromkeys(groups))


def _run_here(arguments: argparse.Namespace, threads: int) -> dict[str, Any]:
    """One run in this process."""
    torch.set_num_threads(threads)
    quick = arguments.quick
    seconds = arguments.seconds or (0.15 if quick else 0.6)
    minutes = arguments.minutes or (QUICK_MINUTES if quick else None)
    huge = os.environ.get(HUGE_PAGES) == "1"
    start = time.monotonic()
    limits = Limits(arguments.device)
    kind = ", torch with huge pages" if huge else ""
    print(f"{threads} thread{'s' if threads > 1 else ''}{kind}", flush=True)
    rows: list[measure.Row] = []
    skipped = measured = 0
    kept = _kept(arguments, threads, huge, seconds)
    names = arguments.ops or cases.names()
    with table.display(len(names), arguments.plain) as show:
        for at, case in _numbered(names, arguments):
            held = kept and kept.find(**_named(case))
            if held:
                rows.append(measure.from_json(held))
                show(rows[-1], at)
                continue
            left = None if minutes is None else 60 * minutes - (time.monotonic() - start)
            if left is not None and left < 0 and measured:
                skipped += 1
                break
            # With a time of one's own a long row comes first in the next run, and has it all.
            if not arguments.minutes and _expected_seconds(case, limits) > (left or math.inf):
                print(f"left out, it would take too long for --quick here: {case}")
                continue
            rows.append(measure.measure(case, limits, seconds, _groups(arguments)))
            measured += 1  # one at least, or a run that goes on might never end
            if kept:
                kept.add(measure.as_json([rows[-1]])[0])
            show(rows[-1], at)
    if skipped:
        print(f"time is up after {minutes:g} minutes: the cases that follow were not measured")
    print(table.NOTES)
    print(table.limits_line(limits.as_json()), flush=True)
    return {
        "threads": threads,
        "torch_huge_pages": huge,
        "seconds_per_row": seconds,
        "complete": not skipped,
        "limits": limits.as_json(),
        "rows": measure.as_json(rows),
    }


def _numbered(names: list[str], arguments: argparse.Namespace) -> Iterator[tuple[int, Case]]:
    """Each case, and how many ops are done before it."""
    for at, name in enumerate(names):
        chosen = cases.collect([name], arguments.quick, arguments.dtype or (), arguments.device)
        yield from ((at, case) for case in chosen)


def _named(case: Case) -> dict[str, str]:
    return {"op": case.op, "passes": case.passes, "dtype": case.dtype_name, "shape": case.shape}


def _kept(arguments: argparse.Namespace, threads: int, huge: bool, seconds: float) -> Kept | None:
    if not arguments.resume:
        return None
    setting = {
        "threads": threads,
        "torch_huge_pages": huge,
        "seconds": seconds,
        "device": arguments.device,
        "with": sorted(_groups(arguments)),
    }
    return Kept(Path(arguments.resume), machine.describe(), setting)


def _expected_seconds(case: Case, limits: Limits) -> float:
    """A guess for the whole row from its flops: about 14 runs, at half the machine's rate; torch's
    16-bit products, where the processor has none, were seen at a tenth of that."""
    slow = limits.device == "cpu" and case.dtype != torch.float32
    native = limits.flops(case.dtype) > limits.flops(torch.float32)
    rate = limits.flops(torch.float32) * (0.05 if slow and not native else 0.5)
    return 14 * case.flops / (rate * 1e9)


def _run_elsewhere(arguments: argparse.Namespace, threads: int, setting: str) -> dict[str, Any]:
    """The same run in a process with the other setting of huge pages."""
    options = ["--threads", str(threads), "--huge-pages", setting, "--device", arguments.device]
    options += ["--quick"] * arguments.quick + ["--plain"] * arguments.plain
    options += [x for d in arguments.dtype or () for x in ("--dtype", d)]
    options += [x for g in _groups(arguments) for x in ("--with", g)]
    for name in ("seconds", "minutes", "resume"):
        if getattr(arguments, name):
            options += [f"--{name}", str(getattr(arguments, name))]
    return child_run([*arguments.ops, *options], setting)


def child_run(options: list[str], huge_pages: str, timeout: float | None = None) -> dict[str, Any]:
    """`llmops bench` with these options in a process of its own: its one run."""
    environment = {**os.environ, HUGE_PAGES: "1" if huge_pages == "on" else "0"}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.json"
        command = [sys.executable, "-m", "llmops", "bench", *options, "--json", str(file)]
        status = subprocess.run(command, env=environment, check=False, timeout=timeout).returncode
        if not file.exists():
            raise ValueError(f"llmops bench: the run `{' '.join(options)}` ended with {status}")
        return json.loads(file.read_text())["runs"][0]


def _memory_line(row: dict[str, Any]) -> str:
    sizes = [row[f"{who}_bytes"] for who in ("ours", "torch")]
    texts = ["fails" if x is None else f"{x / 2**20:.1f} MiB" for x in sizes]
    what = f"{row['op']} {row['passes']} {row['dtype']} {row['shape']}"
    return f"  {what}: ours {texts[0]}, torch {texts[1]}"


def write(result: dict[str, Any], json_file: Any, csv_file: Any, html_file: Any) -> None:
    if json_file:
        Path(json_file).write_text(json.dumps(result, indent=1) + "\n")
    if csv_file:
        with open(csv_file, "w", newline="") as file:
            _write_csv(result, file)
    if html_file:
        from llmops.bench import report

        Path(html_file).write_text(report.html(result), encoding="utf-8")


def _write_csv(result: dict[str, Any], file: Any) -> None:
    """One line per row and provider."""
    fields = ["op", "passes", "dtype", "shape", "threads", "bytes", "flops"]
    writer = csv.writer(file)
    last = ("torch_huge_pages", "provider", "us", "iqr_us", "tokens_per_s", "note")
    writer.writerow([*fields, *last])
    for one in result["runs"]:
        for row in one["rows"]:
            for r in row["results"]:
                name = row["torch_name"] if r["provider"] == "torch" else ""
                provider = r["provider"] + (f" ({name})" if name else "")
                rate = measure.from_json(row).tokens_per_s(r["us"])
                values = [provider, r["us"], r["iqr_us"], rate, r["note"]]
                writer.writerow([*(row[f] for f in fields), one["torch_huge_pages"], *values])
