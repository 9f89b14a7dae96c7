// R * K dot products at once: R rows of a small operand held in cache, by K rows that are streamed.
// The lanes run along the dimension; each product has one accumulator.
#pragma once
#include <type_traits>

#include "simd.h"

namespace llmops::cpu::LLMOPS_ISA {

// Whether R rows of q hold the even of each 2 * W elements before the odd ones. Of four rows the
// tile's registers are all taken, and the mask of load_odd would cost more than it saves.
template <class T>
LLMOPS_INLINE constexpr bool even_first([[maybe_unused]] int64_t rows) {
#ifdef LLMOPS_HAS_SPLIT_LOADS
  return std::is_same_v<T, bf16> && rows <= 2;
#else
  return false;
#endif
}

// Elements d .. d + 2 * W of one of `rows` rows of q for dot_tile<T, false>.
template <class T>
LLMOPS_INLINE void store_row(float* row, int64_t rows, Vec low, Vec high) {
  if (even_first<T>(rows)) deinterleave(low, high, &low, &high);
  store(row, low);
  store(row + W, high);
}

// acc[r * K + t] = lanes of q[r] . w[t]; a product is the sum of its lanes (reduce_each).
// w: K pointers to `dim` elements. q: R rows of floats (store_row), or of bf16 where kPairs
// (vdpbf16ps), ldq floats apart and padded with zeros to 2 * W elements. kAhead: bytes from here on
// that are fetched into all caches; 0 fetches none. Past the second level is four times slower on
// Intel (benchmarks/NOTES.md).
template <class T, bool kPairs, int R, int K = W / R, int kAhead = 0>
LLMOPS_INLINE void dot_tile(const T* const* w, int64_t dim, const float* q, int64_t ldq, Vec* acc) {
  LLMOPS_UNROLL for (int i = 0; i < R * K; ++i) acc[i] = zero();
  int64_t d = 0;
  // Twice a line: once lost as much as it gained (benchmarks/NOTES.md).
  [[maybe_unused]] constexpr int kHalfLine = 32 / static_cast<int>(sizeof(T));
  [[maybe_unused]] const auto fetch = [&](int64_t at) __attribute__((always_inline)) {
    if constexpr (kAhead > 0) {
      LLMOPS_UNROLL for (int t = 0; t < K; ++t)
          __builtin_prefetch(reinterpret_cast<const char*>(w[t] + at) + kAhead);
    }
  };
  if constexpr (kPairs) {
#ifdef LLMOPS_HAS_DOT_PAIRS
    const auto step = [&](const auto& load_row) __attribute__((always_inline)) {
      Vec x[K];
      LLMOPS_UNROLL for (int t = 0; t < K; ++t) x[t] = load_row(w[t] + d);
      LLMOPS_UNROLL for (int r = 0; r < R; ++r) {
        const Vec row = load(q + r * ldq + d / 2);
        LLMOPS_UNROLL for (int t = 0; t < K; ++t) acc[r * K + t] =
            dot_pairs(row, x[t], acc[r * K + t]);
      }
    };
    for (; d + 2 * W <= dim; d += 2 * W) {
      fetch(d);
      step([](const bf16* p) __attribute__((always_inline)) { return load_pairs(p); });
    }
    const int tail = static_cast<int>(dim - d);
    if (tail > 0)
      step([&](const bf16* p) __attribute__((always_inline)) { return load_pairs_n(p, tail); });
#endif
  } else {
    const auto step = [&](int64_t at, const auto& load_row) __attribute__((always_inline)) {
      Vec x[K];
      LLMOPS_UNROLL for (int t = 0; t < K; ++t) x[t] = load_row(w[t] + d);
      LLMOPS_UNROLL for (int r = 0; r < R; ++r) {
        const Vec row = load(q + r * ldq + at);
        LLMOPS_UNROLL for (int t = 0; t < K; ++t) acc[r * K + t] = fma(row, x[t], acc[r * K + t]);
      }
    };
    if constexpr (even_first<T>(R)) {
#ifdef LLMOPS_HAS_SPLIT_LOADS
      for (; d + 2 * W <= dim; d += 2 * W) {
        fetch(d);
        step(d, [](const T* p) __attribute__((always_inline)) { return load_even(p); });
        step(d + W, [](const T* p) __attribute__((always_inline)) { return load_odd(p); });
      }
      if (d == dim) return;
      T rest[K][2 * W] = {};
      for (int t = 0; t < K; ++t) {
        for (int64_t i = d; i < dim; ++i) rest[t][i - d] = w[t][i];
      }
      LLMOPS_UNROLL for (int r = 0; r < R; ++r) {
        LLMOPS_UNROLL for (int t = 0; t < K; ++t) {
          Vec& sum = acc[r * K + t];
          sum = fma(load(q + r * ldq + d), load_even(rest[t]), sum);
          sum = fma(load(q + r * ldq + d + W), load_odd(rest[t]), sum);
        }
      }
#endif
    } else {
      for (; d + W <= dim; d += W) {
        if (d % kHalfLine == 0) fetch(d);
        step(d, [](const T* p) __attribute__((always_inline)) { return load(p); });
      }
      const int tail = static_cast<int>(dim - d);
      if (tail > 0)
        step(d, [&](const T* p) __attribute__((always_inline)) { return load_n(p, tail); });
    }
  }
}

}  // namespace llmops::cpu::LLMOPS_ISA
