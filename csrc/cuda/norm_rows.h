// What the kernels of the norms' forward and backward share: a held row's deviations and their
// scale, and how long rows take their operands.
//
// The mean of a row with mean 25,000 is off by more than a small deviation: all sums are of h less
// a first mean, and the second, small one corrects it.
#pragma once

#include "norm.h"
#include "tile.h"

namespace llmops::cuda {

__device__ __forceinline__ float rstd_of(float square, float eps) {
  return 1.0f / sqrtf(square + eps);
}

// f(v, element) of a wide row's elements in place of v, a chunk after the other: where a thread has
// not the registers for two operands of all its elements at once.
template <class Tile, class F>
__device__ __forceinline__ void combined(const Rows& r, int64_t at, int64_t n, int thread,
                                         float (&v)[Tile::kHeld], const F& f) {
#pragma unroll
  for (int c = 0; c < Tile::kChunks; ++c) {
    const int first = Tile::column(true, opaque(thread), 8 * c);
    if (first >= n) continue;
    float other[8];
    if (r.type == kF32) {
      load_8(static_cast<const float*>(r.data) + at + first, other);
    } else {
      load_8(static_cast<const uint16_t*>(r.data) + at + first, r.type == kBf16, other);
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) v[8 * c + j] = f(v[8 * c + j], other[j]);
  }
}

// d in place of h, which is 0 from n on and stays so; gives rstd.
template <int kThreads, int kHeld>
__device__ __forceinline__ float deviations(float (&d)[kHeld], int64_t n, bool wide, bool centered,
                                            float eps, int thread) {
  using T = Tile<kThreads, kHeld / 8>;
  const float count = static_cast<float>(n);
  float sums[2] = {0.0f, 0.0f};
  if (centered) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < T::kHeld; ++i) sum += d[i];
    const float mean = row_sum<kThreads>(sum) / count;
    T::each(wide, thread, T::within(n), [&](int i) {
      d[i] -= mean;
      sums[0] += d[i];
    });
  }
#pragma unroll
  for (int i = 0; i < T::kHeld; ++i) sums[1] = fmaf(d[i], d[i], sums[1]);
  row_sums<kThreads>(sums);
  float square = sums[1] / count;
  if (centered) {
    const float left = sums[0] / count;  // the first mean's rounding
    // Not fmaxf, which would give 0 for NaN.
    square = square - left * left < 0.0f ? 0.0f : square - left * left;
    T::each(wide, thread, T::within(n), [&](int i) { d[i] -= left; });
  }
  return rstd_of(square, eps);
}

// Rows beyond those that are held: a block sweeps over its own.
constexpr int kLongThreads = 256;
using LongTile = Tile<kLongThreads>;

// Whether sums about `shift` must be taken again about a better mean: the row's beginning, whose
// mean it was, is unlike the row.
__device__ __forceinline__ bool unlike(float left, float square) {
  return left * left > 16.0f * (square - left * left);
}

// f(threads) of rows that are held, the last of them kMost.
template <int kMost, class F>
void with_norm_threads(int64_t n, const F& f) {
  if (n <= Tile<32>::kElements) {
    f(Constant<32>{});
  } else if (n <= Tile<64>::kElements) {
    f(Constant<64>{});
  } else if (n <= Tile<128>::kElements) {
    f(Constant<128>{});
  } else if (n <= Tile<256>::kElements) {
    f(Constant<256>{});
  } else {
    f(Constant<kMost>{});
  }
}

}  // namespace llmops::cuda
