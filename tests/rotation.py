"""Which part of the conformance kit a run of continuous integration takes.

    LLMOPS_TEST_PART=head/4   one of four, by the commit: the number of first-parent commits up to
                              HEAD modulo 4, so that four successive ones take all four (in a
                              shallow clone: by HEAD's hash)
    LLMOPS_TEST_PART=2/4      this one (0 to 3)
    LLMOPS_TEST_PART=all      everything, which is what a plain run does

Every part holds all tests outside the kit and, for every op and dtype, results and gradients on the
best instruction set (none under Triton's interpreter). What rotates is the kit's other cases and
the tests marked `large` or `rotating`: each is in exactly one part.
"""

from __future__ import annotations

import subprocess
import zlib
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
ALWAYS = ("matches_reference", "gradients")


class Part(NamedTuple):
    index: int
    of: int
    why: str

    def holds(self, name: str, case: Any, best: Any, large: bool = False) -> bool:
        """Whether a test belongs to it; `case` is the kit's Case, None for other tests, of which
        the `large` ones rotate as well."""
        if not large and (case is None or (case.check in ALWAYS and case.target == best)):
            return True
        return zlib.crc32(name.encode()) % self.of == self.index

    def __str__(self) -> str:
        return (
            f"llmops: part {self.index} of {self.of} of the conformance kit ({self.why}); "
            f"LLMOPS_TEST_PART={self.index}/{self.of} runs it again, make test-all runs all"
        )


def parse(text: str, root: Path = ROOT) -> Part | None:
    """None for everything."""
    if text == "all":
        return None
    which, _, parts = text.partition("/")
    if not parts.isdigit() or int(parts) < 1 or not (which == "head" or which.isdigit()):
        raise ValueError(
            f'environment variable LLMOPS_TEST_PART is "all", "head/N" or "K/N"; got {text!r}'
        )
    of = int(parts)
    if which == "head":
        number, why = _of_head(root)
        return Part(number % of, of, why)
    if int(which) >= of:
        raise ValueError(f"environment variable LLMOPS_TEST_PART: {text!r}: parts count from 0")
    return Part(int(which), of, "named")


def _of_head(root: Path) -> tuple[int, str]:
    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        head = git("rev-parse", "HEAD")
        if git("rev-parse", "--is-shallow-repository") == "true":
            return int(head[:8], 16), f"by the hash of commit {head[:12]}"
        count = int(git("rev-list", "--count", "--first-parent", "HEAD"))
        return count, f"commit {head[:12]}, number {count}"
    except (OSError, subprocess.CalledProcessError):  # an unpacked archive
        return 0, "no git here"
