"""llmops.distributed: each test is a check that four processes run together; all that a run of
pytest selected run in one start of them (tests/distributed_kit.py)."""

from __future__ import annotations

import distributed_kit
import pytest
import torch

import llmops

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


@pytest.mark.rotating
def test_distributed_tells_of_a_rank_that_failed_alone() -> None:
    """The others wait for it in a collective: the run ends all the same, and says where."""
    results = distributed_kit.run(["kit-alone", "kit-after"], meet=3)
    assert "AssertionError: alone" in results["kit-alone"]
    assert "not run, since kit-after" in results["kit-after"]
