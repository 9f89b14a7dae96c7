"""Writes what is generated: README.md's support table, from the code, and measured numbers, from
benchmarks/results; llmops/ops/README.md, the schemas of all operators.

    python tools/readme.py           rewrite them
    python tools/readme.py --check   exit 1 where one is not what the code says
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
SCHEMAS = ROOT / "llmops" / "ops" / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
# Not one op at a time, or a curve: these have their own lines or stay in the JSON.
APART = ("model", "overhead")
DTYPES = ("float32", "bfloat16")


def support_table() -> str:
    """One row per operator: what each backend computes of it."""
    from llmops.testing import _support

    return _support.table()


Row = dict[str, Any]


def _runs(result: dict[str, Any]) -> tuple[list[Row], list[Row]]:
    """The rows of one thread over all cases: torch as it comes, and with huge pages."""
    sides: tuple[list[Row], list[Row]] = [], []
    for run in result["runs"]:
        if run.get("stage", "plain") in ("plain", "huge", "models"):
            sides[bool(run["torch_huge_pages"])].extend(run["rows"])
    return sides


def _kind(row: Row) -> str:
    """What sort of shape: attention's decode and prefill are different kernels."""
    if row["op"] == "attention":
        if row["shape"].startswith("decode"):
            return "attention, decode"
        return "attention"
    return str(row["op"])


def _cell(rows: list[Row]) -> str:
    """Median and range of the ratios; the range shows where ours is slower."""
    ratios = sorted(row["ratio"] for row in rows if row["ratio"])
    if not ratios:
        return "not measured"
    middle = statistics.median(ratios)
    if len(ratios) == 1:
        return f"{middle:.1f}x"
    return f"**{middle:.1f}x** ({ratios[0]:.1f}–{ratios[-1]:.1f})"


def speed_table() -> str:
    """The committed result of each class of CPU, the latest first; those of `make gpu` have other
    stages."""
    results = [(file, json.loads(file.read_text())) for file in sorted(RESULTS.glob("cpu-*.json"))]
    results.sort(key=lambda found: _date(found[1]["machine"]), reverse=True)
    return "\n\n".join(_speed_of(file, result) for file, result in results)


def _date(machine: dict[str, Any]) -> str:
    return str(machine.get("date", ""))  # results of early commits do not say


