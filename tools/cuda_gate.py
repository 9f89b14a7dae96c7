"""The gate of the CUDA kernels as nvcc compiled them, without a GPU: registers, stack and shared
memory of every kernel on every architecture, out of the library, against benchmarks/aot/cuda.json.

    python tools/cuda_gate.py LIBRARY            fails where a rule or the table is not held
    python tools/cuda_gate.py LIBRARY --write    renews the table, if the rules hold, of the
                                                 architectures that the library has

Rules: no stack, which is where spilled registers are; static shared memory within 48 KiB; matrix
products on tensor cores in every kernel of TENSOR; against the table: no kernel more or less, no
shared memory more, at most SLACK registers more, and not less than half of those products where
the table counts them. LLMOPS_CUDA_ARCHS narrows the library, and then what is compared or renewed.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "benchmarks" / "aot" / "cuda.json"
SLACK = 8
STATIC_SHARED = 48 << 10
# Kernels that multiply matrices, and what that is in machine code.
TENSOR = (
    "attention_fwd_kernel",
    "attention_decode_kernel",
    "attention_bwd_dkdv_kernel",
    "attention_bwd_dq_kernel",
    "attention_dmask_kernel",
)
PRODUCT = re.compile(r"\bHMMA\.16816\.F32\b")

Entry = dict[str, int]  # registers, shared; products, of TENSOR
Table = dict[str, dict[str, Entry]]  # kernel -> architecture -> entry


def tool(name: str) -> Path:
    """NVIDIA's own, out of Triton's wheel: the toolkit's wheels have no cuobjdump."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def demangled(names: list[str]) -> list[str]:
    done = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def usage(library: Path) -> tuple[Table, list[str]]:
    """What the library has, and the rules that it breaks."""
    dump = subprocess.run(
        [tool("cuobjdump"), "--dump-resource-usage", str(library)],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    found: list[tuple[str, str, dict[str, int]]] = []
    architecture = ""
    kernel = ""
    for line in dump.splitlines():
        if match := re.search(r"^arch = (sm_\w+)", line):
            architecture = match.group(1)
        elif match := re.search(r"Function (\S+):", line):
            kernel = match.group(1)
        elif "REG:" in line:
            numbers = {k: int(v) for k, v in re.findall(r"\b([A-Z]+)(?:\[\d\])?:(\d+)", line)}
            found.append((kernel, architecture, numbers))
    if not found:
        raise SystemExit(f"{library} holds no CUDA kernels:\n{dump[:2000]}")
    names = demangled([f[0] for f in found])
    table: Table = {}
    broken: list[str] = []
    for name, (_, where, numbers) in zip(names, found, strict=True):
        name = short(name)
        entry = {"registers": numbers["REG"], "shared": numbers.get("SHARED", 0)}
        table.setdefault(name, {})[where] = entry
        for kind in ("STACK", "LOCAL"):
            if numbers.get(kind, 0):
                broken.append(f"{name} on {where}: {numbers[kind]} bytes of {kind.lower()}: spills")
        if entry["shared"] > STATIC_SHARED:
            broken.append(f"{name} on {where}: {entry['shared']} bytes of static shared memory")
    mangled = {f[0]: short(name) for name, f in zip(names, found, strict=True)}
    return table, broken + count_products(library, table, mangled)


def short(name: str) -> str:
    """A demangled kernel as the table has it."""
    name = re.sub(r"^void ", "", re.sub(r"\(anonymous namespace\)::|llmops::cuda::", "", name))
    return re.sub(r"\((?:int|bool)\)", "", name).split("(")[0]


def disassembled(library: Path, architecture: str, functions: list[str]) -> str:
    return subprocess.run(
        [tool("cuobjdump"), "-sass", "-arch", architecture, "-fun", ",".join(functions), library],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip


def count_products(library: Path, table: Table, mangled: dict[str, str]) -> list[str]:
    """Into the table, how many products each kernel of TENSOR has on each architecture (to
    disassemble one takes 20 s); which have none."""
    wanted = [m for m, name in mangled.items() if name.split("<")[0] in TENSOR]
    broken: list[str] = []
    for architecture in sorted({a for m in wanted for a in table[mangled[m]]}):
        here = [m for m in wanted if architecture in table[mangled[m]]]
        code = disassembled(library, architecture, here)
        parts = re.split(r"^\s*Function : (\S+)", code, flags=re.MULTILINE)[1:]
        found = {m: len(PRODUCT.findall(c)) for m, c in zip(parts[::2], parts[1::2], strict=True)}
        for m in here:
            table[mangled[m]][architecture]["products"] = found.get(m, 0)
            if not found.get(m):
                broken.append(f"{mangled[m]} on {architecture}: no {PRODUCT.pattern} in its code")
    return broken


def merged(table: Table, known: Table) -> Table:
    """`table`, with what is known of its kernels on the architectures that it does not have."""
    here = {architecture for entries in table.values() for architecture in entries}
    result: Table = {}
    for name in sorted(table):
        others = {a: e for a, e in known.get(name, {}).items() if a not in here}
        result[name] = dict(sorted((others | table[name]).items()))
    return result


def compare(table: Table, known: Table) -> list[str]:
    here = {architecture for entries in table.values() for architecture in entries}
    broken = [f"{name}: not in the table" for name in table.keys() - known.keys()]
    broken += [f"{name}: no longer there" for name in known.keys() - table.keys()]
    for name in sorted(table.keys() & known.keys()):
        for architecture in sorted(here):
            now, before = table[name].get(architecture), known[name].get(architecture)
            if now is None or before is None:
                broken.append(f"{name} on {architecture}: not both in the library and in the table")
                continue
            more = now["registers"] > before["registers"] + SLACK
            fewer = "products" in now and 2 * now["products"] < before.get("products", 0)
            if more or fewer or now["shared"] > before["shared"]:
                broken.append(f"{name} on {architecture}: {now}, in the table {before}")
    return broken


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("library", type=Path)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    table, broken = usage(given.library)
    known = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    if given.write and not broken:
        lines = [f"  {json.dumps(n)}: {json.dumps(e)}" for n, e in merged(table, known).items()]
        TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    if not given.write:
        broken += compare(table, known)
    for line in broken:
        print(line)
    entries = sum(map(len, table.values()))
    print(f"{len(table)} CUDA kernels, {entries} with their architectures: ", end="")
    print("held" if not broken else f"{len(broken)} rules broken; where meant: --write")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
