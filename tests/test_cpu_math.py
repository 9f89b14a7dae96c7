"""The vector layer csrc/cpu/simd*.h by itself, per instruction set: conversions bit by bit, and the
maximum errors that simd_math.h states. Compiled here into small libraries and called by ctypes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np
import pytest
import torch
from simd_kit import ISAS, compile_simd

SOURCE = """
#include "simd.h"
using namespace llmops::cpu;
using namespace llmops::cpu::LLMOPS_ISA;
#define MAP(name) extern "C" void map_##name(const float* x, float* y, long n) { \\
  for (long i = 0; i < n; i += W) { \\
    const int left = n - i < W ? n - i : W; \\
    store_n(y + i, name(load_n(x + i, left)), left); } }
MAP(exp2) MAP(exp) MAP(exp2_softmax) MAP(exp2_narrow) MAP(exp_minus) MAP(sigmoid) MAP(tanh)
extern "C" int lanes() { return W; }
#define CONVERT(T) \\
  extern "C" void widen_##T(const T* x, float* y, long n) { \\
    long i = 0; \\
    for (; i + W <= n; i += W) store(y + i, load(x + i)); \\
    store_n(y + i, load_n(x + i, n - i), n - i); } \\
  extern "C" void narrow_##T(const float* x, T* y, long n) { \\
    long i = 0; \\
    for (; i + W <= n; i += W) store(y + i, load(x + i)); \\
    store_n(y + i, load_n(x + i, n - i), n - i); }
CONVERT(bf16) CONVERT(fp16)
"""


@pytest.fixture(scope="module", params=ISAS)
def library(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> ctypes.CDLL:
    return compile_simd(SOURCE, request.param, tmp_path_factory.mktemp("simd"))


def apply(function: object, x: np.ndarray, out_type: type) -> np.ndarray:
    x = np.ascontiguousarray(x)
    y = np.empty(x.shape, out_type)
    call: Callable[..., None] = function  # type: ignore[assignment]
    call(ctypes.c_void_p(x.ctypes.data), ctypes.c_void_p(y.ctypes.data), ctypes.c_long(x.size))
    return y


def ulps(got: np.ndarray, want: np.ndarray) -> float:
    """Largest error in units of the last place of the fp32 result, over normal results."""
    rounded = want.astype(np.float32)
    normal = np.isfinite(rounded) & (np.abs(rounded) >= np.finfo(np.float32).tiny)
    error = np.abs(got[normal].astype(np.float64) - want[normal])
    return float((error / np.spacing(np.abs(rounded[normal])).astype(np.float64)).max())


def spread(low: float, high: float) -> np.ndarray:
    return np.random.default_rng(0).uniform(low, high, 1 << 20).astype(np.float32)


def test_cpu_math_exp2(library: ctypes.CDLL) -> None:
    x = np.concatenate([spread(-126, 128), spread(-1, 1), np.arange(-126, 128, dtype=np.float32)])
    assert ulps(apply(library.map_exp2, x, np.float32), np.exp2(x.astype(np.float64))) < 1.6


def test_cpu_math_exp(library: ctypes.CDLL) -> None:
    x = np.concatenate([spread(-87, 88.7), spread(-1, 1)])
    assert ulps(apply(library.map_exp, x, np.float32), np.exp(x.astype(np.float64))) < 1.6


@pytest.mark.parametrize("name", ["exp", "exp2"])
def test_cpu_math_exponential_limits(library: ctypes.CDLL, name: str) -> None:
    x = np.array([np.nan, np.inf, -np.inf, 1e30, -1e30, 0.0, -0.0, 200, -200], np.float32)
    y = apply(getattr(library, f"map_{name}"), x, np.float32)
    assert np.isnan(y[0])
    np.testing.assert_array_equal(y[1:], np.array([np.inf, 0, np.inf, 0, 1, 1, np.inf, 0]))
    # Gradual underflow: subnormal results are right to the last subnormal bit or two. Or 0, where
    # the header says so: with AVX-512, and of exp.
    x = spread(-149, -126) if name == "exp2" else spread(-103, -88)
    want = getattr(np, name)(x.astype(np.float64))
    got = apply(getattr(library, f"map_{name}"), x, np.float32)
    may_be_zero = (got == 0) & (library.lanes() == 16 or name == "exp")
    assert bool((may_be_zero | (np.abs(got - want) <= 1.5 * 2.0**-149)).all())


def test_cpu_math_exponentials_have_no_subnormals(library: ctypes.CDLL) -> None:
    """With AVX-512: each vector that has one takes Intel's processors 60 ns."""
    if library.lanes() == 16:
        x = np.concatenate([spread(-160, -127), np.array([-np.inf], np.float32)])
        assert not apply(library.map_exp2, x, np.float32).any()
        assert not apply(library.map_exp2_softmax, x, np.float32).any()
        x = np.concatenate([spread(-110, -88.1), np.array([-np.inf], np.float32)])
        assert not apply(library.map_exp, x, np.float32).any()
        assert not apply(library.map_exp_minus, -x, np.float32).any()


