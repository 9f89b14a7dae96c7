"""Compiled Triton kernels, run from their PTX without a GPU: see ptx_emulator.py. What Hopper's
matrix instructions are fed with stands in the PTX alone."""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmops import reference

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)
sys.path.append(str(Path(__file__).resolve().parent.parent / "tools"))

import aot_compile
import ptx_emulator
import ptx_races
import triton
from llmops.kernels.triton import _config, _launch
from ptx_tma import TensorMap
from triton.tools.tensor_descriptor import TensorDescriptor

from llmops.backends import get

TARGET = "sm_90"
KERNELS = get("triton")


def emulated(call: Any, without: str = "") -> Any:
    """What the launcher returns, after its launches have been compiled and run, instructions of one
    kind left out."""
    with _launch.recording(TARGET.replace("_", "")) as launches:
        found = call()
    for launch in launches:
        source, options, _ = aot_compile._specialize(launch, "", TARGET)
        compiled = triton.compile(source, aot_compile.TARGETS[TARGET], options)
        ptx, maps = compiled.asm["ptx"], iter(compiled.metadata.tensordesc_meta)
        given = [launch.arguments[n] for n, t in source.signature.items() if t != "constexpr"]
        given = [TensorMap(x, next(maps)) if isinstance(x, TensorDescriptor) else x for x in given]
        kept = [line for line in ptx.splitlines() if not (without and without in line)]
        ptx_emulator.run("\n".join(kept), launch.grid, given, ptx_races.BLOCK)
    return found


def near(got: Tensor, want: Tensor, factor: float = 4.0) -> None:
    """To the rounding of got's dtype, and of the weights of a product in it."""
    allowed = factor * torch.finfo(got.dtype).eps * want.abs().max()
    error = (got.double() - want).abs().max()
    assert got.isfinite().all() and error <= allowed, (error, allowed)


