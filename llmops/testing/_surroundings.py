"""Checks of what stands around a kernel: autocast, export, threads, fork, torch.func, far memory.

Each takes (spec, sample, target) and raises AssertionError, as those of `_checks`.
"""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmops.testing._core import (
    OpSpec,
    Sample,
    Target,
    _cotangent,
    assert_close,
    call,
    cast,
    expected,
    gradient_floors,
    leaves,
    outputs,
    result_floors,
)

_TOGETHER = 4  # Python threads
_PATIENCE = 30.0  # seconds a forked child may take
_FAR = 2**31 + 2**20  # elements between the first row of a tensor and the last


def same_bits(a: tuple[list[Tensor], list[Tensor]], b: Any) -> bool:
    """Whether two results of call() agree to the last bit, NaN counting as itself."""
    one, other = a[0] + a[1], b[0] + b[1]
    return len(one) == len(other) and all(
        x.dtype == y.dtype and torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0))
        for x, y in zip(one, other, strict=True)
    )


def autocast(spec: OpSpec, sample: Sample, target: Target) -> None:
    """Under torch.autocast to bf16: the dtypes of PyTorch's own computation, and its accuracy."""
    with torch.autocast(target.device, torch.bfloat16):
        want, want_grads = call(spec.torch_fn, sample)
        with target.active():
            got, grads = call(spec.fn, sample, backend=target.backend)
    oracle, oracle_grads = expected(spec, sample)[0]
    # What was computed in bf16 is that exact, whatever dtype a gradient has in the end.
    lowered = spec.lowers or any(w.dtype == torch.bfloat16 for w in want)
    eps = torch.finfo(torch.bfloat16).eps if lowered else None
    for i, (g, o, y) in enumerate(zip(got, oracle, want, strict=True)):
        what = f"{spec.name} output {i} under autocast"
        assert g.dtype == y.dtype, f"{what}: dtype {g.dtype}, PyTorch's own gives {y.dtype}"
        assert_close(g, o, y, factor=2.0, what=what, eps=eps)
    for i, (g, o, y) in enumerate(zip(grads, oracle_grads, want_grads, strict=True)):
        what = f"{spec.name} gradient {i} under autocast"
        assert g.dtype == y.dtype, f"{what}: dtype {g.dtype}, PyTorch's own gives {y.dtype}"
        assert_close(g, o, y, factor=3.0, what=what, eps=eps)


class _Call(torch.nn.Module):
    """A sample's call as a module of its tensors."""

    def __init__(self, fn: Callable[..., Any], sample: Sample, backend: str) -> None:
        super().__init__()
        self.fn, self.backend = fn, backend
        self.names: list[int | str] = []
        self.args, self.kwargs = list(sample.args), dict(sample.kwargs)
        self.names += [i for i, v in enumerate(sample.args) if isinstance(v, Tensor)]
        self.names += [name for name, v in sample.kwargs.items() if isinstance(v, Tensor)]
        for name in self.names:
            if isinstance(name, int):
                self.args[name] = None
            else:
                self.kwargs[name] = None

    def tensors(self, sample: Sample) -> tuple[Tensor, ...]:
        values = [sample.args[n] if isinstance(n, int) else sample.kwargs[n] for n in self.names]
        return tuple(v.detach().clone() for v in values)

    def forward(self, *tensors: Tensor) -> Any:
        args, kwargs = list(self.args), dict(self.kwargs)
        for name, tensor in zip(self.names, tensors, strict=True):
            if isinstance(name, int):
                args[name] = tensor
            else:
                kwargs[name] = tensor
        return self.fn(*args, **kwargs, backend=self.backend)


def exports(spec: OpSpec, sample: Sample, target: Target) -> None:
    """torch.export gives a program of the eager bits, with the op in it."""
    module = _Call(spec.fn, sample, target.backend)
    inputs = module.tensors(sample)
    with target.active():
        eager = outputs(module(*inputs))
        program = torch.export.export(module, inputs)
        got = outputs(program.module()(*inputs))
    assert same_bits((eager, []), (got, [])), f"{spec.name}: the exported program differs"


