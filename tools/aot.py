"""The ahead-of-time gate of the Triton kernels: compiles what their launchers really ask for, for
GPUs that are not there, and holds registers, spills, shared memory and instructions to a table.

    python tools/aot.py                   everything, against benchmarks/aot/<triton version>.json
    python tools/aot.py softmax           these files of tools/aot_calls
    python tools/aot.py --target sm_90    this target, and others named so
    python tools/aot.py --write           renews the table (of what was run), if the rules hold
    python tools/aot.py --part head/8     one part of eight, by the commit, as in tests/rotation.py
    python tools/aot.py --list            the names of the entries; compiles nothing

What is compiled, and how: aot_compile.py. Rules:

- no spills, but for the entries that `SPILLS` of the op's file names: {"kernel [dtype label]": why}
  (a spill goes to memory: what AMD's compiler moves to lanes of vector registers, or to the
  accumulation registers, is counted apart, as "moved")
- shared memory within the target's limit, the grid within CUDA's
- products of 16-bit values on tensor cores, by the instruction that the target has for their size,
  whose operands' addresses come from registers that something has written (sass.py)
- what takes tensor descriptors loads by them: UTMALDG, TMA's instruction
- against the table: no entry more or less, no spill, nothing moved and no shared memory more, at
  most SLACK registers more, no instruction lost
- every launcher and every kernel of kernels/triton has an entry, and some call looks up each answer
  of each configuration table (`entries` of the ops' files)

Another version of Triton: PYTHONPATH=build/triton-3.6.0 python tools/aot.py --target sm_80 ...
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

from aot_compile import ROOT, TARGETS, VERSION, Entry, Job, missing, ops, record, unreached
from rotation import parse as part_of  # of tests, whose path aot_compile knows

# KiB of shared memory that one program may have.
SHARED = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_120": 99}
SHARED |= {"gfx90a": 64, "gfx942": 64, "gfx950": 160}
# What multiplies tiles of 64 rows and more; smaller ones, and elsewhere: HMMA, and mfma of AMD.
LARGE_PRODUCT = {"sm_90": "HGMMA", "sm_100": "UTCHMMA"}
# Registers that an entry may have more than the table says.
SLACK = 8
WORKERS = 1
TABLE = ROOT / "benchmarks" / "aot" / f"{VERSION}.json"


# ---- the rules -----------------------------------------------------------------------------------


def broken(job: Job, entry: Entry) -> Iterator[str]:
    """The rules that an entry breaks by itself."""
    if entry["spills"] and job.spills is None:
        yield f"{entry['spills']} spills ({entry['registers']} registers, {entry['config']})"
    limit = SHARED[job.target] * 1024
    if entry["shared"] > limit:
        yield f"{entry['shared']} bytes of shared memory; {job.target} has {limit}"
    if rows := entry.get("product", 0):
        wanted = "HMMA" if job.target.startswith("sm") else "mfma"
        if rows >= 64:
            wanted = LARGE_PRODUCT.get(job.target, wanted)
        if wanted not in entry["instructions"]:
            yield f"16-bit products of {rows} rows without {wanted}: {entry['instructions']}"
    if entry.get("described") and "UTMALDG" not in entry["instructions"]:
        yield f"tensor descriptors without UTMALDG: {entry['instructions']}"
    for what in entry.get("undefined", ()):
        yield f"a register that nothing has written: {what}"


def grown(old: Entry, new: Entry) -> Iterator[str]:
    """What is worse than in the table."""
    for what, slack in (("registers", SLACK), ("spills", 0), ("moved", 0), ("shared", 0)):
        before, now = old.get(what, 0), new.get(what, 0)
        if now > before + slack:
            yield f"{what} {before} -> {now}" + (f" (slack {slack})" if slack else "")
    lost = set(old["instructions"]) - set(new["instructions"])
    if lost:
        yield f"no longer uses {', '.join(sorted(lost))}"


def compare(
    old: dict[str, Entry], new: dict[str, Entry], expected: set[str], known: set[str]
) -> list[str]:
    """`new` was compiled; `expected` are the names of all entries of what was asked for, `known`
    those of the table that belong to it."""
    problems: list[str] = []
    for names, what in (
        (sorted(expected - known), "not in the table"),
        (sorted(known - expected), "in the table, and nothing launches it"),
    ):
        problems += [f"{name}: {what}" for name in names[:5]]
        if len(names) > 5:
            problems.append(f"... and {len(names) - 5} more entries: {what}")
    for name, entry in new.items():
        if name in old:
            problems += [f"{name}: {what}" for what in grown(old[name], entry)]
    return problems


def read(file: Path) -> dict[str, Entry]:
    return json.loads(file.read_text()) if file.exists() else {}


def write(file: Path, table: dict[str, Entry]) -> None:
    """One line per entry, sorted."""
    lines = [f"{json.dumps(name)}: {json.dumps(table[name])}" for name in sorted(table)]
    file.parent.mkdir(exist_ok=True)
    file.write_text("{\n" + ",\n".join(lines) + "\n}\n")


# ---- the command ---------------------------------------------------------------------------------

_todo: list[Job] = []  # inherited by the workers, which are forks


def _work(index: int) -> tuple[int, Entry | str, float]:
    start = time.perf_counter()
    try:
        return index, _todo[index].result(), time.perf_counter() - start
    except Exception as error:  # whatever a compiler may raise is the entry's result
        return index, f"does not compile: {type(error).__name__}: {error}", 0.0


def compile_all(todo: list[Job], verbose: bool) -> tuple[dict[str, Entry], list[str]]:
    """The entries, and what is wrong with them."""
    _todo[:] = todo
    entries: dict[str, Entry] = {}
    problems: list[str] = []
    with multiprocessing.get_context("fork").Pool(WORKERS) as pool:
        for index, entry, seconds in pool.imap_unordered(_work, range(len(todo))):
            job = todo[index]
            if isinstance(entry, str):
                problems.append(f"{job.name}: {entry}")
                continue
            problems += [f"{job.name}: {what}" for what in broken(job, entry)]
            entry.pop("product", None)
            entry.pop("described", None)
            if entry["spills"] and job.spills:
                entry["why"] = job.spills
            entries[job.name] = entry
            if verbose:
                print(f"{seconds:5.1f}s {job.name}: {_short(entry)}", flush=True)
    return entries, problems


def _short(entry: Entry) -> str:
    return (
        f"{entry['registers']} registers, {entry['spills']} spills, {entry['shared']} shared, "
        f"{' '.join(entry['instructions'])}"
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("ops", nargs="*", help="files of tools/aot_calls; all where none is named")
    parser.add_argument("--target", action="append", choices=[*TARGETS], metavar="TARGET")
    parser.add_argument("--write", action="store_true", help="renew the table")
    parser.add_argument("--part", default="all", help="all, head/N or K/N, as in tests/rotation.py")
    parser.add_argument("--list", action="store_true", help="name the entries")
    parser.add_argument("-v", "--verbose", action="store_true", help="a line per entry")
    arguments = parser.parse_args(argv)
    unknown = set(arguments.ops) - set(ops())
    if unknown:
        parser.error(f"no {', '.join(sorted(unknown))} in tools/aot_calls; there are {ops()}")
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    names, targets = arguments.ops or ops(), arguments.target or [*TARGETS]
    whole = not arguments.ops
    recorder = record(names, targets)
    every = list(recorder.jobs.values())
    if arguments.list:
        print("\n".join(job.name for job in every))
        return 0
    part = part_of(arguments.part)
    todo = [j for j in every if part is None or zlib.crc32(j.name.encode()) % part.of == part.index]
    start = time.monotonic()
    entries, problems = compile_all(todo, arguments.verbose)
    problems += unreached(recorder.choices, names)
    if whole:
        problems += missing(recorder.launchers, recorder.kernels)
    table = read(TABLE)
    expected = {job.name for job in every}
    # Entries of an op that is no more are found by a run over all ops only.
    known = {
        name
        for name in table
        if name.split()[-1] in targets and (whole or name.split()[0] in names)
    }
    if not arguments.write:
        problems += compare(table, entries, expected, known)
    which = "" if part is None else f" (part {part.index} of {part.of}, {part.why})"
    print(
        f"triton {VERSION}: {len(entries)} of {len(every)} entries{which} compiled in "
        f"{time.monotonic() - start:.0f} s"
    )
    if problems:
        again = " ".join(["python tools/aot.py", *arguments.ops, "--write"])
        print("\n".join(problems))
        print(
            f"aot: {len(problems)} problems. Where growth is meant, `{again}` renews "
            f"{TABLE.relative_to(ROOT)}; say why in the commit."
        )
        return 1
    if arguments.write:
        kept = {name: entry for name, entry in table.items() if name not in known - expected}
        write(TABLE, kept | entries)
        print(f"wrote {TABLE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
