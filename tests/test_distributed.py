"""llmops.distributed: each test is a check that four processes run together; all that a run of
pytest selected run in one start of them (tests/distributed_kit.py)."""

from __future__ import annotations

import importlib
import subprocess
import sys
import warnings
from pathlib import Path

import distributed_kit
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import llmops
from llmops import dispatch

# The others rotate: what a user meets first is checked on every commit.
ALWAYS = (
    "models-tensor_parallel",
    "models-fsdp",
    "context-bf16_causal_gqa",
    "context-fp32_causal",
    "tensors-cross_entropy_by_vocabulary",
)
CHECKS = [*(f"rules-{op}" for op in llmops.OPERATORS), *distributed_kit.names()]


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> dict[str, str]:
    selected = {item.callspec.params.get("check") for item in request.session.items
                if item.fspath == request.fspath and hasattr(item, "callspec")}  # fmt: skip
    return distributed_kit.run([check for check in CHECKS if check in selected])


@pytest.mark.parametrize(
    "check",
    [
        pytest.param(check, marks=() if check in ALWAYS else pytest.mark.rotating)
        for check in CHECKS
    ],
)
def test_distributed(check: str, results: dict[str, str]) -> None:
    assert not results[check], results[check]


def test_distributed_rules_are_complete() -> None:
    """Every operator beneath the public functions has a rule, and no rule is without operator."""
    from llmops.distributed._rules import RULES

    names = torch._C._dispatch_get_all_op_names()
    ops = {name.removeprefix("llmops::") for name in names if name.startswith("llmops::")}
    assert ops == set(RULES)


# Each way in which an operator can meet its first DTensor, in a process of its own.
FIRST = """
import os, sys, torch, torch.distributed as dist, llmops
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

def under_a_mode(x):
    with CommDebugMode():
        return llmops.softmax(x)

def in_place(x):
    q, k = x[None, None].clone(), x[None, None].clone()
    tables = (distribute_tensor(t, x.device_mesh, [Replicate()]) for t in llmops.rope_tables(4, 6))
    return llmops.rope_qk_(q, k, *tables)

WAYS = {
    "plainly": llmops.softmax,
    "under a mode": under_a_mode,
    "compiled": torch.compile(llmops.softmax, backend="aot_eager", fullgraph=True),
    "sampling": llmops.sample,
    "a loss": lambda x: llmops.cross_entropy(x, x.argmax(1)),
    "in place": in_place,
    "as the operator": lambda x: torch.ops.llmops.gelu(x, "none", "cpu"),
}
assert "llmops.distributed" not in sys.modules
for name, way in WAYS.items():
    if os.fork() == 0:
        try:
            dist.init_process_group("gloo", f"file://{sys.argv[1]}/{name}", rank=0, world_size=1)
            x = distribute_tensor(torch.randn(4, 6), init_device_mesh("cpu", (1,)), [Replicate()])
            way(x)
            print(f"{name}: served", flush=True)
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
        finally:
            os._exit(0)
    os.wait()
"""


@pytest.mark.rotating
def test_distributed_rules_load_with_the_first_dtensor(tmp_path: Path) -> None:
    """Nothing has to be imported for them; only who calls the operator past the public function has
    to, and is told so by torch."""
    run = subprocess.run(
        [sys.executable, "-c", FIRST, tmp_path], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    *served, refused = run.stdout.splitlines()
    assert len(served) == 6 and all(line.endswith(": served") for line in served), run.stdout
    assert "llmops.gelu.default does not have a sharding strategy" in refused, refused


def test_distributed_rules_that_do_not_load_harm_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """They stand on torch's internals; a torch with others still computes everything else."""
    monkeypatch.setattr(dispatch, "_sharding_known", False)
    importlib.import_module("torch.distributed.tensor")
    monkeypatch.setitem(sys.modules, "llmops.distributed", None)
    with FlopCounterMode(display=False):
        with pytest.warns(RuntimeWarning, match="sharding rules for DTensor do not load"):
            assert llmops.softmax(torch.ones(2, 4)).eq(0.25).all()
        with warnings.catch_warnings():  # said once
            warnings.simplefilter("error")
            llmops.softmax(torch.ones(2, 4))


@pytest.mark.rotating
def test_distributed_tells_of_a_rank_that_failed_alone() -> None:
    """The others wait for it in a collective: the run ends all the same, and says where."""
    results = distributed_kit.run(["kit-alone", "kit-after"], meet=3)
    assert "AssertionError: alone" in results["kit-alone"]
    assert "not run, since kit-after" in results["kit-after"]