def compiled_together(calls: list[tuple[OpSpec, Sample]], target: Target) -> None:
    """AOTInductor: exported, compiled to a library, loaded and run, the operators give the eager
    bits. All in one library: the C++ compiler is what takes time."""
    import tempfile
    from pathlib import Path

    modules = [_Call(spec.fn, sample, target.backend) for spec, sample in calls]
    given = [module.tensors(sample) for module, (_, sample) in zip(modules, calls, strict=True)]

    class Together(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
            found: list[Tensor] = []
            first = 0
            for module, inputs in zip(modules, given, strict=True):
                found += outputs(module.forward(*tensors[first : first + len(inputs)]))
                first += len(inputs)
            return tuple(found)

    inputs = tuple(t for tensors in given for t in tensors)
    with target.active(), torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        eager = list(Together()(*inputs))
        program = torch.export.export(Together(), inputs)
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(Path(folder) / "ops.pt2")
        )
        got = list(torch._inductor.aoti_load_package(path)(*inputs))
    names = [spec.name for spec, _ in calls]
    assert len(eager) == len(got)
    for i, (e, g) in enumerate(zip(eager, got, strict=True)):
        assert same_bits(([e], []), ([g], [])), f"AOTInductor: result {i} of {names} differs"


def vmap(spec: OpSpec, sample: Sample, target: Target) -> None:
    """torch.func.vmap over the floating-point inputs equals a loop over them."""
    positions = [i for i, a in enumerate(sample.args) if isinstance(a, Tensor) and a.requires_grad]
    if not positions:
        return

    def fn(*given: Tensor) -> Any:
        full = list(sample.args)
        for i, g in zip(positions, given, strict=True):
            full[i] = g
        return spec.fn(*full, **sample.kwargs, backend=target.backend)

    with torch.no_grad(), target.active():
        slices = [tuple(sample.args[i].detach() * f for i in positions) for f in (1.0, 0.5)]
        loop = [outputs(fn(*s)) for s in slices]
        stacked = [torch.stack(together) for together in zip(*slices, strict=True)]
        got = outputs(torch.func.vmap(fn)(*stacked))
    for i, g in enumerate(got):
        want = torch.stack([one[i] for one in loop])
        assert same_bits(([g], []), ([want], [])), f"{spec.name}: vmap differs from a loop"


def forward_mode_refused(spec: OpSpec, sample: Sample, target: Target) -> None:
    """Forward-mode AD raises NotImplementedError; a tangent is never dropped without a word."""
    import torch.autograd.forward_ad as forward_ad

    positions = [i for i, a in enumerate(sample.args) if isinstance(a, Tensor) and a.requires_grad]
    if not positions:
        return
    with target.active(), forward_ad.dual_level():
        args = list(sample.args)
        x = args[positions[0]].detach()
        args[positions[0]] = forward_ad.make_dual(x, torch.ones_like(x))
        try:
            result = outputs(spec.fn(*args, **sample.kwargs, backend=target.backend))
        except NotImplementedError:
            return
        kept = [forward_ad.unpack_dual(r).tangent is not None for r in result]
    assert all(kept), f"{spec.name}: forward-mode AD lost the tangent and raised nothing"


def from_threads(spec: OpSpec, sample: Sample, target: Target) -> None:
    """Several Python threads at once, one of them under another use_backend: the same bits."""
    from llmops.dispatch import state, use_backend

    found: list[Any] = [None] * _TOGETHER
    barrier = threading.Barrier(_TOGETHER + 1)

    def work(i: int) -> None:
        try:
            barrier.wait()
            found[i] = call(spec.fn, sample, backend=target.backend), state.requested
        except BaseException as error:
            found[i] = error

    def disturb() -> None:
        with use_backend("reference"):
            barrier.wait()
            for worker in workers:
                worker.join()

    with target.active():
        want = call(spec.fn, sample, backend=target.backend)
        workers = [threading.Thread(target=work, args=(i,)) for i in range(_TOGETHER)]
        other = threading.Thread(target=disturb)
        for thread in (*workers, other):
            thread.start()
        for thread in (*workers, other):
            thread.join()
    for one in found:
        if isinstance(one, BaseException):
            raise AssertionError(f"{spec.name}: failed in a thread: {one!r}") from one
        assert same_bits(want, one[0]), f"{spec.name}: bits differ from thread to thread"
        assert one[1] is None, f"{spec.name}: use_backend of one thread reached another"


