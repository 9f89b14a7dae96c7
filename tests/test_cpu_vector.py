"""The lanes of csrc/cpu/simd*.h, per instruction set: tails, masks, permutations, sums across lanes
and bf16 pairs, each against its definition in numpy."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from simd_kit import ISAS, compile_simd

SOURCE = """
#include "simd.h"
using namespace llmops::cpu;
using namespace llmops::cpu::LLMOPS_ISA;
extern "C" {
int width() { return W; }
#define TAILS(T) \\
  void load_##T(const T* p, float* out, int n) { store(out, load_n(p, n, -7.0f)); } \\
  void store_##T(const float* p, T* out, int n) { store_n(out, load(p), n); }
TAILS(float) TAILS(bf16) TAILS(fp16)
void masks(const float* a, const float* b, const uint8_t* keep, int n, uint32_t* bits, float* out) {
  bits[0] = mask_bits(less(load(a), load(b)));
  bits[1] = mask_bits(equal(load(a), load(b)));
  bits[2] = mask_bits(first_n(n));
  bits[3] = mask_bits(lanes_ge(n));
  bits[4] = mask_bits(load_mask_n(keep, n));
  bits[5] = mask_bits(mask_and(load_mask_n(keep, W), less(load(a), load(b))));
  store(out, select(load_mask_n(keep, W), load(a), load(b)));
}
void lanewise(const float* a, const float* b, float* out) {
  const Vec x = load(a), y = load(b);
  const Vec results[] = {x + y, x - y, x * y, x / y, fma(x, y, x), fnma(x, y, x), max(x, y),
                         min(x, y), sqrt(x), abs(x), round(x), scale_by_power(x, round(y))};
  for (int i = 0; i < 12; ++i) store(out + i * W, results[i]);
}
void across(const float* a, float* sum, float* top) { *sum = reduce_add(load(a));
  *top = reduce_max(load(a)); }
void rows(const float* a, float* transposed, float* sums) {
  Vec r[W];
  for (int i = 0; i < W; ++i) r[i] = load(a + i * W);
  store(sums, reduce_each(r));
  transpose(r);
  for (int i = 0; i < W; ++i) store(transposed + i * W, r[i]);
}
void split(const float* a, float* apart, float* joined) {
  Vec x, y, low, high;
  deinterleave(load(a), load(a + W), &x, &y);
  interleave(load(a), load(a + W), &low, &high);
  store(apart, x), store(apart + W, y), store(joined, low), store(joined + W, high);
}
#ifdef __AVX512F__
void pairs(const bf16* a, const bf16* b, int n, float* out) {
  Vec r[5];
  const Vec x = load_pairs_n(a, n), y = load_pairs_n(b, n);
  interleave_pairs(x, y, r);
  unpack_pairs(x, y, r + 2);
  r[4] = flip_pair_signs(x);
  for (int i = 0; i < 5; ++i) store(out + i * W, r[i]);
}
void repack(const float* a, float* out) {
  Vec r[2] = {load(a), load(a + W)};
  repack_halves(r);
  store(out, r[0]), store(out + W, r[1]);
}
#endif
#ifdef LLMOPS_HAS_DOT_PAIRS
void merge(const float* a, float* merged, bf16* first, bf16* second) {
  store(merged, make_pairs(load(a), load(a + W)));
  store_halves(first, second, narrow_pairs(load(a), load(a + W)));
}
void dot(const float* a, const float* b, const float* c, float* narrowed, float* out) {
  store(narrowed, narrow_pairs(load(a), load(a + W)));
  store(out, dot_pairs(load(narrowed), narrow_pairs(load(b), load(b + W)), load(c)));
}
#endif
}
"""
f32 = np.float32


class Library:
    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.width: int = library.width()

    def __call__(self, name: str, *args: np.ndarray | int) -> None:
        pointers = [a if isinstance(a, int) else ctypes.c_void_p(a.ctypes.data) for a in args]
        getattr(self.library, name)(*pointers)


@pytest.fixture(scope="module", params=ISAS)
def simd(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Library:
    return Library(compile_simd(SOURCE, request.param, tmp_path_factory.mktemp("simd")))


@pytest.fixture
def pair_simd(simd: Library) -> Library:
    if not hasattr(simd.library, "pairs"):
        pytest.skip("bf16 pairs belong to the AVX-512 copies")
    return simd


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(f32)


def to_bf16(x: np.ndarray) -> np.ndarray:
    """The upper halves, rounded to nearest even."""
    u = np.ascontiguousarray(x, f32).view(np.uint32)
    return ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(x: np.ndarray) -> np.ndarray:
    return (x.astype(np.uint32) << 16).view(f32)


@pytest.mark.parametrize("kind", ["float", "bf16", "fp16"])
def test_cpu_vector_tails(simd: Library, kind: str) -> None:
    """n lanes are read and written, no more, for every n up to the width and one beyond."""
    w, x = simd.width, normal(simd.width)
    stored = {"float": x, "bf16": to_bf16(x), "fp16": x.astype(np.float16)}[kind]
    values = {"float": x, "bf16": from_bf16(to_bf16(x)), "fp16": stored.astype(f32)}[kind]
    for n in range(w + 2):
        out = np.zeros(w, f32)
        simd(f"load_{kind}", stored, out, n)
        kept = np.arange(w) < n
        np.testing.assert_array_equal(out, np.where(kept, values, f32(-7)))
        memory = np.full(w, 3, stored.dtype)
        simd(f"store_{kind}", x, memory, n)
        np.testing.assert_array_equal(memory, np.where(kept, stored, memory.dtype.type(3)))


def test_cpu_vector_masks(simd: Library) -> None:
    w, lane = simd.width, np.arange(simd.width)
    a, b = normal(w), normal(w, seed=1)
    a[0], b[w // 2] = np.nan, a[w // 2]
    keep = np.array([0, 1, 255, 0, 128] * 4, np.uint8)[:w]
    for n in range(w + 1):
        bits, out = np.zeros(6, np.uint32), np.zeros(w, f32)
        simd("masks", a, b, keep, n, bits, out)
        kept = keep != 0
        lanes = [a < b, a == b, lane < n, lane >= n, kept & (lane < n), kept & (a < b)]
        np.testing.assert_array_equal(bits, [int(((1 << lane) * m).sum()) for m in lanes])
        np.testing.assert_array_equal(out, np.where(kept, a, b))


def test_cpu_vector_lanewise(simd: Library) -> None:
    """Correctly rounded, specials included; max and min give the second operand for NaN."""
    w = simd.width
    special = np.array([0, -0.0, np.inf, -np.inf, np.nan, 1e-40, 2.5, -3.5, 3e38, 1e-30], f32)
    a, b = (v.ravel() for v in np.meshgrid(special, special))
    a, b = np.resize(a, 112), np.resize(b, 112)
    with np.errstate(all="ignore"):
        da, db = a.astype(np.float64), b.astype(np.float64)
        power = np.exp2(np.clip(np.round(db), -1000, 1000))
        fused = (da * db + da).astype(f32), (da - da * db).astype(f32)
        chosen = np.where(a > b, a, b), np.where(a < b, a, b)
        alone = np.sqrt(a), np.abs(a), np.rint(a), (da * power).astype(f32)
        want = np.stack([a + b, a - b, a * b, a / b, *fused, *chosen, *alone])
    # scale_by_power is for integers within its range; AVX2 holds infinities to their neighbours.
    scaled = np.isfinite(b) & (np.abs(b) <= 252) & np.isfinite(a)
    for i in range(0, 112, w):
        out = np.zeros((12, w), f32)
        simd("lanewise", a[i : i + w], b[i : i + w], out)
        np.testing.assert_array_equal(out[:11], want[:11, i : i + w])
        valid = scaled[i : i + w]
        np.testing.assert_array_equal(out[11][valid], want[11, i : i + w][valid])


def test_cpu_vector_across(simd: Library) -> None:
    w = simd.width
    a, (total, top) = np.arange(w, dtype=f32)[::-1] - 3, np.zeros((2, 1), f32)
    simd("across", np.ascontiguousarray(a), total, top)
    assert total[0] == a.sum() and top[0] == a.max()
    block = np.arange(w * w, dtype=f32).reshape(w, w)
    transposed, sums = np.zeros((w, w), f32), np.zeros(w, f32)
    simd("rows", block, transposed, sums)
    if w > 1:  # transpose of one lane is nothing to do
        np.testing.assert_array_equal(transposed, block.T)
    np.testing.assert_array_equal(sums, block.sum(1))
    apart, joined, line = np.zeros(2 * w, f32), np.zeros(2 * w, f32), np.arange(2 * w, dtype=f32)
    simd("split", line, apart, joined)
    np.testing.assert_array_equal(apart, np.concatenate([line[::2], line[1::2]]))
    np.testing.assert_array_equal(joined, line.reshape(2, w).T.ravel())


def test_cpu_vector_pairs(pair_simd: Library) -> None:
    """Interleaving, packing and signs of bf16 pairs, with every length of tail."""
    w = pair_simd.width
    a, b = to_bf16(normal(2 * w)), to_bf16(normal(2 * w, seed=1))
    for n in range(2 * w + 2):
        out = np.zeros((5, w), f32)
        pair_simd("pairs", a, b, n, out)
        cells = out.view(np.uint16).reshape(5, w, 2)
        x, y = (np.where(np.arange(2 * w) < n, v, 0).astype(np.uint16) for v in (a, b))
        both = np.stack([x, y], 1)
        np.testing.assert_array_equal(cells[:2].reshape(2 * w, 2), both)
        quarters = both.reshape(-1, 4, 2)  # unpack_pairs: even quarters first, then odd ones
        np.testing.assert_array_equal(cells[2].reshape(-1, 4, 2), quarters[::2])
        np.testing.assert_array_equal(cells[3].reshape(-1, 4, 2), quarters[1::2])
        np.testing.assert_array_equal(cells[4].ravel(), x ^ 0x8000)
    line, out = np.arange(2 * w, dtype=f32), np.zeros(2 * w, f32)
    pair_simd("repack", line, out)
    quarters = line.reshape(2, -1, 4)
    np.testing.assert_array_equal(out, np.stack([quarters[0], quarters[1]], 1).ravel())


def test_cpu_vector_dot_pairs(pair_simd: Library) -> None:
    """One vdpbf16ps: the upper product first, each sum rounded to fp32, subnormals zero."""
    if not hasattr(pair_simd.library, "dot"):
        pytest.skip("dot_pairs belongs to the AVX-512-BF16 copy")
    w = pair_simd.width
    a, b, c = normal(2 * w), normal(2 * w, seed=1), normal(w, seed=2)
    a[:6] = [1e-40, 1e-30, np.inf, -1e-39, 1e-20, 1e-20]
    b[:6] = [1e30, 1e-10, 2, 1e38, 1e-19, -1e-19]
    c[:3] = [0, 1e-40, 1]
    narrowed, out = np.zeros(w, f32), np.zeros(w, f32)
    pair_simd("dot", a, b, c, narrowed, out)

    def flush(x: np.ndarray) -> np.ndarray:
        return np.where(np.abs(x) < np.finfo(f32).tiny, np.copysign(0, x), x)

    merged, halves = np.zeros(w, f32), np.zeros((2, w), np.uint16)
    pair_simd("merge", b, merged, halves[0], halves[1])
    narrow = to_bf16(flush(b)).reshape(2, w)
    np.testing.assert_array_equal(merged.view(np.uint16).reshape(w, 2), narrow.T)
    np.testing.assert_array_equal(halves, narrow)

    x, y = (from_bf16(to_bf16(flush(v))).reshape(w, 2).astype(np.float64) for v in (a, b))
    np.testing.assert_array_equal(narrowed.view(np.uint16), to_bf16(flush(a)))
    upper = flush((flush(c).astype(np.float64) + x[:, 1] * y[:, 1]).astype(f32))
    want = flush((upper.astype(np.float64) + x[:, 0] * y[:, 0]).astype(f32))
    # In fp64 the sum may round once more, which moves a tie by an ulp at most.
    np.testing.assert_allclose(out, want, rtol=2.0**-23)
    assert out[0] == 0 and np.isinf(out[1])
