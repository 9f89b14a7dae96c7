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
softmax.candidates = lambda op, key: options
seconds = {}

def time(call, number):  # BLOCK=32 is too short for these rows and wrong: it must not come here
    return seconds.get(str(_config._overrides["softmax"]), 1.0)

seconds["{'BLOCK': 32}"], seconds["{'BLOCK': 48}"] = 0.01, 0.01
seconds["{'ROWS': 4}"] = 0.99
assert tune.search([case], time) == {}  # a gain below GAIN is noise
seconds["{'ROWS': 4}"], seconds["{'ROWS': 2}"] = 0.5, 0.6
# One that takes half as long again as the fastest is timed once and no more.
options.append({"ROWS": 1})
calls = []
def counted(call, number):
    calls.append(_config._overrides["softmax"])
    return time(call, number)
seconds["{'ROWS': 1}"] = 0.75
tune.search([case], counted)
assert calls.count({"ROWS": 1}) == 1 and calls.count({"ROWS": 2}) == 1 + tune.ROUNDS
assert calls.count({}) == 1 + tune.ROUNDS, "what is used now takes part in any case"
del options[-1]
found = tune.search([case, case], time)
assert found == {"softmax": {(64, torch.float32): {"ROWS": 4}}}, found
"""


def test_tune_keeps_the_fastest_right_candidate(tmp_path: Path) -> None:
    out = in_fresh_python(SEARCH, tmp_path / "tuned.json", "1")
    assert out.count("softmax (64, torch.float32): {'ROWS': 4}, 2.00x") == 2


SHARES = """
import torch, llmops
from llmops.bench import tune
from llmops.bench.harness import Case, with_backward
from llmops.kernels.triton import _config, softmax
ran = []
def ours(t):
    ran.append(dict(_config._overrides.get("softmax", {})))
    return llmops.softmax(t, backend="triton")
x = torch.randn(6, 40)
case = Case("softmax", "fwd", torch.float32, "", with_backward("fwd", ours, (x,)),
            with_backward("fwd", lambda t: torch.softmax(t, -1), (x,)))
options = [{"ROWS": n} for n in (1, 2, 4, 3, 8)]  # no block of three rows
softmax.candidates = lambda op, key: options
counts = [tune.compile_share([case, case], k, 2) for k in range(2)]
print(sorted(r["ROWS"] for r in ran if r), counts)
"""


def test_tune_shares_the_compiling(tmp_path: Path) -> None:
    """Each candidate in one process, and one that cannot be compiled is only left out."""
    out = in_fresh_python(SHARES, tmp_path / "tuned.json", "1")
    assert out.strip() == "[1, 2, 3, 4, 8] [1, 3]"


UNWRITABLE = """
import argparse, torch
from llmops.bench import cases, tune
torch.cuda.is_available = lambda: True
torch.cuda.get_device_name = lambda: "none"
cases.collect = lambda *a, **k: print("searched")
try:
    tune.run(argparse.Namespace(ops=[], jobs=1, share=None))
except ValueError as error:
    print(error)
"""


def test_tune_asks_for_its_file_before_it_searches(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    out = in_fresh_python(UNWRITABLE, tmp_path / "file" / "tuned.json", "1")
    assert "searched" not in out and "LLMOPS_TUNED to a file that can be written" in out


def test_tune_file_serves_later_processes_of_the_same_device(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "tuned.json"
    save = """
import torch
from llmops.kernels.triton import _config
_config.save({"softmax": {(64, torch.float32): {"ROWS": 2}}})
_config.save({"softmax": {(128, torch.bfloat16): {"ROWS": 4}}, "rope": {("q", 8): {"ROWS": 64}}})
"""
    use = """
import torch
from llmops.kernels.triton import _config, _launch
table = {"ROWS": 1}
def choices():
    return [_config.choose(*x, {**table, "num_warps": 4}) for x in (
        ("softmax", (64, torch.float32)), ("softmax", (128, torch.bfloat16)),
        ("softmax", (64, torch.bfloat16)), ("rope", ("q", 8)), ("gelu", (1,)))]
with _launch.recording("sm90"):
    assert choices() == [{**table, "num_warps": 4}] * 5
