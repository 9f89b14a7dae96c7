"""The properties every operator must have. Each check takes (spec, sample, target) and raises
AssertionError; CHECKS lists them by the name that the tests carry."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmops.testing import _surroundings
from llmops.testing._core import (
    OpSpec,
    Sample,
    Target,
    assert_close,
    call,
    cast,
    expected,
    gradient_floors,
    leaves,
    outputs,
    result_floors,
)

Check = Callable[[OpSpec, Sample, Target], None]


def matches_reference(spec: OpSpec, sample: Sample, target: Target) -> None:
    """Results within the error rule of the fp64 oracle."""
    with target.active():
        got, _ = call(spec.fn, sample, backend=target.backend)
    (oracle, _), (yardstick, _) = expected(spec, sample)
    floors = result_floors(spec, sample, len(got))
    for i, (g, o, y) in enumerate(zip(got, oracle, yardstick, strict=True)):
        assert_close(g, o, y, factor=2.0, what=f"{spec.name} output {i}", floor=floors[i])


def gradients(spec: OpSpec, sample: Sample, target: Target) -> None:
    """Gradients of every input that takes one, within the error rule, in its dtype."""
    with target.active():
        _, got = call(spec.fn, sample, backend=target.backend)
    (_, oracle), (_, yardstick) = expected(spec, sample)
    inputs = leaves(sample.args, sample.kwargs)
    assert len(got) == len(oracle) == len(inputs), f"{spec.name}: a gradient is missing"
    floors = gradient_floors(spec, sample, target)
    for i, (g, o, y, x) in enumerate(zip(got, oracle, yardstick, inputs, strict=True)):
        assert g.dtype == x.dtype, f"{spec.name} gradient {i}: dtype {g.dtype}, expected {x.dtype}"
        assert_close(g, o, y, factor=3.0, what=f"{spec.name} gradient {i}", floor=floors[i])


def _strided(x: Any, how: str) -> Any:
    """The same values in another memory layout."""
    if not isinstance(x, Tensor) or x.dim() == 0:
        return x
    source = x.detach()
    if how == "transposed" and x.dim() >= 2:
        moved = source.transpose(0, -1).contiguous().transpose(0, -1)
    elif how == "gapped":  # a slice of a wider buffer, whose other values must never be read
        poison = _poison(source)
        shape = (*x.shape[:-1], x.shape[-1] + 3)
        buffer = torch.full(shape, poison, dtype=x.dtype, device=x.device)
        moved = buffer[..., 1 : 1 + x.shape[-1]]
        moved.copy_(source)
    elif how == "stepped":
        buffer = torch.full(
            (*x.shape[:-1], 2 * x.shape[-1]), _poison(source), dtype=x.dtype, device=x.device
        )
        moved = buffer[..., ::2]
        moved.copy_(source)
    else:
        moved = source.clone()
    return moved.requires_grad_(x.requires_grad)


def _poison(x: Tensor) -> Any:
    if x.is_floating_point():
        return math.nan
    return True if x.dtype == torch.bool else -(10**6)


def any_strides(spec: OpSpec, sample: Sample, target: Target) -> None:
    """The same values in any layout: the same results and gradients within tolerance. Memory beside
    the tensors is NaN, so a read out of bounds shows."""
    (oracle, oracle_grads), (yardstick, yardstick_grads) = expected(spec, sample)
    floors = gradient_floors(spec, sample, target)
    for how in ("transposed", "gapped", "stepped"):
        args = tuple(_strided(a, how) for a in sample.args)
        kwargs = {k: _strided(v, how) for k, v in sample.kwargs.items()}
        moved = Sample(f"{sample.id}-{how}", args, kwargs)
        with target.active():
            results = outputs(spec.fn(*moved.args, **moved.kwargs, backend=target.backend))
            grads = _gradients_in_place(moved, results)
        own = result_floors(spec, sample, len(results))
        for i, (g, o, y) in enumerate(zip(results, oracle, yardstick, strict=True)):
            assert_close(g, o, y, factor=2.0, what=f"{spec.name} output {i}, {how}", floor=own[i])
        for i, (g, o, y) in enumerate(zip(grads, oracle_grads, yardstick_grads, strict=True)):
            what = f"{spec.name} gradient {i}, {how}"
            assert_close(g, o, y, factor=3.0, what=what, floor=floors[i])


def _gradients_in_place(sample: Sample, results: list[Tensor]) -> list[Tensor]:
    from llmops.testing._core import _cotangent

    wanted = leaves(sample.args, sample.kwargs)
    differentiable = [r for r in results if r.requires_grad]
    if not wanted or not differentiable:
        return []
    # Incoming gradients with strides of their own, as a transposed consumer would send.
    cotangents = [_strided(_cotangent(r), "transposed") for r in differentiable]
    grads = torch.autograd.grad(differentiable, wanted, cotangents, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for g, w in zip(grads, wanted, strict=True)]


def bitwise_repeatable(spec: OpSpec, sample: Sample, target: Target) -> None:
    """Same inputs, same bits: run to run, and with one thread or all."""
    threads = torch.get_num_threads()
    with target.active():
        first = call(spec.fn, sample, backend=target.backend)
        second = call(spec.fn, sample, backend=target.backend)
        torch.set_num_threads(1 if threads > 1 else 2)
        try:
            third = call(spec.fn, sample, backend=target.backend)
        finally:
            torch.set_num_threads(threads)
    for other in (second, third):
        for a, b in zip(first[0] + first[1], other[0] + other[1], strict=True):
            assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)), f"{spec.name}: bits differ"


def mutates_nothing(spec: OpSpec, sample: Sample, target: Target) -> None:
    """Inputs and incoming gradients keep their values."""
    args = cast(sample.args, None)
    kwargs = {k: cast(v, None) for k, v in sample.kwargs.items()}
    tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
    before = [t.detach().clone() for t in tensors]
    with target.active():
        results = outputs(spec.fn(*args, **kwargs, backend=target.backend))
        wanted, differentiable = leaves(args, kwargs), [r for r in results if r.requires_grad]
        if wanted and differentiable:
            cotangents = [torch.ones_like(r) for r in differentiable]
            torch.autograd.grad(differentiable, wanted, cotangents, allow_unused=True)
            assert all(bool((c == 1).all()) for c in cotangents), "an incoming gradient changed"
    for t, b in zip(tensors, before, strict=True):
        assert torch.equal(t.nan_to_num(7.0), b.nan_to_num(7.0)), f"{spec.name}: an input changed"


def nan_stays_in_row(spec: OpSpec, sample: Sample, target: Target) -> None:
    """A NaN in one row of the first argument reaches that row of the results and no other."""
    x = sample.args[0]
    if not x.is_floating_point() or x.numel() == 0 or x.dim() < 2:
        return
    clean, dirty = cast(sample.args, None), cast(sample.args, None)
    dim = sample.row_dim
    with torch.no_grad(), target.active():
        want = outputs(spec.fn(*clean, **sample.kwargs, backend=target.backend))[0]
        want = want.transpose(dim, -1)
        row = tuple(s // 2 for s in want.shape[:-1])
        seen = want[row].nonzero()  # a masked element's NaN may well be dropped
        if len(seen) == 0:
            return
        dirty[0].transpose(dim, -1)[(*row, int(seen[0]))] = math.nan
        got = outputs(spec.fn(*dirty, **sample.kwargs, backend=target.backend))[0]
        got = got.transpose(dim, -1)
    touched = torch.zeros(want.shape[:-1], dtype=torch.bool)
    touched[row] = True
    assert torch.equal(got[~touched], want[~touched]), f"{spec.name}: NaN left its row"
    assert bool(got[row].isnan().any()), f"{spec.name}: a NaN in the row disappeared"


def double_backward(spec: OpSpec, sample: Sample, target: Target) -> None:
    """Gradients of gradients are those of the fp64 reference (or the op refuses to)."""

    def second(fn: Callable[..., Any], dtype: torch.dtype | None, **extra: Any) -> list[Tensor]:
        args = cast(sample.args, dtype)
        kwargs = {k: cast(v, dtype) for k, v in sample.kwargs.items()}
        results = [r for r in outputs(fn(*args, **kwargs, **extra)) if r.requires_grad]
        wanted = leaves(args, kwargs)
        loss: Any = sum((r * r).masked_fill(r.detach().isinf(), 0.0).sum() for r in results)
        grads = torch.autograd.grad(loss, wanted, create_graph=True, allow_unused=True)
        total = sum((g * g).sum() for g in grads if g is not None and g.requires_grad)
        if not isinstance(total, Tensor):
            return []
        found = torch.autograd.grad(total, wanted, allow_unused=True)
        return [torch.zeros_like(w) if g is None else g for g, w in zip(found, wanted, strict=True)]

    if not leaves(sample.args, sample.kwargs):
        return
    with target.active():
        got = second(spec.fn, None, backend=target.backend)
    oracle = second(spec.reference, torch.float64)
    yardstick = second(spec.torch_fn, None)
    for i, (g, o, y) in enumerate(zip(got, oracle, yardstick, strict=True)):
        # Rounding of the first gradient enters squared: three times the factor of one gradient.
        whole = [t.reshape(-1) for t in (g, o, y)]
        assert_close(*whole, factor=9.0, what=f"{spec.name} second gradient {i}")


def compiles_fullgraph(spec: OpSpec, sample: Sample, target: Target) -> None:
    """torch.compile without a graph break, static and dynamic, gives the eager bits."""

    def step(*args: Any, **kwargs: Any) -> Any:
        return spec.fn(*args, **kwargs, backend=target.backend)

    with target.active():
        eager = call(spec.fn, sample, backend=target.backend)
        for dynamic in (False, True):
            torch._dynamo.reset()
            compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
            got = call(compiled, sample)
            for a, b in zip(eager[0] + eager[1], got[0] + got[1], strict=True):
                assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)), (
                    f"{spec.name}: compiled differs from eager (dynamic={dynamic})"
                )


def func_grad(spec: OpSpec, sample: Sample, target: Target) -> None:
    """torch.func.grad equals autograd."""
    args = sample.args
    positions = [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.requires_grad]
    if not positions:
        return

    def loss(*given: Tensor) -> Tensor:
        full = list(args)
        for i, g in zip(positions, given, strict=True):
            full[i] = g
        results = outputs(spec.fn(*full, **sample.kwargs, backend=target.backend))
        total: Any = sum(
            r.float().masked_fill(r.detach().isinf(), 0.0).square().sum() for r in results
        )
        return total

    with target.active():
        detached = [args[i].detach() for i in positions]
        got = torch.func.grad(loss, argnums=tuple(range(len(positions))))(*detached)
        taking = [d.requires_grad_() for d in detached]
        want = torch.autograd.grad(loss(*taking), taking)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b), f"{spec.name}: torch.func.grad differs from autograd"


CHECKS: dict[str, Check] = {
    "matches_reference": matches_reference,
    "gradients": gradients,
    "any_strides": any_strides,
    "bitwise_repeatable": bitwise_repeatable,
    "mutates_nothing": mutates_nothing,
    "nan_stays_in_row": nan_stays_in_row,
    "double_backward": double_backward,
    "compiles_fullgraph": compiles_fullgraph,
    "func_grad": func_grad,
    "vmap": _surroundings.vmap,
    "forward_mode_refused": _surroundings.forward_mode_refused,
    "autocast": _surroundings.autocast,
    "exports": _surroundings.exports,
    "from_threads": _surroundings.from_threads,
    "after_fork": _surroundings.after_fork,
    "far_strides": _surroundings.far_strides,
}
