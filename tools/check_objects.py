"""Fails when a per-ISA kernel object defines a weak or unique symbol.

    python tools/check_objects.py BUILD_DIR

The linker keeps one copy of each weak (inline, template) symbol, from any object: were it the one
compiled with AVX-512 flags, code that an older processor runs would crash there. Kernel objects
therefore export only their own namespaced functions.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ISAS = ("scalar", "avx2", "avx512", "avx512_bf16")


def offending_symbols(objects: Path) -> list[str]:
    """Lines "object: symbol" for each symbol that the linker could share between ISAs."""
    files = [f for isa in ISAS for f in sorted(objects.rglob(f"*.{isa}.o"))]
    if not files:
        raise SystemExit(f"check_objects: no kernel objects under {objects}; build first")
    found = []
    for file in files:
        isa = file.name.split(".")[-2]
        listing = subprocess.run(
            ["nm", "--defined-only", "--demangle", str(file)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for line in listing.splitlines():
            _, kind, symbol = line.split(maxsplit=2)
            shared = kind in "WwVvu"
            foreign = kind == "T" and not symbol.startswith(f"llmops::cpu::{isa}::")
            if shared or foreign:
                found.append(f"{file.name}: {kind} {symbol}")
    return found


def main() -> None:
    found = offending_symbols(Path(sys.argv[1] if len(sys.argv) > 1 else "build"))
    if found:
        raise SystemExit("kernel objects share symbols between ISAs:\n" + "\n".join(found))
    print("kernel objects: no shared symbols")


if __name__ == "__main__":
    main()
