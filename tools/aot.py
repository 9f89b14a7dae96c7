"""The ahead-of-time gate of the Triton kernels: compiles what their launchers really ask for, for
GPUs that are not there, and holds registers, spills, shared memory and instructions to a table.

    python tools/aot.py                   everything, against benchmarks/aot/<triton version>.json
    python tools/aot.py softmax           these files of tools/aot_calls
    python tools/aot.py --target sm_90    this target, and others named so
    python tools/aot.py --write           renews the table (of what was run), if the rules hold
    python tools/aot.py --part head/8     one part of eight, by the commit, as in tests/rotation.py
    python tools/aot.py --list            the names of the entries; compiles nothing

tools/aot_calls/<op>.py says at which shapes: `calls(make, call)` with make(*shape) a meta tensor of
the dtype in turn (make(..., dtype=...) of another) and call(label, launcher, *args, **kwargs)
running a launcher of llmops.backends.triton, whose result it returns. Triton's own binder then
makes of each launch the specialization that it would compile on a GPU, and each distinct one is an
entry of the table. Rules:

- no spills, but for the entries that `SPILLS` of the op's file names: {"kernel [dtype label]": why}
  (a spill goes to memory: what AMD's compiler moves to lanes of vector registers, or to the
  accumulation registers, is counted apart, as "moved")
- shared memory within the target's limit, the grid within CUDA's
- products of 16-bit values on tensor cores
- against the table: no entry more or less, no spill, nothing moved and no shared memory more, at
  most SLACK registers more, no instruction lost
- every launcher and every kernel of kernels/triton has an entry

Another version of Triton: PYTHONPATH=build/triton-3.6.0 python tools/aot.py --target sm_80 ...
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# Kernels that the interpreter wraps cannot be compiled.
os.environ.pop("TRITON_INTERPRET", None)
os.environ["TRITON_CACHE_DIR"] = str(ROOT / "build" / "aot")
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "tests")]

import rotation  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
from llmops.kernels.triton import _launch  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource, make_backend  # noqa: E402
from triton.runtime.jit import JITFunction, create_function_from_signature  # noqa: E402

from llmops.backends import get  # noqa: E402
from llmops.kernels import triton as kernels  # noqa: E402

TARGETS = {
    **{f"sm_{n}": GPUTarget("cuda", n, 32) for n in (80, 90, 100, 120)},
    **{name: GPUTarget("hip", name, 64) for name in ("gfx90a", "gfx942", "gfx950")},
}
# KiB of shared memory that one program may have.
SHARED = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_120": 99}
SHARED |= {"gfx90a": 64, "gfx942": 64, "gfx950": 160}
TENSOR_CORES = ("HGMMA", "HMMA", "UTCHMMA", "mfma")
# Registers that an entry may have more than the table says.
SLACK = 8
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# fp16 is compiled like bf16, so that one target tells.
FP16_TARGETS = ("sm_90",)
WORKERS = 1
TABLE = ROOT / "benchmarks" / "aot" / f"{triton.__version__}.json"

Entry = dict[str, Any]  # registers, spills, shared, instructions, config; moved where there is


@dataclass(frozen=True)
class Job:
    """One specialization of a kernel, to be compiled for one target."""

    name: str  # of its entry: "softmax softmax_fwd bf16 4096x1024 sm_90", the first word the op's
    target: str
    source: Any
    options: dict[str, Any]
    config: str
    spills: str | None  # why it may spill

    def result(self) -> Entry:
        compiled = triton.compile(self.source, TARGETS[self.target], self.options)
        measure = _nvidia if self.target.startswith("sm") else _amd
        entry = {**measure(compiled.asm), "shared": compiled.metadata.shared, "config": self.config}
        if _multiplies_16_bit(compiled.asm["ttir"]):
            entry["product"] = True
        return entry


def _multiplies_16_bit(ttir: str) -> bool:
    return re.search(r"tt\.dot .*: tensor<[\dx]+x(?:b?f16)>", ttir) is not None


def _nvidia(asm: Any) -> Entry:
    """From the program itself: a spill is an access of local memory."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

    def dump(what: str) -> str:
        done = subprocess.run([tool, what, file.name], capture_output=True, text=True, check=True)
        return done.stdout

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage, program = dump("--dump-resource-usage"), dump("--dump-sass")
    found = re.search(r"REG:(\d+)", usage)
    assert found, usage
    instructions = re.findall(r"\b(HGMMA|HMMA|UTCHMMA|UTMALDG|UTMASTG|LDGSTS)\b", program)
    wide = re.findall(r"\b(LDG|STG)\.(?:\w+\.)*128\b", program)
    return {
        "registers": int(found[1]),
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", program)),
        "instructions": sorted({*instructions, *(f"{w}.128" for w in wide)}),
    }


