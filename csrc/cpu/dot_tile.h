// R * K dot products at once: R rows of a small operand held in cache, by K rows that are streamed.
// The lanes run along the dimension; each product has one accumulator.
#pragma once
#include "simd.h"

namespace llmops::cpu::LLMOPS_ISA {

// acc[r * K + t] = lanes of q[r] . w[t]; a product is the sum of its lanes (reduce_each).
// w: K pointers to `dim` elements. q: R rows of floats, or of bf16 where kPairs (vdpbf16ps),
// ldq floats apart and padded with zeros to whole vectors. kAhead: bytes from here on that are
// fetched into all caches; 0 fetches none. Past the second level is four times slower on Intel
// (benchmarks/NOTES.md).
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
    const auto step = [&](const auto& load_row) __attribute__((always_inline)) {
      Vec x[K];
      LLMOPS_UNROLL for (int t = 0; t < K; ++t) x[t] = load_row(w[t] + d);
      LLMOPS_UNROLL for (int r = 0; r < R; ++r) {
        const Vec row = load(q + r * ldq + d);
        LLMOPS_UNROLL for (int t = 0; t < K; ++t) acc[r * K + t] = fma(row, x[t], acc[r * K + t]);
      }
    };
    for (; d + W <= dim; d += W) {
      if (d % kHalfLine == 0) fetch(d);
      step([](const T* p) __attribute__((always_inline)) { return load(p); });
    }
    const int tail = static_cast<int>(dim - d);
    if (tail > 0) step([&](const T* p) __attribute__((always_inline)) { return load_n(p, tail); });
  }
}

}  // namespace llmops::cpu::LLMOPS_ISA
