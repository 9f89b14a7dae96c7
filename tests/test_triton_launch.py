"""What stands between an operator and its Triton kernels, on any machine: the launches are recorded
and do not run. On a GPU it must not wait for the device, or a CUDA graph could not hold it, and it
must ask the tables, and start, on the tensors' device."""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
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
