"""What only a GPU shows of an operator: that it is captured in a CUDA graph, runs on the current
stream and on its tensors' device, and stands in what torch.compile makes for a GPU."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import llmops
from llmops.testing import Make, OpSpec, Sample, Target, specs, targets
from llmops.testing._core import call, cast, outputs
from llmops.testing._surroundings import same_bits

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU, and torch sees none", allow_module_level=True)


def _every() -> Iterator[Any]:
    for module in pkgutil.iter_modules(specs.__path__):
        for spec in vars(importlib.import_module(f"{specs.__name__}.{module.name}")).values():
            if isinstance(spec, OpSpec):
                for target in targets(spec.name):
                    if target.device == "cuda":
                        yield pytest.param(spec, target, id=f"{target}-{spec.name}")


CASES = pytest.mark.parametrize(("spec", "target"), list({p.id: p for p in _every()}.values()))


def _sample(spec: OpSpec, device: str = "cuda") -> Sample:
    """The first of the spec; its tensors are the caller's own."""
    with torch.device("cpu"):  # as where the kit's are collected
        sample = next(iter(spec.samples(Make(torch.bfloat16, device))))
    kwargs = {name: cast(value, None) for name, value in sample.kwargs.items()}
    return Sample(sample.id, cast(sample.args, None), kwargs)


def _tensors(sample: Sample) -> list[Tensor]:
    return [v for v in (*sample.args, *sample.kwargs.values()) if isinstance(v, Tensor)]


def _run(spec: OpSpec, sample: Sample, target: Target) -> list[Tensor]:
    with torch.no_grad():
        return outputs(spec.fn(*sample.args, **sample.kwargs, backend=target.backend))


def _equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return same_bits((a, []), (b, []))


@CASES
def test_device_graph_capture(spec: OpSpec, target: Target) -> None:
    """A replay computes from what is in the inputs then, the bits of an eager call."""
    sample = _sample(spec)
    before = _run(spec, sample, target)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is done once is done before the capture
        _run(spec, sample, target)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = _run(spec, sample, target)
    with torch.no_grad():
        for x in _tensors(sample):
            if x.is_floating_point():
                x.mul_(0.5)
    graph.replay()
    want = _run(spec, sample, target)
    assert _equal(held, want)
    assert not _equal(want, before), "the change of the inputs has to show"


@CASES
def test_device_current_stream(spec: OpSpec, target: Target) -> None:
    """Inputs that another stream fills late are read late."""
    sample = _sample(spec)
    want = _run(spec, sample, target)
    values = [x.detach().clone() for x in _tensors(sample)]
    with torch.no_grad():
        for x in _tensors(sample):
            x.zero_()
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side), torch.no_grad():
        torch.cuda._sleep(200_000_000)  # cycles: a tenth of a second
        for x, value in zip(_tensors(sample), values, strict=True):
            x.copy_(value)
        got = _run(spec, sample, target)
    side.synchronize()
    assert _equal(got, want)


@CASES
def test_device_that_is_not_current(spec: OpSpec, target: Target) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs, and torch sees {torch.cuda.device_count()}")
    sample = _sample(spec, "cuda:1")
    got = _run(spec, sample, target)
    with torch.cuda.device(1):
        want = _run(spec, sample, target)
    assert torch.cuda.current_device() == 0
    assert _equal(got, want) and all(x.get_device() == 1 for x in got)


@CASES
def test_device_compiles_fullgraph(spec: OpSpec, target: Target) -> None:
    """By inductor, results and gradients: the eager bits."""

    def step(*args: Any, **kwargs: Any) -> Any:
        return spec.fn(*args, **kwargs, backend=target.backend)

    sample = _sample(spec)
    eager = call(step, sample)
    torch._dynamo.reset()
    assert same_bits(call(torch.compile(step, fullgraph=True), sample), eager)


def test_device_triton_attention_by_descriptors() -> None:
    """What TMA copies is what pointers load: of tensors that lie elsewhere at each call, and of a
    graph's. Under one key of the launch, which must not remember where the first lay."""
    pytest.importorskip("triton")
    from llmops.kernels.triton import _config, _launch

    if not _launch.has_tma():
        pytest.skip("needs TMA: a GPU of compute capability 9.0 or later")

    def run(qkv: list[Tensor], form: bool) -> Tensor:
        with _config.override("attention", DESCRIPTORS=form):
            return llmops.attention(*qkv, causal=True, backend="triton")

    def near(got: Tensor, qkv: list[Tensor]) -> None:
        want = run(qkv, False)
        assert (got - want).abs().max() <= 2 * torch.finfo(want.dtype).eps * want.abs().max()

    make = Make(torch.bfloat16, "cuda")
    kept = [[make(2, 700, h, 128, grad=False).transpose(1, 2) for h in (8, 2, 2)] for _ in range(3)]
    for qkv in kept:
        near(run(qkv, True), qkv)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = run(kept[0], True)
    for x, y in zip(kept[0], kept[1], strict=True):
        x.copy_(y.flip(0))
    graph.replay()
    near(held, kept[0])
