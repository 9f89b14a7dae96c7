"""`llmops tune` without a GPU: its search, with times that are made up, and its file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def in_fresh_python(code: str, file: Path, interpret: str) -> str:
    environment = {**os.environ, "LLMOPS_TUNED": str(file), "TRITON_INTERPRET": interpret}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, cwd=ROOT, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


SEARCH = """
import torch, llmops
from llmops.bench import tune
from llmops.bench.harness import Case, with_backward
from llmops.kernels.triton import _config, softmax
x = torch.randn(6, 40)
ours = with_backward("fwd", lambda t: llmops.softmax(t, backend="triton"), (x,))
case = Case("softmax", "fwd", torch.float32, "", ours,
            with_backward("fwd", lambda t: torch.softmax(t, -1), (x,)))
options = [{"BLOCK": 32}, {"ROWS": 2}, {"ROWS": 4}, {"BLOCK": 48}]
softmax.candidates = lambda key: options
seconds = {}

def time(call, number):  # BLOCK=32 is too short for these rows and wrong: it must not come here
    return seconds.get(str(_config._overrides["softmax"]), 1.0)

seconds["{'BLOCK': 32}"], seconds["{'BLOCK': 48}"] = 0.01, 0.01
seconds["{'ROWS': 4}"] = 0.99
assert tune.search([case], time) == {}  # a gain below GAIN is noise
seconds["{'ROWS': 4}"], seconds["{'ROWS': 2}"] = 0.5, 0.6
found = tune.search([case, case], time)
assert found == {"softmax": {(64, torch.float32): {"ROWS": 4}}}, found
"""


def test_tune_keeps_the_fastest_right_candidate(tmp_path: Path) -> None:
    out = in_fresh_python(SEARCH, tmp_path / "tuned.json", "1")
    assert out.count("softmax (64, torch.float32)") == 2 and "2.00x" in out


def test_tune_file_serves_later_processes_of_the_same_device(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "tuned.json"
    save = """
import torch
from llmops.kernels.triton import _config
_config.save({"softmax": {(64, torch.float32): {"ROWS": 2}}})
_config.save({"softmax": {(128, torch.bfloat16): {"ROWS": 4}}, "rope": {("q", 8): {"BLOCK": 64}}})
"""
    use = """
import torch
from llmops.kernels.triton import _config, _launch
table = {"ROWS": 1}
def choices():
    return [_config.choose(*x, table) for x in (
        ("softmax", (64, torch.float32)), ("softmax", (128, torch.bfloat16)),
        ("softmax", (64, torch.bfloat16)), ("rope", ("q", 8)), ("gelu", (1,)))]
with _launch.recording("sm90"):
    assert choices() == [table] * 5
print([list(x.values())[0] for x in choices()])
with _config.override("softmax", ROWS=9):
    assert choices()[0] == {"ROWS": 9}
"""
    in_fresh_python(save, file, "0")
    assert in_fresh_python(use, file, "0").strip() == "[2, 4, 1, 64, 1]"
    assert in_fresh_python(use, file, "1").strip() == "[1, 1, 1, 1, 1]"  # never interpreted
    everything = json.loads(file.read_text())
    assert len(everything) == 1
    file.write_text(json.dumps({"another device": everything.popitem()[1]}))
    assert in_fresh_python(use, file, "0").strip() == "[1, 1, 1, 1, 1]"
    file.write_text("no json")
    assert in_fresh_python(use, file, "0").strip() == "[1, 1, 1, 1, 1]"


def test_tune_without_a_gpu_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    from llmops.cli import main

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["tune", "softmax"]) != 0
    assert "needs a CUDA or ROCm GPU" in capsys.readouterr().err
