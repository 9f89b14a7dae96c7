// Rotary position embedding over rows of head_dim elements. Formula: rope.h
//
// Lanes run along the pairs of one row. Halves are two plain loads; pairs are two loads and a
// de-interleaving shuffle. fp32 arithmetic with one rounding to the storage type. Memory: each
// element is read once and written once, and a table row is read per row (the caller orders rows
// so that it comes from L1). Both elements of a pair are loaded before either is stored, so y may
// be x.
#include "rope.h"

#include "simd.h"

namespace llmops::cpu::LLMOPS_ISA {
namespace {

template <bool Inverse>
LLMOPS_INLINE void rotate(Vec a, Vec b, Vec c, Vec s, Vec* a_out, Vec* b_out) {
  if constexpr (Inverse) {
    *a_out = fma(b, s, a * c);
    *b_out = fnma(a, s, b * c);
  } else {
    *a_out = fnma(b, s, a * c);
    *b_out = fma(a, s, b * c);
  }
}

// n of W pairs from i on; n is W in the main loop, and the compiler then drops the masks.
template <class T, bool Pairs, bool Inverse>
LLMOPS_INLINE void turn(const T* x, T* y, const float* cos, const float* sin, int64_t half,
                        int64_t i, int n) {
  const bool full = n == W;
  const Vec c = full ? load(cos + i) : load_n(cos + i, n);
  const Vec s = full ? load(sin + i) : load_n(sin + i, n);
  Vec a, b;
  if constexpr (Pairs) {
    const T* p = x + 2 * i;
    T* q = y + 2 * i;
    // The second vector starts inside the row only when more than W elements are left.
    const int first = 2 * n < W ? 2 * n : W, second = 2 * n - first;
    const Vec low = full ? load(p) : load_n(p, first);
    const Vec high = full ? load(p + W) : load_n(p + first, second);
    Vec low_out, high_out;
    deinterleave(low, high, &a, &b);
    rotate<Inverse>(a, b, c, s, &a, &b);
    interleave(a, b, &low_out, &high_out);
    if (full) {
      store(q, low_out);
      store(q + W, high_out);
    } else {
      store_n(q, low_out, first);
      store_n(q + first, high_out, second);
    }
  } else {
    a = full ? load(x + i) : load_n(x + i, n);
    b = full ? load(x + half + i) : load_n(x + half + i, n);
    rotate<Inverse>(a, b, c, s, &a, &b);
    if (full) {
      store(y + i, a);
      store(y + half + i, b);
    } else {
      store_n(y + i, a, n);
      store_n(y + half + i, b, n);
    }
  }
}

template <class T, bool Pairs, bool Inverse>
LLMOPS_INLINE void rows_loop(const RopeParams& p, const RopeRows& r) {
  const int64_t half = p.rotary / 2;
  const T* x = static_cast<const T*>(r.x);
  T* y = static_cast<T*>(r.y);
  const bool copy_rest = x != y && p.rotary < p.head_dim;
  for (int64_t row = 0; row < r.rows; ++row, x += r.x_step, y += r.y_step) {
    const int64_t at = r.positions ? r.positions[row] : row;
    const float* cos = r.cos + at * r.cos_step;
    const float* sin = r.sin + at * r.sin_step;
    int64_t i = 0;
    for (; i + W <= half; i += W) turn<T, Pairs, Inverse>(x, y, cos, sin, half, i, W);
    if (i < half) turn<T, Pairs, Inverse>(x, y, cos, sin, half, i, static_cast<int>(half - i));
    if (copy_rest)
      __builtin_memcpy(y + p.rotary, x + p.rotary, (p.head_dim - p.rotary) * sizeof(T));
  }
}

}  // namespace

void rope_rows(const RopeParams& p, const RopeRows& r) {
  LLMOPS_DISPATCH(p.type, T, {
    if (p.interleaved) {
      p.inverse ? rows_loop<T, true, true>(p, r) : rows_loop<T, true, false>(p, r);
    } else {
      p.inverse ? rows_loop<T, false, true>(p, r) : rows_loop<T, false, false>(p, r);
    }
  });
}

}  // namespace llmops::cpu::LLMOPS_ISA