def qkv(queries: int, keys: int, dims: tuple[int, int], heads: tuple[int, int], dtype: Any) -> Any:
    torch.manual_seed(0)
    shapes = ((heads[0], queries, dims[0]), (heads[1], keys, dims[0]), (heads[1], keys, dims[1]))
    return [torch.randn(1, *shape).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("dims", [(64, 64), (33, 20), (20, 20), (37, 19)], ids=str)
def test_triton_ptx_attention(dims: tuple[int, int], dtype: torch.dtype) -> None:
    """Products of registers and of shared memory, by copies on their way and by plain loads."""
    q, k, v = qkv(70, 130, dims, (1, 1), dtype)
    out, _ = emulated(lambda: KERNELS.attention(q, k, v, None, True, dims[0] ** -0.5))
    near(out, reference.attention(*(x.double() for x in (q, k, v)), causal=True))


@pytest.mark.parametrize("dims", [(64, 64), (128, 64), (40, 24)], ids=str)
def test_triton_ptx_attention_by_descriptors(dims: tuple[int, int]) -> None:
    """TMA's copies of several blocks of a group's keys, tokens first: where they begin, their
    swizzle, which is the products', and the barriers that tell one stage's from the next."""
    q, k, v = qkv(70, 300, dims, (4, 2), torch.bfloat16)
    k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    with _config.override("attention", DESCRIPTORS=True):
        call = functools.partial(KERNELS.attention, q, k, v, None, True, dims[0] ** -0.5)
        out, _ = emulated(call)
        near(out, reference.attention(*(x.double() for x in (q, k, v)), causal=True))
        with pytest.raises(AssertionError, match="under way"):
            emulated(call, without="mbarrier.try_wait")


@pytest.mark.parametrize("dims", [(64, 64), (33, 20)], ids=str)
@pytest.mark.parametrize("queries", [1, 70])
def test_triton_ptx_attention_kvcache(queries: int, dims: tuple[int, int]) -> None:
    q, k, v = qkv(queries, 130, dims, (2, 1), torch.bfloat16)
    ends = torch.tensor([77])
    out, _ = emulated(
        lambda: KERNELS.attention_kvcache(q, k, v, ends, None, None, True, dims[0] ** -0.5)
    )
    want = reference.attention_kvcache(*(x.double() for x in (q, k, v)), ends, causal=True)
    near(out, want)


def test_triton_ptx_attention_gradients() -> None:
    q, k, v = qkv(64, 64, (64, 64), (1, 1), torch.bfloat16)
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    out, lse = reference.attention(*wide, causal=True, return_lse=True)
    grad = torch.randn(out.shape).bfloat16()
    want = torch.autograd.grad(out, wide, grad.double())
    given = (grad, None, q, k, v, None, out.bfloat16().detach(), lse.float().detach())
    got = emulated(lambda: KERNELS.attention_bwd(*given, True, 0.125, False))
    for g, w in zip(got, want, strict=False):
        near(g, w)


@pytest.mark.parametrize("n", [1024, 1000])
def test_triton_ptx_softmax(n: int) -> None:
    torch.manual_seed(0)
    x, grad = torch.randn(3, n).bfloat16(), torch.randn(3, n).bfloat16()
    want = torch.softmax(x.double(), -1)
    near(emulated(lambda: KERNELS.softmax(x)), want)
    y = want.bfloat16()
    exact = y.double() * (grad.double() - (y.double() * grad.double()).sum(-1, keepdim=True))
    near(emulated(lambda: KERNELS.softmax_bwd(grad, y, 1.0, torch.bfloat16)), exact)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("n", [1, 15, 1000])
def test_triton_ptx_cross_entropy(n: int, weighted: bool) -> None:
    """Of a single class the gradient is nothing, and nothing is left by what the compiler fuses."""
    torch.manual_seed(0)
    x, target = torch.randn(3, n).bfloat16(), torch.randint(n, (3,))
    weight = torch.rand(n) + 0.5 if weighted else None
    wide = x.double().requires_grad_()
    classes = weight if weight is None else weight.double()
    want = F.cross_entropy(wide, target, classes, label_smoothing=0.3)
    given = (-100, 0.3, 0.0, 1)  # the mean
    loss, lse = emulated(lambda: KERNELS.cross_entropy(x, target, weight, *given, torch.float32))
    near(loss, want.detach())
    grad = torch.tensor(0.7)
    dx = emulated(lambda: KERNELS.cross_entropy_bwd(grad, None, x, target, weight, lse, *given))
    near(dx, torch.autograd.grad(want, wide, grad.double())[0])


def test_triton_ptx_copies_land_when_awaited() -> None:
    """Without the waits the products read what shared memory begins as: NaN, in what is computed or
    where a branch asks for it."""
    q, k, v = qkv(70, 130, (64, 64), (1, 1), torch.bfloat16)
    call = functools.partial(KERNELS.attention, q, k, v, None, True, 0.125)
    want = reference.attention(*(x.double() for x in (q, k, v)), causal=True)
    near(emulated(call)[0], want)
    with pytest.raises(AssertionError):
        near(emulated(call, without="cp.async.wait_group")[0], want)


@pytest.mark.skipif(
    ptx_races.BLOCK is not ptx_races.Watched, reason="Triton 3.6 is not watched: see ptx_races.py"
)
@pytest.mark.parametrize("without", ["bar.sync", "fence.proxy.async", "wgmma.wait_group"])
def test_triton_ptx_races_are_seen(without: str) -> None:
    q, k, v = qkv(70, 300, (64, 64), (1, 1), torch.bfloat16)
    with pytest.raises(AssertionError, match=r"barrier|fence|may still read"):
        emulated(lambda: KERNELS.attention(q, k, v, None, True, 0.125), without)


def test_triton_ptx_accesses_are_watched() -> None:
    """A tensor that is shorter than the kernel was told."""
    x = torch.randn(3, 1024)
    with _launch.recording("sm90") as launches:
        KERNELS.softmax(x)
    (launch,) = launches
    short = dict(launch.arguments, x=x[:2].clone())
    source, options, _ = aot_compile._specialize(launch, "", TARGET)
    ptx = triton.compile(source, aot_compile.TARGETS[TARGET], options).asm["ptx"]
    given = [short[n] for n, t in source.signature.items() if t != "constexpr"]
    with pytest.raises(AssertionError, match="is inside no tensor"):
        ptx_emulator.run(ptx, launch.grid, given)
