"""What stands between an operator and its Triton kernels, on any machine: the launches are recorded
and do not run. On a GPU it must not wait for the device, or a CUDA graph could not hold it, and it
must ask the tables, and start, on the tensors' device."""

from __future__ import annotations

import contextlib
import importlib
import os
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import llmops
from llmops import dispatch
from llmops.backends import triton as backend
from llmops.testing import Make, OpSpec, Sample, specs
from llmops.testing._core import cast, leaves, outputs

pytest.importorskip("triton")

# What copies from the device or to it, in the ways that Python can ask for it.
WAITING = {
    "__bool__", "__contains__", "__float__", "__index__", "__int__", "allclose", "as_tensor", "cpu",
    "equal", "item", "masked_select", "nonzero", "numpy", "tensor", "tolist", "unique",
}  # fmt: skip


class NothingWaits(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("__getitem__", "__setitem__"):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(i, Tensor) and i.dtype == torch.bool for i in index):
                raise AssertionError("a boolean index has to count what it keeps")
        if name in WAITING:
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The backend serves CPU tensors, as far as their launches, which are kept."""
    from llmops.kernels.triton import _launch

    monkeypatch.setattr(backend, "DEVICE", "cpu")
    monkeypatch.setattr(backend, "available", lambda: None)
    dispatch.clear()
    with _launch.recording("sm90") as launches:
        yield launches
    dispatch.clear()


def _specs() -> list[OpSpec]:
    found = {}
    for module in pkgutil.iter_modules(specs.__path__):
        for spec in vars(importlib.import_module(f"{specs.__name__}.{module.name}")).values():
            if isinstance(spec, OpSpec) and spec.name in backend.PASSES:
                found[spec.name] = spec
    return [found[name] for name in sorted(found)]


def _differentiate(spec: OpSpec, sample: Sample) -> None:
    args = cast(sample.args, None)
    kwargs = {name: cast(value, None) for name, value in sample.kwargs.items()}
    wanted = leaves(args, kwargs) if "backward" in backend.PASSES[spec.name] else []
    with NothingWaits(), torch.set_grad_enabled(bool(wanted)):
        results = outputs(spec.fn(*args, **kwargs, backend="triton"))
        given = [r for r in results if r.requires_grad]
        if wanted and given:
            ones = [torch.ones_like(r) for r in given]
            torch.autograd.grad(given, wanted, ones, allow_unused=True)


@pytest.mark.parametrize("spec", _specs(), ids=lambda spec: spec.name)
def test_triton_launchers_wait_for_nothing(spec: OpSpec, recorded: list[Any]) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        for sample in spec.samples(Make(dtype)):
            try:
                _differentiate(spec, sample)
            except NotImplementedError:  # what the backend says it does not serve
                continue
            except AssertionError as error:
                raise AssertionError(f"{sample.id}: {error}") from error
    assert recorded


def test_triton_launchers_wait_for_nothing_can_fail() -> None:
    x = torch.ones(3)
    asked: tuple[Any, ...] = (
        lambda: bool(x.any()), lambda: x.sum().item(), lambda: x.tolist(), lambda: x[x > 0],
        lambda: float(x[0]), lambda: torch.nonzero(x), lambda: x.cpu(), lambda: torch.tensor([1]),
    )  # fmt: skip
    for ask in asked:
        with pytest.raises(AssertionError, match="wait|count"), NothingWaits():
            ask()


def test_triton_launchers_run_on_their_tensors_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """As two GPUs of which the first is current: the tables are asked of the second."""
    from llmops.kernels.triton import _launch

    current = [0]

    @contextlib.contextmanager
    def device(which: torch.device) -> Iterator[None]:
        before, current[0] = current[0], which.index
        yield
        current[0] = before

    properties = {0: (8, 0, 108), 1: (9, 0, 132)}

    def properties_of(index: int) -> Any:
        major, minor, count = properties[index]
        return SimpleNamespace(major=major, minor=minor, multi_processor_count=count)

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties_of)
    monkeypatch.setattr(_launch, "INTERPRETED", False)
    monkeypatch.setattr(_launch, "_of_device", {})

    def launcher(x: Any, factor: int) -> tuple[int, str, int]:
        return current[0], _launch.architecture(), _launch.processors() * factor

    run = _launch.on_its_device(launcher)
    for index, want in ((1, (1, "sm90", 264)), (0, (0, "sm80", 216)), (1, (1, "sm90", 264))):
        x = SimpleNamespace(is_cuda=True, device=torch.device("cuda", index))
        assert run(x, factor=2) == want
        assert current[0] == 0
    assert backend.softmax.__wrapped__ is not None and backend.attention_bwd.__wrapped__ is not None


def test_triton_attention_of_few_queries_divides_the_keys(recorded: list[Any]) -> None:
    """By the kernels of a cache: as many programs as processors, and a second kernel."""

    def kernels(queries: int, keys: int, **options: Any) -> list[str]:
        recorded.clear()
        q, k = torch.empty(1, 8, queries, 64), torch.empty(1, 2, keys, 64)
        llmops.attention(q, k, k, backend="triton", **options)
        return [launch.kernel.__name__.removesuffix("_kernel") for launch in recorded]

    split = ["attention_kvcache_fwd", "attention_combine"]
    assert kernels(1, 8192) == kernels(16, 8192, causal=True, softcap=5.0) == split
    whole = ["attention_fwd"]
    assert kernels(17, 8192) == kernels(1, 300) == whole
    assert kernels(1, 8192, mask=torch.ones(1, 8192, dtype=torch.bool)) == whole
    kernels(1, 8192)
    first = recorded[0]
    assert first.grid[0] == 64 and first.arguments["lengths"] is None


# Triton's runtime with a driver that launches nothing: what it would have launched is kept.
LAUNCHES = """
import itertools, sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

