"""The support matrix against behaviour: what it says is served is run, and what it says is not
raises NotImplementedError that names op and argument."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

import llmops
from llmops.backends import get
from llmops.testing import _support, cast
from llmops.testing._core import DTYPES, Sample, leaves, outputs

ROOT = Path(__file__).resolve().parent.parent
BACKENDS = [b for b in ("cpu", "reference") if get(b).available() is None]
RANDOM = ("dropout_p", "generator")


def run(op: str, sample: Sample, backend: str) -> tuple[list[Tensor], list[Tensor]]:
    """The results, and the tensors that could take a gradient."""
    args = cast(sample.args, None)
    kwargs = {k: cast(v, None) for k, v in sample.kwargs.items()}
    if isinstance(kwargs.get("generator"), torch.Generator):
        kwargs["generator"].manual_seed(0)
    torch.manual_seed(0)
    results = outputs(getattr(llmops, op)(*args, **kwargs, backend=backend))
    return results, leaves(args, kwargs)


@pytest.mark.parametrize("op", llmops.OPERATORS)
def test_support_knows_every_argument(op: str) -> None:
    """A new operator, or a new argument of one, is declared or this says where."""
    try:
        calls = _support.calls(op)
    except LookupError as error:
        pytest.fail(str(error))
    assert set(calls) == {"", *_support.arguments(op)}
    assert op in get("cpu").PASSES, f"declare {op} in PASSES of llmops/backends/cpu.py"


def test_support_declares_nothing_else() -> None:
    for backend in ("cpu", "triton", "cuda"):
        stray = set(get(backend).PASSES) - set(llmops.OPERATORS)
        assert not stray, f"llmops/backends/{backend}.py declares {stray}, not in llmops.OPERATORS"


CELLS = [
    pytest.param(op, argument, backend, id=f"{op}-{argument or 'plain'}-{backend}")
    for op in llmops.OPERATORS
    for argument in ("", *_support.arguments(op))
    for backend in BACKENDS
]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(("op", "argument", "backend"), CELLS)
def test_support_cell(op: str, argument: str, backend: str, dtype: torch.dtype) -> None:
    sample = _support.calls(op, dtype)[argument]
    if _support.refusal(op, sample, backend) is not None:
        with pytest.raises(NotImplementedError, match=rf"llmops\.{op}: .*{argument}"):
            run(op, sample, backend)
        return
    results, wanted = run(op, sample, backend)
    if argument not in RANDOM:  # and it is not ignored: the reference, too, gives this
        expected, _ = run(op, sample, "reference")
        for got, want in zip(results, expected, strict=True):
            tolerance = 32 * torch.finfo(dtype).eps
            torch.testing.assert_close(
                got.double(), want.double(), rtol=tolerance, atol=tolerance, equal_nan=True
            )
    differentiable = [r for r in results if r.requires_grad]
    if not re.search("backward|gradients", get("cpu").PASSES[op]):
        assert not differentiable, f"{op} takes gradients: declare it in PASSES"
    elif wanted:
        assert differentiable, f"{op} declares a backward and its result takes no gradient"
        ones = [torch.ones_like(r) for r in differentiable]
        grads = torch.autograd.grad(differentiable, wanted, ones, allow_unused=True)
        assert any(g is not None for g in grads)


@pytest.mark.parametrize("op", llmops.OPERATORS)
def test_support_of_double_precision(op: str) -> None:
    """fp64 is the reference's: a kernel backend refuses it by name, the reference computes it."""
    sample = _support.calls(op)[""]
    double = Sample("fp64", cast(sample.args, torch.float64), sample.kwargs)
    assert run(op, double, "reference")[0]
    with pytest.raises(NotImplementedError, match=r"llmops\..*float64"):
        run(op, double, "cpu")


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_support_of_an_absent_backend(backend: str) -> None:
    """A backend that cannot run here says why, and is not replaced by another."""
    if get(backend).available() is None:
        pytest.skip(f"{backend} is usable here, and the conformance kit runs over it")
    for op in llmops.OPERATORS:
        with pytest.raises(NotImplementedError, match=f'backend "{backend}" cannot serve'):
            run(op, _support.calls(op)[""], backend)


def test_support_table_in_readme_is_the_code() -> None:
    spec = importlib.util.spec_from_file_location("readme", ROOT / "tools" / "readme.py")
    assert spec is not None and spec.loader is not None
    readme = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(readme)
    text = (ROOT / "README.md").read_text()
    assert _support.table() in text, "run: python tools/readme.py"
    assert readme.support_table() == _support.table()
