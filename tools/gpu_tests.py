"""The correctness stage of `make gpu`: the conformance kit on the device, file by file, and the
tests of graphs, streams and compile. What takes long there is Triton's compiler.
"""

from __future__ import annotations

import importlib.util
import re
from functools import partial
from pathlib import Path
from typing import Any

import gpu_run
from gpu_run import Unit, python

BEGUN = re.compile(r"^(\S+::(?:.*?\]|\w+))(?= |$)", re.MULTILINE)  # more may be on its line
REASON = re.compile(r"^REASON (\S+::.*?) :: (.*)$", re.MULTILINE)  # of gpu_report.py
VERDICT = re.compile(r"^(\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b", re.MULTILINE)
MAX_FAILURES = 10  # of one test process: its kernels may have left anything in memory


def read_tests(record: dict[str, Any], text: str, status: int | None) -> str:
    """Counts each test's verdict; the one that was running when the process died has one, too."""
    record["continues"] = True
    seen, failures = record.setdefault("seen", []), record.setdefault("failures", [])
    counts = record.setdefault("counts", {})
    fresh, reasons = dict(VERDICT.findall(text)), dict(REASON.findall(text))
    running = [name for name in BEGUN.findall(text) if name not in fresh][-1:]
    if status is None:
        # Killed in the same test twice, and this time it had the whole limit: it hangs.
        if running and not fresh and record.get("running") == running:
            fresh[running[0]] = "HUNG"
        record["running"] = running
    elif running and status not in (0, 1, 5):
        fresh[running[0]] = "CRASHED"
    for name, verdict in fresh.items():
        counts[verdict.lower()] = counts.get(verdict.lower(), 0) + 1
        if verdict not in ("PASSED", "SKIPPED", "XFAIL"):
            failures.append(f"{verdict} {name}: {reasons.get(name, '')}".removesuffix(": "))
    seen += fresh
    if status in (0, 1, 5) and "stopping after" not in text:
        # No test at all is no success: then the GPU's backends were not there.
        return "failed" if failures or not counts.get("passed") else "passed"
    record["in_vain"] = 0 if fresh else record.get("in_vain", 0) + 1
    return "failed" if record["in_vain"] > 2 or not (fresh or status is None) else "cut"


# One thread each: as many processes as cores run at a time.
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}
REPORT = Path(__file__).resolve().parent / "gpu_report.py"


def test_command(files: list[Path], record: dict[str, Any], only: str) -> list[str]:
    wanted = f"(triton or cuda) and {only}" if only else "triton or cuda"
    if importlib.util.find_spec("expecttest") is None:  # torch's opcheck is made with it
        wanted, record["left_out"] = f"({wanted}) and not opcheck", "opcheck: needs expecttest"
    seen = gpu_run.STATE / re.sub(r"\W+", "-", f"{files[0].stem} {only}.seen")
    seen.write_text("".join(f"--deselect={name}\n" for name in record.get("seen", ())))
    options = ["-v", "--tb=short", "-p", "no:cacheprovider", "-k", wanted]
    options += [f"--maxfail={MAX_FAILURES}", f"@{seen}"]
    names = [str(file.relative_to(gpu_run.ROOT)) for file in files]
    return [python(), str(REPORT), *options, *names]


# Rows 2^31 elements apart are tens of GiB on a GPU: one process has all of these, after another.
FAR, NEAR = "far_strides", "not far_strides"
FIRST, THEN = "(matches_reference or gradients)", "not (matches_reference or gradients)"


def test_units() -> list[Unit]:
    """Graphs and streams of every op; the CUDA kernels, for which nothing is compiled; Triton's
    results and gradients of each file, attention's by the dtype, as its kernels take long to
    compile; the kit's other checks; and last what torch.compile makes of each op."""
    from llmops.backends import cuda, triton

    tests = gpu_run.ROOT / "tests"
    texts = {f: f.read_text() for f in sorted(tests.glob("test_*.py"))}
    served = triton.PASSES.keys() - {"scaled_dot_product_attention"}  # it calls attention
    kit = [f for f in texts if "suite(" in texts[f] and f.stem[5:] in served]
    others = [f for f in texts if 'targets("' in texts[f] and "suite(" not in texts[f]]
    attention, device = tests / "test_attention.py", tests / "test_device.py"
    rest = [f for f in kit if f != attention]
    mine, theirs = "cuda and not triton", "triton"

    wanted = [([device], "not compiles")]
    wanted += [([f], f"{mine} and {NEAR}") for f in rest if f.stem[5:] in cuda.PASSES]
    wanted += [([attention], f"{mine} and {check} and {NEAR}") for check in (FIRST, THEN)]
    wanted += [(kit, f"{mine} and {FAR}")]
    wanted += [([f], f"{theirs} and {FIRST}") for f in rest]
    wanted += [([attention], f"{theirs} and {FIRST} and {d}") for d in ("bf16", "fp32", "fp16")]
    wanted += [([f], NEAR) for f in others]
    wanted += [(kit, f"{theirs} and {FAR}")]
    wanted += [([f], f"{theirs} and {THEN} and {NEAR}") for f in [*rest, attention]]
    wanted += [([device], "compiles")]
    units = []
    for chosen, only in wanted:
        name = f"{'kit' if len(chosen) > 1 else chosen[0].stem} {only}"
        command = partial(test_command, chosen, only=only)
        units.append(Unit(name, command, 75, read_tests, ENVIRONMENT))
    return units