def after_fork(spec: OpSpec, sample: Sample, target: Target) -> None:
    """A child process, forked after the parent has used its threads, computes the same bits."""
    if target.device != "cpu" or not hasattr(os, "fork"):
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(max(threads, 2))
    try:
        torch.ones(2**20).exp_()  # the pool of threads is there when the process forks
        with target.active():
            _fork_and_compare(spec, sample, target)
    finally:
        torch.set_num_threads(threads)


def _fork_and_compare(spec: OpSpec, sample: Sample, target: Target) -> None:
    want = call(spec.fn, sample, backend=target.backend)
    args = cast(sample.args, None)
    kwargs = {k: cast(v, None) for k, v in sample.kwargs.items()}
    cotangents = [_cotangent(r) for r in want[0]]
    child = os.fork()
    if child == 0:  # nothing of the parent's may run at exit: no pytest, no buffers
        status = 1
        try:
            results = outputs(spec.fn(*args, **kwargs, backend=target.backend))
            grads = _grads(results, leaves(args, kwargs), cotangents)
            # torch's own parallel operators wait forever here, as PyTorch documents.
            torch.set_num_threads(1)
            status = 0 if same_bits(want, (results, grads)) else 3
        finally:
            os._exit(status)
    deadline = time.monotonic() + _PATIENCE
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise AssertionError(f"{spec.name}: a forked child hangs")
        time.sleep(0.002)
    code = os.waitstatus_to_exitcode(status)
    assert code != 3, f"{spec.name}: a forked child computes other bits"
    assert code == 0, f"{spec.name}: a forked child ended with {code}"


def _grads(results: list[Tensor], wanted: list[Tensor], cotangents: list[Tensor]) -> list[Tensor]:
    """Gradients for cotangents, one for each result, zeros where there is none, as call() does."""
    pairs = [(r, c) for r, c in zip(results, cotangents, strict=True) if r.requires_grad]
    if not wanted or not pairs:
        return []
    given, sent = zip(*pairs, strict=True)
    grads = torch.autograd.grad(given, wanted, sent, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for g, w in zip(grads, wanted, strict=True)]


def far_strides(spec: OpSpec, sample: Sample, target: Target) -> None:
    """Rows that lie beyond 2^31 elements from each other: offsets are 64-bit.

    The memory between them is reserved and never touched, so this costs a page a row; on a GPU it
    is taken, up to 8 GiB a tensor, so what the tests before have left is given back first.
    """
    if target.device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()

    def far(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dim() < 2 or x.numel() == 0 or x.shape[0] < 2:
            return x
        inner = x[0].numel()
        step = _FAR // (x.shape[0] - 1) + inner
        buffer = torch.empty((x.shape[0] - 1) * step + inner, dtype=x.dtype, device=x.device)
        strides = (step, *x[0].contiguous().stride())
        moved = buffer.as_strided(x.shape, strides)
        moved.copy_(x.detach())
        return moved.requires_grad_(x.requires_grad)

    (oracle, oracle_grads), (yardstick, yardstick_grads) = expected(spec, sample)
    args = tuple(far(a) for a in sample.args)
    kwargs = {k: far(v) for k, v in sample.kwargs.items()}
    with target.active():
        results = outputs(spec.fn(*args, **kwargs, backend=target.backend))
    own = result_floors(spec, sample, len(results))
    for i, (g, o, y) in enumerate(zip(results, oracle, yardstick, strict=True)):
        what = f"{spec.name} output {i}, rows far apart"
        assert_close(g, o, y, factor=2.0, what=what, floor=own[i])
    with target.active():  # incoming gradients far apart as well
        grads = _grads(results, leaves(args, kwargs), [far(_cotangent(r)) for r in results])
    floors = gradient_floors(spec, sample, target)
    for i, (g, o, y) in enumerate(zip(grads, oracle_grads, yardstick_grads, strict=True)):
        what = f"{spec.name} gradient {i}, rows far apart"
        assert_close(g, o, y, factor=3.0, what=what, floor=floors[i])
