"""The conformance kit as a third party runs it: a command, on a right operator and wrong ones."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from llmops.testing._command import main

# A package of someone else's: a right operator, and one wrong in each way that a check is for.
TOY = """
import torch
from llmops.testing import OpSpec, Sample


def plain(x, *, scale=1.0):
    return torch.tanh(x * scale)


def right(x, *, scale=1.0, backend=None):
    return torch.tanh(x * scale)


def off(x, *, scale=1.0, backend=None):  # within fp32's error for nobody
    return torch.tanh(x * scale) * 1.0001


def ignores(x, *, scale=1.0, backend=None):  # takes an argument and ignores it
    return torch.tanh(x)


class Wrong(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.tanh(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * (1 - torch.tanh(x))  # the square is missing


def wrong_gradient(x, *, scale=1.0, backend=None):
    return Wrong.apply(x * scale)


def mutates(x, *, scale=1.0, backend=None):
    with torch.no_grad():
        x.mul_(1.0 + 1e-6)
    return torch.tanh(x * scale)


def random(x, *, scale=1.0, backend=None):
    return torch.tanh(x * scale) * (1 - 0.1 * torch.rand(()))


def samples(make):
    yield Sample("3x5", (make(3, 5),), {"scale": 0.5})
    yield Sample("4x7", (make(4, 7),))


def spec(fn):
    return OpSpec(fn.__name__, fn=fn, reference=plain, torch_fn=plain, samples=samples, rows=True)


SPEC = spec(right)
OFF, IGNORES, WRONG_GRADIENT = spec(off), spec(ignores), spec(wrong_gradient)
MUTATES, RANDOM = spec(mutates), spec(random)
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "toy_ops.py").write_text(TOY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "toy_ops", raising=False)
    return tmp_path


def test_conform_passes_a_right_operator(toy: Path) -> None:
    command = [sys.executable, "-m", "llmops.testing", "toy_ops:SPEC", "--check"]
    # Forward mode through plain PyTorch, no tangent lost, counts as right as well.
    command += ["matches_reference", "--check", "gradients", "--check", "forward_mode_refused"]
    done = subprocess.run(command, cwd=toy, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "right: conforms" in done.stdout
    assert "FAILED" not in done.stdout


def test_conform_runs_every_check(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["toy_ops:SPEC"]) == 0
    text = capsys.readouterr().out
    for name in ("any_strides", "compiles_fullgraph", "after_fork", "autocast", "far_strides"):
        line = next(line for line in text.splitlines() if line.split()[:1] == [name])
        assert line.endswith("ok"), line
    assert "no schemas given" in text


@pytest.mark.parametrize(
    ("name", "check"),
    [
        ("OFF", "matches_reference"),
        ("IGNORES", "matches_reference"),
        ("WRONG_GRADIENT", "gradients"),
        ("MUTATES", "mutates_nothing"),
        ("RANDOM", "bitwise_repeatable"),
    ],
)
def test_conform_fails_a_wrong_operator(
    name: str, check: str, toy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([f"toy_ops:{name}", "--check", check]) == 1
    text = capsys.readouterr().out
    assert "FAILED" in text and "cases failed" in text
    assert "fp32-3x5" in text  # the case that fails is named


def test_conform_says_what_it_cannot_find(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, words in (("nowhere:SPEC", "no module"), ("toy_ops:plain", "no OpSpec")):
        assert main([name]) == 2
        assert words in capsys.readouterr().err


def test_conform_is_a_command_of_llmops(capsys: pytest.CaptureFixture[str]) -> None:
    from llmops.cli import main as llmops

    assert llmops(["conform", "softmax", "--check", "gradients", "--sample", "causal"]) == 0
    assert "softmax: conforms" in capsys.readouterr().out