launched, loaded = [], itertools.count(1)

class Launcher:
    def __init__(self, src, metadata):
        pass
    def __call__(self, x, y, z, stream, function, metadata, _, enter, leave, *arguments):
        launched.append((self, x, y, z, stream, function, metadata, arguments))

class Utils:
    def get_device_properties(self, device):
        return dict(max_shared_mem=232448, multiprocessor_count=132, max_num_regs=65536,
                    warpSize=32)
    def load_binary(self, *arguments):
        return next(loaded), next(loaded), 32, 0, 1024
    def unload_module(self, module):
        pass

class Driver:
    utils, launcher_cls = Utils(), Launcher
    get_current_device = lambda self: 0
    get_current_stream = lambda self, device: 7
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)
    get_active_torch_device = lambda self: torch.device("cpu")
    map_python_to_cpp_type = lambda self, kind: kind

driver.set_active(Driver())
torch.cuda.current_device = lambda: 0
from llmops.kernels.triton import _launch, softmax

def same(what):
    return [x if not isinstance(x, tuple) else same(x) for x in what]

memory = torch.zeros(4096)
def case(pointer=0, dtype=torch.float32, n=128, row=128, mask=None, scale=1.0, kind=0, warps=4):
    x = memory[pointer:].view(dtype)
    arguments = (x, x, mask, 4, n, row, scale, 1, 1, 1, 0, 0, 0, 1)
    constants = dict(MASK=kind, CAUSAL=False, ROWS=2, BLOCK=128, num_warps=warps)
    kernel, seen = softmax.softmax_fwd_kernel, []
    for run in (lambda: _launch._launch(kernel, (2,), arguments, constants),) * 3 + (
        lambda: kernel[(2,)](*arguments, **constants),
    ):
        launched.clear()
        run()
        (one,) = launched
        seen.append(one)
    for one in seen[:-1]:
        assert all(a is b or a == b for a, b in zip(one[:-1], seen[-1][:-1])), (one, seen[-1])
        assert len(one[-1]) == len(seen[-1][-1])
        assert all(a is b or a == b for a, b in zip(one[-1], seen[-1][-1])), (one, seen[-1])
    return seen[-1][0]

plain = case()
assert case(n=96) is plain and case(n=64, row=96) is plain and case(scale=0.5) is plain
others = [case(pointer=1), case(n=100), case(n=1), case(row=2**31 + 64), case(dtype=torch.bfloat16),
          case(warps=2), case(mask=memory.bfloat16(), kind=2), case(mask=memory, kind=2)]
assert len({plain, *others}) == 9, "each is compiled by itself"
# Sizes that never come back do not pile up, and are still the right kernel's.
_launch.MOST_VALUES = 3
assert all(case(n=n) is plain for n in range(16, 128, 16)) and len(_launch._by_value) <= 3
# With a profiler's hook Triton's own run serves.
entered = []
triton.knobs.runtime.launch_enter_hook.add(lambda metadata: entered.append(1))
before = dict(_launch._by_value)
_launch._launch(softmax.softmax_fwd_kernel, (2,),
                (memory, memory, None, 4, 99, 99, 1.0, 1, 1, 1, 0, 0, 0, 1),
                dict(MASK=0, CAUSAL=False, ROWS=2, BLOCK=128, num_warps=4))
assert _launch._by_value == before
print("fine")
"""


def test_triton_launches_what_triton_would() -> None:
    """The same compiled kernel and the same arguments, by our own key and by Triton's run()."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHES], capture_output=True, text=True, env=environment
    )
    assert done.stdout == "fine\n", done.stdout + done.stderr


def test_cuda_serves_what_triton_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under "auto", where both can run: Triton first, CUDA C++ for what was measured faster there,
    and where there is no Triton."""
    from llmops.backends import _measured, cuda

    monkeypatch.setattr(cuda, "available", lambda: None)
    monkeypatch.setattr(cuda, "SIMULATED", False)
    monkeypatch.setattr(cuda, "DEVICE", "cuda")
    monkeypatch.setattr(backend, "DEVICE", "cuda")
    plain = dispatch.Call("attention", "cuda", torch.bfloat16)
    small = dispatch.Call("layer_norm", "cuda", torch.bfloat16, (_measured.SMALL,))

    def chosen(call: dispatch.Call, triton: str | None) -> str | None:
        monkeypatch.setattr(backend, "available", lambda: triton)
        return dispatch.decide(call).backend

    assert chosen(plain, None) == "triton" and chosen(small, None) == "cuda"
    assert chosen(small._replace(features=()), None) == "triton"
    assert chosen(plain, "not installed") == chosen(small, "not installed") == "cuda"
    assert chosen(plain._replace(dtype=torch.float32), "not installed") == "reference"
    monkeypatch.setattr(cuda, "available", lambda: "built without CUDA")
    assert chosen(small, None) == "triton" and chosen(plain, "not installed") == "reference"