def test_cpu_math_exp2_softmax(library: ctypes.CDLL) -> None:
    tiny = -np.geomspace(1e-30, 1, 1000)  # whose fractions round to 1
    x = np.concatenate([spread(-125, 127), spread(-1, 1), np.arange(-126, 127), tiny])
    x = x.astype(np.float32)
    got, want = apply(library.map_exp2_softmax, x, np.float32), np.exp2(x.astype(np.float64))
    assert np.abs(got / want - 1).max() < 1.95e-7  # 1.7e-7 where fma rounds once
    x = np.array([0, -127, -np.inf, np.nan], np.float32)
    y = apply(library.map_exp2_softmax, x, np.float32)
    np.testing.assert_array_equal(y, np.array([1, 0, 0, np.nan], np.float32))


def test_cpu_math_exp2_narrow(library: ctypes.CDLL) -> None:
    x = spread(-126, 127.99)
    want = np.exp2(x.astype(np.float64))
    got = apply(library.map_exp2_narrow, x, np.float32)
    assert np.abs(got / want - 1).max() < 2.8e-6
    x = np.array([np.nan, np.inf, -np.inf, 128.5, -127.5, 0.0], np.float32)
    y = apply(library.map_exp2_narrow, x, np.float32)
    assert np.isnan(y[0]) and y[1] == y[3] == np.inf and y[2] == 0
    assert y[4] < 2.0**-126 and abs(y[5] - 1) < 2.8e-6


def test_cpu_math_tanh(library: ctypes.CDLL) -> None:
    x = np.concatenate([np.linspace(-12, 12, 400_001), np.geomspace(1e-30, 1, 100_000)])
    x = x.astype(np.float32)
    want = np.tanh(x.astype(np.float64))
    error = np.abs(apply(library.map_tanh, x, np.float32) - want)
    assert bool((error <= 3e-7 * np.abs(want)).all())
    y = apply(library.map_tanh, np.array([np.nan, np.inf, -np.inf, 0], np.float32), np.float32)
    assert np.isnan(y[0]) and y[1:].tolist() == [1.0, -1.0, 0.0]


def test_cpu_math_sigmoid(library: ctypes.CDLL) -> None:
    x = np.concatenate([spread(-80, 80), spread(-2, 2)])
    want = 1 / (1 + np.exp(-x.astype(np.float64)))
    assert ulps(apply(library.map_sigmoid, x, np.float32), want) < 3.1
    y = apply(library.map_sigmoid, np.array([np.nan, np.inf, -np.inf], np.float32), np.float32)
    assert np.isnan(y[0]) and y[1] == 1 and y[2] == 0


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_cpu_math_conversions_bit_by_bit(
    library: ctypes.CDLL, name: str, dtype: torch.dtype
) -> None:
    every = np.arange(1 << 16, dtype=np.uint16)
    want = torch.from_numpy(every.view(np.int16)).view(dtype).float().numpy()
    np.testing.assert_array_equal(apply(getattr(library, f"widen_{name}"), every, np.float32), want)
    # Rounding: random bits of every exponent, the values halfway between two, and the specials.
    bits = np.random.default_rng(1).integers(0, 1 << 32, 1 << 20, dtype=np.uint32)
    halves = (every.astype(np.uint32) << 16) | 0x8000
    x = np.concatenate([bits, halves, halves + 1, halves - 1]).view(np.float32)
    ties = want[np.isfinite(want)]
    x = np.concatenate([x, ((ties[1:].astype(np.float64) + ties[:-1]) / 2).astype(np.float32)])
    got = apply(getattr(library, f"narrow_{name}"), x, np.uint16)
    rounded = torch.from_numpy(x).to(dtype)
    expected = rounded.view(torch.int16).numpy().view(np.uint16)
    nan = np.isnan(x)
    # vcvtneps2bf16 treats subnormal fp32 input and output as zero, below any tolerance in use.
    tiny = np.abs(x) < np.finfo(np.float32).tiny
    same = (got == expected) | (tiny & ((got & 0x7FFF) <= 1) if name == "bf16" else False)
    assert bool(same[~nan].all())
    assert bool(torch.from_numpy(got[nan].view(np.int16)).view(dtype).isnan().all())
