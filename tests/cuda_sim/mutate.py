"""What the simulator's tests notice of a barrier that is not there: removes each __syncthreads,
__syncwarp and cp_async_wait of csrc/cuda in turn, and prints who noticed.

    python tests/cuda_sim/mutate.py                 all of them; fails where one goes unnoticed
    python tests/cuda_sim/mutate.py --part head/4   one of four, by the commit (tests/rotation.py)
    python tests/cuda_sim/mutate.py --no-tsan       by results and faults alone, in half the time
    python tests/cuda_sim/mutate.py --sanitize      nothing removed: AddressSanitizer and
                                                    ThreadSanitizer must find nothing, and the
                                                    first a write past a block put in for it

A mutation is compiled into the first source that includes its file (where that notices nothing,
into the next), and the calls of driver.cpp run under SEEDS schedules: bits that differ from the
unchanged kernels', or a fault, are noticed; so is a race that ThreadSanitizer reports.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import rotation  # noqa: E402
from cuda_sim import build  # noqa: E402

SEEDS = range(1, 9)
WAIT = re.compile(r"\b(__syncthreads\(\)|__syncwarp\([^)]*\)|cp_async_wait<[^>]*>\(\));")
FLAGS = build.FLAGS.split()
SANITIZERS = {"tsan": ["-fsanitize=thread", "-g"], "asan": ["-fsanitize=address", "-g"]}


class Mutation(NamedTuple):
    file: Path
    line: int
    start: int
    end: int
    what: str
    instead: str = "(void)0"

    def __str__(self) -> str:
        return f"{self.file.name}:{self.line} {self.what}"


# What ThreadSanitizer must find is a barrier removed; this is for AddressSanitizer.
PAST_THE_END = "{{ {wait}; volatile char* block = new char[8]; block[8] = 0; delete[] block; }}"


def mutations() -> list[Mutation]:
    found: list[Mutation] = []
    for file in sorted((build.CSRC / "cuda").glob("*")):
        text = file.read_text()
        for match in WAIT.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            found.append(Mutation(file, line, match.start(), match.end() - 1, match.group(1)))
    return found


def users(file: Path) -> list[Path]:
    """The sources that include the file, itself if it is one."""
    if file.suffix == ".cu":
        return [file]
    return [k for k in build.kernels() if f'#include "{file.name}"' in k.read_text()]


def program(folder: Path, changed: Path, compiled: Path, sanitizer: str = "") -> Path:
    """The driver with `compiled` in the place of the source `changed`."""
    own = SANITIZERS.get(sanitizer, [])
    sources = [(HERE / name, [*FLAGS, *own]) for name in ("driver.cpp", *build.MACHINE)]
    sources += [(k, FLAGS) for k in build.kernels() if k != changed]
    output = folder / f"driver.{changed.stem}.{sanitizer}"
    made = [str(o) for o in build.objects(sources)]
    build.run([*build.compiler(), *own, *made, str(compiled), "-o", str(output)])
    return output


def compile_changed(folder: Path, source: Path, mutation: Mutation | None, sanitizer: str) -> Path:
    """The source's object, with the mutation in it or in the header it is in."""
    flags = [*FLAGS, *SANITIZERS.get(sanitizer, [])]
    if mutation is None:
        return build.compiled(source, flags)
    text = mutation.file.read_text()
    text = text[: mutation.start] + mutation.instead + text[mutation.end :]
    # Beside all headers of its folder, so that those find the changed one, too.
    for file in (source, *source.parent.glob("*.h")):
        (folder / file.name).write_text(text if file == mutation.file else file.read_text())
    given = folder / source.name
    output = folder / f"{source.stem}.{sanitizer}.o"
    command = [*build.compiler(), *flags, f"-I{folder}", *build.includes()]
    build.run([*command, "-x", "c++", "-c", str(given), "-o", str(output)])
    return output


def drive(binary: Path, seed: int, only: str) -> tuple[str, str]:
    """What it printed, and what a sanitizer wrote."""
    command = ["setarch", "-R", str(binary), str(seed), only]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    return done.stdout + (f"exit {done.returncode}" if done.returncode else ""), done.stderr


def noticed(mutation: Mutation, tsan: bool) -> str:
    """By whom, "" where by nobody."""
    for source in users(mutation.file):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            right, _ = drive(program(folder, source, build.compiled(source, FLAGS)), 1, source.stem)
            wrong = program(folder, source, compile_changed(folder, source, mutation, ""))
            results = sum(drive(wrong, seed, source.stem)[0] != right for seed in SEEDS)
            by = [f"{results} of {len(SEEDS)} schedules"] if results else []
            if tsan:
                changed = compile_changed(folder, source, mutation, "tsan")
                races = drive(program(folder, source, changed, "tsan"), 1, source.stem)[1]
                by += ["ThreadSanitizer"] if "data race" in races else []
            if by:
                return f"{', '.join(by)} ({source.name})"
    return ""


def sanitize(part: rotation.Part | None) -> int:
    failures = 0
    for sanitizer in SANITIZERS:
        for source in build.kernels():
            if "__global__" not in source.read_text():  # the driver has no calls of it
                continue
            if part is not None and not part.holds(f"{sanitizer} {source.stem}", None, None, True):
                continue
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                made = compile_changed(folder, source, None, sanitizer)
                binary = program(folder, source, made, sanitizer)
                printed, report = drive(binary, 1, source.stem)
            bad = "Sanitizer" in report or "exit" in printed
            failures += bad
            print(f"{sanitizer} {source.name}: {'FAILED' if bad else 'nothing found'}", flush=True)
            if bad:
                print(printed, report[:4000])
    return failures + (not past_the_end_noticed())


def past_the_end_noticed() -> bool:
    """Whether AddressSanitizer sees what a kernel does, on a thread's own stack."""
    wait = next(m for m in mutations() if m.what == "__syncthreads()")
    source = users(wait.file)[0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wrong = wait._replace(instead=PAST_THE_END.format(wait=wait.what))
        made = compile_changed(folder, source, wrong, "asan")
        report = drive(program(folder, source, made, "asan"), 1, source.stem)[1]
    noticed = "heap-buffer-overflow" in report
    print(
        f"asan write past a block at {wait}: {'noticed' if noticed else 'NOT NOTICED'}", flush=True
    )
    return noticed


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--part", default="all")
    parser.add_argument("--no-tsan", action="store_true")
    parser.add_argument("--sanitize", action="store_true")
    given = parser.parse_args()
    part = rotation.parse(given.part)
    if given.sanitize:
        return min(sanitize(part), 1)
    every = mutations()
    chosen = [m for i, m in enumerate(every) if part is None or i % part.of == part.index]
    found = []
    for mutation in chosen:
        found.append(noticed(mutation, not given.no_tsan))
        print(f"{mutation}: {found[-1] or 'NOT NOTICED'}", flush=True)
    print(f"noticed: {sum(map(bool, found))} of {len(chosen)} (of {len(every)} waits in csrc/cuda)")
    return 0 if all(found) else 1


if __name__ == "__main__":
    raise SystemExit(main())