def _amd(asm: Any) -> Entry:
    text = asm["amdgcn"]

    def value(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        assert found, name
        return int(found[1])

    wide = re.findall(r"\b(?:global|buffer)_(load|store)_dwordx4\b", text)
    names = {"mfma"} if re.search(r"\bv_mfma_", text) else set()
    entry = {"registers": value("vgpr_count"), "spills": 0}
    moved = value("vgpr_spill_count") + value("sgpr_spill_count")
    if moved:
        entry["spills" if value("private_segment_fixed_size") else "moved"] = moved
    return {**entry, "instructions": sorted(names | {f"{w}.128" for w in wide})}


# ---- what to compile -----------------------------------------------------------------------------


class Make:
    """Meta tensors of one dtype: make(4096, 1024); make(4096, dtype=torch.int64)."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device="meta")


def ops() -> list[str]:
    return sorted(m.name for m in pkgutil.iter_modules([str(ROOT / "tools" / "aot_calls")]))


class Recorder:
    """Runs the calls of aot_calls for a target and a dtype; keeps each specialization once."""

    def __init__(self) -> None:
        self.jobs: dict[str, Job] = {}
        self.launchers: set[str] = set()
        self.kernels: set[str] = set()
        self._seen: set[Any] = set()

    def run(self, op: str, target: str, tag: str) -> None:
        module = importlib.import_module(f"aot_calls.{op}")

        def call(label: str, launcher: str, *args: Any, **kwargs: Any) -> Any:
            self.launchers.add(launcher)
            with _launch.recording(target.replace("sm_", "sm")) as launches:
                result = getattr(get("triton"), launcher)(*args, **kwargs)
            if not launches:
                raise AssertionError(f"{op}: {launcher} {label} launched no kernel")
            for launch in launches:
                self._keep(launch, op, f"{tag} {label}", target, module)
            return result

        module.calls(Make(DTYPES[tag]), call)

    def _keep(self, launch: Any, op: str, label: str, target: str, module: Any) -> None:
        self.kernels.add(launch.kernel.__name__)
        source, options, key = _specialize(launch, label, target)
        # Per op, though ops share kernels: the entries of an op are the same in a run of it alone.
        if (op, key, target) in self._seen:
            return
        self._seen.add((op, key, target))
        kernel = launch.kernel.__name__.removesuffix("_kernel")
        # Where a label has several forms of a kernel, they are numbered.
        names = (f"{op} {kernel}{f'#{i}' if i > 1 else ''} {label} {target}" for i in range(1, 100))
        name = next(n for n in names if n not in self.jobs)
        spills = getattr(module, "SPILLS", {}).items()
        why = next((why for what, why in spills if f"{kernel} {label}".startswith(what)), None)
        config = " ".join(f"{k}={v}" for k, v in sorted(launch.constants.items()))
        self.jobs[name] = Job(name, target, source, options, config, why)


def record(names: Iterable[str], targets: Iterable[str]) -> Recorder:
    recorder = Recorder()
    for target in targets:
        for name in names:
            for tag in DTYPES:
                if tag != "fp16" or target in FP16_TARGETS:
                    recorder.run(name, target, tag)
    return recorder


def _specialize(launch: Any, label: str, target: str) -> tuple[Any, dict[str, Any], Any]:
    """The source that Triton would compile for this launch, its options, and what tells it from
    others."""
    kernel = launch.kernel
    grid = (*launch.grid, 1, 1)[:3]
    if grid[0] >= 2**31 or max(grid[1:]) >= 2**16:
        raise AssertionError(f"{kernel.__name__} {label}: a grid of {grid} is beyond CUDA's")
    backend = make_backend(TARGETS[target])
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(**launch.arguments, **launch.constants)
    _, signature, constants, attributes = kernel._pack_args(
        backend, dict(launch.constants), bound, specialization, options
    )
    key = (kernel.__name__, str(signature), str(constants), str(attributes), str(options))
    return ASTSource(kernel, signature, constants, attributes), options, key


def missing(launchers: set[str], called: set[str]) -> Iterator[str]:
    """Launchers and kernels of the package that no call reached."""
    for name in sorted(set(get("triton")._FILES) - launchers):
        yield f"launcher {name}: no call of tools/aot_calls runs it"
    for module in pkgutil.iter_modules(kernels.__path__):
        if module.name == "_interpreter":
            continue
        inside = vars(importlib.import_module(f"{kernels.__name__}.{module.name}"))
        for name, value in inside.items():
            if isinstance(value, JITFunction) and name.endswith("_kernel") and name not in called:
                yield f"kernel {name} of {module.name}.py: no call of tools/aot_calls launches it"


# ---- the rules -----------------------------------------------------------------------------------


def broken(job: Job, entry: Entry) -> Iterator[str]:
    """The rules that an entry breaks by itself."""
    if entry["spills"] and job.spills is None:
        yield f"{entry['spills']} spills ({entry['registers']} registers, {entry['config']})"
    limit = SHARED[job.target] * 1024
    if entry["shared"] > limit:
        yield f"{entry['shared']} bytes of shared memory; {job.target} has {limit}"
    if entry.get("product") and not set(entry["instructions"]) & set(TENSOR_CORES):
        yield f"a product of 16-bit values without tensor cores: {entry['instructions']}"


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
    part = rotation.parse(arguments.part)
    todo = [j for j in every if part is None or zlib.crc32(j.name.encode()) % part.of == part.index]
    start = time.monotonic()
    entries, problems = compile_all(todo, arguments.verbose)
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
        f"triton {triton.__version__}: {len(entries)} of {len(every)} entries{which} compiled in "
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