print([list(x.values())[0] for x in choices()])
with _config.override("softmax", ROWS=9):
    assert choices()[0] == {"ROWS": 9, "num_warps": 4}  # what tuning does not name is the table's
"""
    in_fresh_python(save, file, "0")
    assert in_fresh_python(use, file, "0").strip() == "[2, 4, 1, 64, 1]"
    assert in_fresh_python(use, file, "1").strip() == "[1, 1, 1, 1, 1]"  # never interpreted
    everything = json.loads(file.read_text())
    ((device, entries),) = everything.items()
    file.write_text(json.dumps({"another device": entries}))
    assert in_fresh_python(use, file, "0").strip() == "[1, 1, 1, 1, 1]"
    # No JSON; and JSON of another form, as a hand may have left it.
    warned = """
import warnings
from llmops.kernels.triton import _config
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    _config.load()
assert "cannot be read" in str(seen[0].message) and "tables serve" in str(seen[0].message)
"""
    for other in ("", [["softmax"]], [["softmax", 64, {}]], [["softmax", [64], "BLOCK"]], 5):
        file.write_text(json.dumps({device: other}) if other else "no json")
        assert in_fresh_python(warned + use, file, "0").strip() == "[1, 1, 1, 1, 1]", other
    for whole in ("[1]", "5"):
        file.write_text(whole)
        assert in_fresh_python(warned + use, file, "0").strip() == "[1, 1, 1, 1, 1]", whole
    homeless = """
import os, pathlib
def home():
    raise RuntimeError("Could not determine home directory.")
pathlib.Path.home = home
del os.environ["LLMOPS_TUNED"]
"""
    assert in_fresh_python(homeless + use, file, "0").strip() == "[1, 1, 1, 1, 1]"


WRITER = """
import os, sys, time, torch
from llmops.kernels.triton import _config
who = int(sys.argv[1])
open(os.environ["LLMOPS_TUNED"] + f".ready{who}", "w").close()
while not all(os.path.exists(os.environ["LLMOPS_TUNED"] + f".ready{i}") for i in range(3)):
    time.sleep(0.01)
for i in range(60):
    _config.save({"softmax": {(1000 * who + i, torch.float32): {"ROWS": 2}}})
"""


def test_tune_by_several_processes_loses_nothing(tmp_path: Path) -> None:
    file = tmp_path / "tuned.json"
    environment = {**os.environ, "LLMOPS_TUNED": str(file), "TRITON_INTERPRET": "0"}
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(i)], cwd=ROOT, env=environment)
        for i in range(3)
    ]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    (entries,) = json.loads(file.read_text()).values()
    assert len(entries) == 180


def test_tune_says_that_it_cannot_keep_what_it_found(tmp_path: Path) -> None:
    """No folder can be made within a file, whoever runs the test."""
    (tmp_path / "file").touch()
    save = """
from llmops.kernels.triton import _config
try:
    _config.save({"softmax": {(64,): {"ROWS": 2}}})
except ValueError as error:
    print(error)
"""
    out = in_fresh_python(save, tmp_path / "file" / "tuned.json", "0")
    assert "cannot be kept" in out and str(tmp_path / "file") in out and "LLMOPS_TUNED" in out


def test_tune_without_a_gpu_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    from llmops.cli import main

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["tune", "softmax"]) != 0
    assert "needs a CUDA or ROCm GPU" in capsys.readouterr().err


@pytest.mark.parametrize("jobs", ["0", "-1", "many"])
def test_tune_refuses_no_number_of_jobs(jobs: str, capsys: pytest.CaptureFixture[str]) -> None:
    from llmops.cli import main

    with pytest.raises(SystemExit):
        main(["tune", f"--jobs={jobs}"])
    assert f"a number of processes, 1 or more; got {jobs!r}" in capsys.readouterr().err


def test_tune_says_which_compilers_failed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from llmops.bench import tune

    ends = iter((0, 3, 0))
    started = [sys.executable, "-c"]
    popen = subprocess.Popen
    monkeypatch.setattr(
        tune.subprocess, "Popen",
        lambda command, **how: popen([*started, f"raise SystemExit({next(ends)})"]),
    )  # fmt: skip
    tune._compile_all(["softmax"], 3)
    assert "of 3 compiling processes 1 failed" in capsys.readouterr().err


CANDIDATES = """
import torch, llmops
from llmops.bench import tune
from llmops.bench.harness import compare, outcome, Case, with_backward
from llmops.kernels.triton import _config
import torch.nn.functional as F
torch.manual_seed(0)
x, w, ids = torch.randn(6, 40), torch.rand(40) + 0.5, torch.arange(6)
tokens, lse = torch.tensor([0, 5, 5, 1]), torch.randn(6)
q, keys = torch.randn(1, 2, 70, 16), torch.randn(1, 2, 600, 16)
angles = torch.randn(70, 8)
cos, sin = angles.cos(), angles.sin()
def turned(q):
    a, b = q.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
