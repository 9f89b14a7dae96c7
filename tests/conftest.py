"""Fixtures of several test files, and the rotation of the conformance kit (see rotation.py)."""

from __future__ import annotations

import os
from typing import Any

import hypothesis
import pytest
import torch
from rotation import Part, parse

# In continuous integration each commit draws the same examples, so that a failure is the commit's;
# elsewhere every run draws new ones.
hypothesis.settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")


def _part() -> Part | None:
    try:
        return parse(os.environ.get("LLMOPS_TEST_PART", "all"))
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None


def pytest_report_header(config: pytest.Config) -> str:
    part = _part()
    return "llmops: the whole conformance kit" if part is None else str(part)


def pytest_collection_modifyitems(config: pytest.Config, items: list[Any]) -> None:
    part = _part()
    if part is None:
        return
    from llmops.testing import targets

    best = targets()[-1]
    if best.interpreted:
        best = None  # it is slow: there, results and gradients rotate as well
    kept: list[Any] = []
    left: list[Any] = []
    for item in items:
        case = item.callspec.params.get("case") if hasattr(item, "callspec") else None
        large = any(item.get_closest_marker(marker) for marker in ("large", "rotating"))
        if best is None and "attention" in item.path.stem:  # interpreted, seconds each: all rotate
            large = True
        # Where an op has tiles, its best is that.
        tiled = best is not None and case is not None and case.target.isa == "amx"
        own = case.target if tiled else best
        (kept if part.holds(item.nodeid, case, own, large) else left).append(item)
    config.hook.pytest_deselected(items=left)
    items[:] = kept


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Any:
    """A test of a target makes its tensors on the target's device; the kit's say theirs."""
    target = item.callspec.params.get("target") if hasattr(item, "callspec") else None
    if getattr(target, "device", "cpu") == "cpu":
        return (yield)
    with torch.device(target.device):
        return (yield)


# The CUDA kernels on CPU tensors, in the simulator of tests/cuda_sim: a target of the kit.
SIMULATED = os.environ.get("LLMOPS_CUDA_SIM") == "1"
if SIMULATED:
    from cuda_sim import build

    from llmops.backends import get

    build.load().schedule(another_each_time=True)
    get("cuda").simulate()


@pytest.fixture
def one_thread():
    """For tests of many small products: their threads wait for each other, and where other programs
    want the cores too, each wait can last a time slice."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def common_cache():
    """The kernels' AVX-512-BF16 copies where AMX is at hand: the same code, but results beyond
    32 MiB are stored past the caches, and not only those beyond a cache of hundreds."""
    from llmops.backends import _extension

    active = _extension.REASON is None and torch.ops.llmops_cpu.isa_active()
    if active != "amx":
        yield
        return
    _extension.select_isa("avx512_bf16")
    yield
    _extension.select_isa(active)


@pytest.fixture
def sim(one_thread: None) -> Any:
    """The module of the CUDA simulator, for tests that call its kernels themselves and may set its
    schedule. Afterwards it draws again, and for the kit another seed for every call."""
    from cuda_sim import build

    reason = build.why_not()
    if reason is not None:
        pytest.skip(reason)
    module = build.load()
    yield module
    module.schedule(another_each_time=SIMULATED)
