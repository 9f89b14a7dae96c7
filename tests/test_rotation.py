"""N successive commits run the whole conformance kit, and every one of them every op."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_sim import build
from rotation import ROOT, parse

from llmops.testing import specs, targets
from llmops.testing._suite import Case, cases


def every_case() -> list[tuple[str, Case]]:
    found = specs.every()
    some = [found[name] for name in ("gelu", "rms_norm", "softmax")]
    return [(f"{s.name}-{c.check}-{c.id}", c) for s in some for c in cases(s)]


def test_rotation_parts_make_the_whole() -> None:
    best, every = targets()[-1], every_case()
    parts = [parse(f"{i}/4") for i in range(4)]
    held = [{n for n, c in every if part and part.holds(n, c, best)} for part in parts]
    assert set.union(*held) == {n for n, _ in every}
    always = {n for n, c in every if c.check in ("matches_reference", "gradients")}
    for part in held:
        assert len(part) < 0.6 * len(every)
        assert {n for n in always if f"-{best}-" in n} <= part
    assert len({frozenset(part) for part in held}) == 4


def test_rotation_goes_by_the_commit(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True)

    git("init", "-q")
    seen = []
    for i in range(5):
        git("commit", "-q", "--allow-empty", "-m", str(i))
        part = parse("head/3", tmp_path)
        assert part is not None and part == parse("head/3", tmp_path)
        seen.append(part.index)
    assert set(seen[:3]) == set(seen[1:4]) == set(seen[2:]) == {0, 1, 2}


@pytest.mark.parametrize("text", ["", "3", "4/4", "x/4", "1/0", "head", "-1/3"])
def test_rotation_rejects(text: str) -> None:
    with pytest.raises(ValueError, match="LLMOPS_TEST_PART"):
        parse(text)


def test_rotation_all_is_all() -> None:
    assert parse("all") is None


def test_rotation_has_every_test_of_the_simulated_kernels() -> None:
    """`make test-cuda` tells them by their ids, in which the target may stand first or last."""
    if reason := build.why_not():
        pytest.skip(reason)
    of_make = subprocess.run(
        ["make", "-n", "test-cuda", "INSTALLED=1"], cwd=ROOT, capture_output=True, text=True
    ).stdout
    expression = re.search(r'-k "(.*?)"', of_make)
    assert expression, of_make

    def collected(*options: str) -> set[str]:
        files = [f"tests/test_{op}.py" for op in ("gelu", "rope", "rms_norm")]
        command = [sys.executable, "-m", "pytest", "-q", "--collect-only", *options, *files]
        environment = {**os.environ, "LLMOPS_CUDA_SIM": "1", "LLMOPS_TEST_PART": "all"}
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
        return {line for line in done.stdout.splitlines() if "::" in line}

    of_target = {name for name in collected() if re.search(r"[\[-]cuda[\]-]", name)}
    assert any(name.endswith("-cuda]") for name in of_target)
    assert collected("-k", expression[1]) == of_target
