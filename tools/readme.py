"""Writes the generated parts of README.md: the support table, from the code, and the measured
numbers, from benchmarks/results.

    python tools/readme.py           rewrite README.md
    python tools/readme.py --check   exit 1 where README.md is not what the code says
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULT = ROOT / "benchmarks" / "results" / "cpu-avx512-bf16-2core.json"


def support_table() -> str:
    """One row per operator: what each backend computes of it."""
    import llmops
    from llmops.backends import cpu, cuda, triton

    lines = ["| op | C++ on CPU | Triton | CUDA C++ | reference |", "|---|---|---|---|---|"]
    for op in llmops.OPERATORS:
        cells = [backend.PASSES.get(op, "–") for backend in (cpu, triton, cuda)]
        lines.append(f"| `{op}` | {' | '.join(cells)} | any device and dtype |")
    return "\n".join(lines)


def speed_table() -> str:
    """The rows of the committed result, one line per op, pass and shape."""
    if not RESULT.exists():
        return "not measured"
    result: dict[str, Any] = json.loads(RESULT.read_text())
    machine = result["machine"]
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        groups.setdefault((row["op"], row["passes"], row["shape"]), []).append(row)
    lines = [
        f"{machine['cpu']}, {machine['isa']}, {machine['threads']} thread, torch "
        f"{machine['torch']}, commit {machine['commit']}. Times as fast as PyTorch eager:",
        "",
        "| op | pass | shape | float32 | bfloat16 |",
        "|---|---|---|---|---|",
    ]
    for (op, passes, shape), rows in groups.items():
        by_dtype = {r["dtype"]: f"{r['ratio']:.2f}x" for r in rows}
        cells = [by_dtype.get(d, "–") for d in ("float32", "bfloat16")]
        lines.append(f"| `{op}` | {passes} | {shape} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def rendered(text: str) -> str:
    """README's text with each generated part replaced."""
    for name, make in (("support", support_table), ("speed", speed_table)):
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        head, rest = text.split(begin, 1)
        text = head + begin + make() + "\n" + end + rest.split(end, 1)[1]
    return text


def main() -> None:
    sys.path.insert(0, str(ROOT))
    text = README.read_text()
    new = rendered(text)
    if "--check" in sys.argv[1:]:
        if new != text:
            raise SystemExit("README.md is not what the code says; run: python tools/readme.py")
        return
    README.write_text(new)


if __name__ == "__main__":
    main()