calls = {
    "softmax": (lambda x: llmops.softmax(x), lambda x: x.softmax(-1), (x,)),
    "gelu": (lambda x: llmops.gelu(x), F.gelu, (x,)),
    "swiglu": (lambda a, b: llmops.swiglu(a, b), lambda a, b: F.silu(a) * b, (x, x.flip(0))),
    "rms_norm": (lambda x, w: llmops.rms_norm(x, (40,), w, 1e-5),
                 lambda x, w: F.rms_norm(x, (40,), w, 1e-5), (x, w)),
    "layer_norm": (lambda x, w: llmops.layer_norm(x, (40,), w, w),
                   lambda x, w: F.layer_norm(x, (40,), w, w), (x, w)),
    "cross_entropy": (lambda x: llmops.cross_entropy(x, ids),
                      lambda x: F.cross_entropy(x, ids), (x,)),
    "rope": (lambda q: llmops.rope(q, cos, sin), turned, (q,)),
    "embedding": (lambda w: llmops.embedding(tokens, w), lambda w: F.embedding(tokens, w), (x,)),
    "merge_attention": (lambda a, b: llmops.merge_attention(a, lse, b, -lse)[0],
                        lambda a, b: a * (2 * lse).sigmoid()[:, None]
                        + b * (-2 * lse).sigmoid()[:, None], (x, x.flip(0))),
    "attention_kvcache": (lambda q: llmops.attention(q, keys, keys),
                          lambda q: F.scaled_dot_product_attention(q, keys, keys), (q[:, :, :3],)),
    "attention": (lambda q: llmops.attention(q, q, q, causal=True),
                  lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True), (q,)),
}
reached = set()
with llmops.use_backend("triton"):
    for name, (ours, plain, inputs) in calls.items():
        inputs = tuple(t.clone().requires_grad_() for t in inputs)
        case = Case(name, "fwd+bwd", torch.float32, "", with_backward("fwd+bwd", ours, inputs),
                    with_backward("fwd+bwd", plain, inputs))
        want = outcome(case, case.torch)
        with _config.watching() as seen:
            case.ours()
        for op, key in dict.fromkeys((op, key) for op, key, _ in seen):
            options = tune.candidates(op, key)
            assert 1 < len(options) < 64, (op, key, len(options))
            reached.add(op)
            for option in options[:: len(options) - 1]:
                with _config.override(op, **option):
                    compare(case, outcome(case, case.ours), want)
backward = {f"{op}_bwd" for op in ("softmax", "gelu", "rms_norm", "layer_norm", "cross_entropy",
                                   "embedding", "merge_attention")}
assert reached == {*calls, *backward, "glu_bwd", "attention_bwd"}, reached
from llmops.kernels.triton import _norm, _norm_bwd, cross_entropy, sample  # long rows
for module in (_norm, _norm_bwd, cross_entropy, sample):
    found = list(module.candidates("", (65536, torch.bfloat16)))
    assert 1 < len(found) < 64 and all("BLOCK" in c or "LANES" in c for c in found)
"""


def test_tune_candidates_give_right_results(tmp_path: Path) -> None:
    """The first and the last of each op's, forward and backward, interpreted."""
    in_fresh_python(CANDIDATES, tmp_path / "tuned.json", "1")