def _speed_of(file: Path, result: dict[str, Any]) -> str:
    """One line per op and pass of a result: medians over its shapes."""
    machine: dict[str, Any] = result["machine"]
    plain, huge = _runs(result)
    groups: dict[tuple[str, str], None] = {}
    for row in plain:
        if row["op"] not in APART and not row.get("curve"):
            groups[_kind(row), row["passes"]] = None
    threads = result["runs"][0]["threads"]
    day = f" of {_date(machine)}" if _date(machine) else ""
    lines = [
        f"{machine['cpu']}, {machine['isa']}, {threads} thread, torch {machine['torch']}, commit "
        f"{machine['commit']}{day}. Times as fast as PyTorch: median over the measured "
        "shapes, lowest and highest in brackets; the last two columns with "
        "`THP_MEM_ALLOC_ENABLE=1`, which gives torch's fresh outputs huge pages as ours have them. "
        "Every row, with microseconds, share "
        f"of the machine's limits and spread: [`{file.relative_to(ROOT)}`]"
        f"({file.relative_to(ROOT)}).",
        "",
        "| op | pass | shapes | float32 | bfloat16 | float32, THP | bfloat16, THP |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind, passes in groups:
        cells, shapes = [], set()
        for rows in (plain, huge):
            for dtype in DTYPES:
                mine = [
                    row
                    for row in rows
                    if (_kind(row), row["passes"], row["dtype"]) == (kind, passes, dtype)
                    and not row.get("curve")
                ]
                shapes |= {row["shape"] for row in mine}
                cells.append(_cell(mine))
        lines.append(f"| {kind} | {passes} | {len(shapes)} | {' | '.join(cells)} |")
    lines += _model_lines(plain)
    return "\n".join(lines)


def _model_lines(plain: list[Row]) -> list[str]:
    """Whole models, in tokens per second."""
    rows = [row for row in plain if row["op"] == "model" and row["ours_us"] and row["torch_us"]]
    if not rows:
        return []
    lines = [
        "",
        "Whole models of random weights, one thread of each side:",
        "",
        "| model | pass | dtype | ms, ours | ms, plain PyTorch | tokens/s, ours | "
        "tokens/s, plain PyTorch | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        sides = (row["ours_us"], row["torch_us"])
        cells = [row["shape"], row["passes"], row["dtype"], *(f"{us / 1e3:.1f}" for us in sides)]
        cells += [_tokens_per_s(row, us) for us in sides]
        lines.append(f"| {' | '.join(cells)} | {row['ratio']:.2f}x |")
    return lines


def _tokens_per_s(row: Row, us: float) -> str:
    tokens = row.get("tokens")  # results of early commits do not say
    return f"{tokens / us * 1e6:.1f}" if tokens else "–"


def gpu_table() -> str:
    """The committed result of each GPU: row ops by the share of a copy's bandwidth they reach,
    attention by its rate."""
    files = sorted(RESULTS.glob("cuda-*.json"))
    return "\n\n".join(_gpu_of(file, json.loads(file.read_text())) for file in files)


def _gpu_of(file: Path, result: dict[str, Any]) -> str:
    machine = result["machine"]
    limits = {k: v for run in reversed(result["runs"]) for k, v in run["limits"].items()}
    # Of an earlier commit, kept where nothing newer was measured.
    older = [f"{r['stage']}: of commit {r['commit']}" for r in result["runs"] if "commit" in r]
    kept = "".join(f" ({text})" for text in older)
    rows = [row for run in result["runs"] for row in run["rows"] if row["ours_us"]]
    name = file.relative_to(ROOT)
    lines = [
        f"{machine['gpu']}, driver {machine['driver_version']}, torch {machine['torch']}, Triton "
        f"{machine['triton']}, commit {machine['commit']} of {_date(machine)}{kept}; a copy there "
        f"moves {limits['copy_gbs'] / 1e3:.2f} TB/s, a bf16 matrix product runs at "
        f"{limits['flops_bfloat16_gflops'] / 1e3:.0f} TFLOP/s, both measured there. "
        f"bf16; lowest and highest over the shapes. Every row: [`{name}`]({name}).",
        "",
        "| op | pass | shapes | Triton | CUDA C++ | torch |",
        "|---|---|---|---|---|---|",
    ]
    for (op, passes), chosen, tells in _gpu_groups(rows, limits):
        cells = [
            _range([tells(row, us) for row in chosen for us in _times(row, provider)])
            for provider in ("llmops", "llmops cuda", "torch")
        ]
        lines.append(f"| {op} | {passes} | {len(chosen)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _gpu_groups(rows: list[Row], limits: dict[str, float]) -> list[Any]:
    """(op and pass, its rows, what a cell says of a row and a time)."""

    def share(row: Row, us: float) -> float:
        return float(100 * row["bytes"] / us / 1e3 / limits["copy_gbs"])

    def rate(row: Row, us: float) -> float:
        return float(row["flops"] / us / 1e6)

    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["dtype"] != "bfloat16":
            continue
        if " grid " in row["shape"]:
            kind, size = row["shape"].split(" grid ")
            title = f"attention, {kind}, D {size.split('x')[-1]}, TFLOP/s"
        elif "bandwidth" in row["shape"] or _spans(row):
            title = f"{_kind(row)}, % of copy"
        else:
            continue
        groups.setdefault((title, row["passes"]), []).append(row)
    return [
        (title, chosen, rate if "TFLOP/s" in title[0] else share)
        for title, chosen in groups.items()
    ]


def _spans(row: Row) -> bool:
    """Ops of several shapes, of which those that a GPU's cache does not hold tell."""
    return row["op"] in ("rope_qk", "rope_qk_", "attention_kvcache") and row["bytes"] > 2**28


def _times(row: Row, provider: str) -> list[float]:
    return [r["us"] for r in row["results"] if r["provider"] == provider and r["us"]]


def _range(values: list[float]) -> str:
    if not values:
        return "–"
    ends = [f"{end(values):.0f}" for end in (min, max)]
    return "–".join(dict.fromkeys(ends))


def schemas() -> str:
    """Every operator of torch.ops.llmops with its full argument list."""
    import torch

    import llmops

    assert llmops.OPERATORS
    found = sorted(
        str(schema)
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("llmops::")
    )
    listed = "\n".join(s.removeprefix("llmops::") for s in found)
    return f"""# The operators beneath the public functions

`torch.ops.llmops.*`: what compiled graphs, export and other languages see. `backend` is the name
that the front door resolved; the public functions in this folder check arguments and fill in
defaults. Written by `python tools/readme.py`.

```
{listed}
```
"""


def rendered(text: str) -> str:
    """README's text with each generated part replaced."""
    for name, make in (("support", support_table), ("speed", speed_table), ("gpu", gpu_table)):
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        head, rest = text.split(begin, 1)
        text = head + begin + make() + "\n" + end + rest.split(end, 1)[1]
    return text


def main() -> None:
    sys.path.insert(0, str(ROOT))
    for file, new in ((README, rendered(README.read_text())), (SCHEMAS, schemas())):
        if "--check" not in sys.argv[1:]:
            file.write_text(new)
        elif not file.exists() or file.read_text() != new:
            name = file.relative_to(ROOT)
            raise SystemExit(f"{name} is not what the code says; run: python tools/readme.py")


if __name__ == "__main__":
    main()
