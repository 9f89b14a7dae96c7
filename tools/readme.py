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
RESULTS = ROOT / "benchmarks" / "results"
# The same run twice: torch as it comes, and with transparent huge pages on for torch too.
RESULT = RESULTS / "cpu-avx512-bf16-2core.json"
HUGE_PAGES = RESULTS / "cpu-avx512-bf16-2core-thp.json"


def support_table() -> str:
    """One row per operator: what each backend computes of it."""
    from llmops.testing import _support

    return _support.table()


def speed_table() -> str:
    """The rows of the committed results, one line per op, pass and shape."""
    plain, huge = (json.loads(file.read_text()) for file in (RESULT, HUGE_PAGES))
    machine: dict[str, Any] = plain["machine"]
    ratios: dict[tuple[str, str, str], dict[str, str]] = {}
    for result, kind in ((plain, ""), (huge, "+")):
        for row in result["rows"]:
            line = ratios.setdefault((row["op"], row["passes"], row["shape"]), {})
            line[row["dtype"] + kind] = f"{row['ratio']:.2f}x"
    lines = [
        f"{machine['cpu']}, {machine['isa']}, {machine['threads']} thread, torch "
        f"{machine['torch']}, commit {machine['commit']}. Times as fast as PyTorch eager; the last "
        "two columns with `THP_MEM_ALLOC_ENABLE=1`, which gives torch's fresh outputs huge pages:",
        "",
        "| op | pass | shape | float32 | bfloat16 | float32, THP | bfloat16, THP |",
        "|---|---|---|---|---|---|---|",
    ]
    columns = ("float32", "bfloat16", "float32+", "bfloat16+")
    for (op, passes, shape), line in ratios.items():
        cells = " | ".join(line.get(c, "–") for c in columns)
        lines.append(f"| `{op}` | {passes} | {shape} | {cells} |")
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
