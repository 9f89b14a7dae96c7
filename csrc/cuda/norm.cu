// RMS norm and layer norm forward. Formulas: norm.h
//
// A row of up to 8192 elements stays in registers, of up to 16384 where it is wide; another is
// swept, mostly from L2. fp32 inside, rounded once. Accesses per element: 2, and 4 with a residual.
// Ba, Kiros and Hinton, "Layer Normalization", 2016; Zhang and Sennrich, "Root Mean Square Layer
// Normalization", 2019.
#include "norm.h"

#include "norm_rows.h"
#include "tile.h"

namespace llmops::cuda {
namespace {

// h of one tile: x, or x + residual as h's type holds it; 0 from n on.
template <class Tile>
__device__ __forceinline__ void summed(const NormForward& p, int64_t x_at, int64_t residual_at,
                                       int64_t n, int thread, float (&h)[Tile::kHeld]) {
  Tile::read(p.x, x_at, n, p.wide, thread, h, 0.0f);
  if (!p.residual.data) return;
  float r[Tile::kHeld];
  Tile::read(p.residual, residual_at, n, p.wide, thread, r, 0.0f);
#pragma unroll
  for (int i = 0; i < Tile::kHeld; ++i) h[i] = rounded(h[i] + r[i], p.h.type);
}

// v (weight + offset) + bias, of the columns from `begin` on.
template <class Tile>
__device__ __forceinline__ void scaled(const NormForward& p, int64_t begin, int thread,
                                       float (&v)[Tile::kHeld]) {
  float w[Tile::kHeld];
  if (p.weight.data) {
    Tile::read(p.weight, begin, p.n - begin, p.wide, thread, w, 0.0f);
#pragma unroll
    for (int i = 0; i < Tile::kHeld; ++i) v[i] *= w[i] + p.offset;
  }
  if (p.bias.data) {
    Tile::read(p.bias, begin, p.n - begin, p.wide, thread, w, 0.0f);
#pragma unroll
    for (int i = 0; i < Tile::kHeld; ++i) v[i] += w[i];
  }
}

// With 64 registers some spill on sm_100a and sm_120.
template <int kThreads>
__global__ void __launch_bounds__(kBlock<kThreads>, kBlocks<kThreads, 80>)
    norm_fwd_kernel(NormForward p) {
  using T = Tile<kThreads>;
  constexpr int kRows = kRowsOfBlock<kThreads>;
  const int thread = threadIdx.x % kThreads;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.x / kThreads;
       row < p.rows; row += static_cast<int64_t>(gridDim.x) * kRows) {
    float v[T::kHeld];
    const int64_t residual_at = p.residual.data ? place_of(p.residual, row) : 0;
    summed<T>(p, place_of(p.x, row), residual_at, p.n, thread, v);
    if (p.h.data) T::write(p.h, place_of(p.h, row), p.n, p.wide, thread, v);
    const float rstd = deviations<kThreads>(v, p.n, p.wide, p.centered, p.eps, thread);
#pragma unroll
    for (int i = 0; i < T::kHeld; ++i) v[i] *= rstd;
    scaled<T>(p, 0, thread, v);
    T::write(p.y, place_of(p.y, row), p.n, p.wide, thread, v);
  }
}

// Wide rows of up to 16384 elements. A thread of 1024 has 64 registers, too few to have two
// operands of all its elements at once, or the columns of elements that are no neighbours.
constexpr int kWideThreads = 1024;
__global__ void __launch_bounds__(kWideThreads, 1) norm_fwd_wide_kernel(NormForward p) {
  using T = Tile<kWideThreads>;
  const int thread = threadIdx.x;
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    float v[T::kHeld] = {};
    combined<T>(p.x, place_of(p.x, row), p.n, thread, v, [](float, float x) { return x; });
    if (p.residual.data) {
      const int type = p.h.type;
      combined<T>(p.residual, place_of(p.residual, row), p.n, thread, v,
                  [&](float x, float r) { return rounded(x + r, type); });
      T::write(p.h, place_of(p.h, row), p.n, true, opaque(thread), v);
    }
    const float rstd = deviations<kWideThreads>(v, p.n, true, p.centered, p.eps, opaque(thread));
#pragma unroll
    for (int i = 0; i < T::kHeld; ++i) v[i] *= rstd;
    if (p.weight.data) {
      const float offset = p.offset;
      combined<T>(p.weight, 0, p.n, thread, v, [&](float z, float w) { return z * (w + offset); });
    }
    if (p.bias.data) combined<T>(p.bias, 0, p.n, thread, v, [](float z, float b) { return z + b; });
    T::write(p.y, place_of(p.y, row), p.n, true, opaque(thread), v);
  }
}

// The means of d and d^2 over a row, d = h - shift.
__device__ __forceinline__ void long_means(const NormForward& p, int64_t x_at, int64_t residual_at,
                                           float shift, int thread, float (&means)[2]) {
  using T = LongTile;
  means[0] = means[1] = 0.0f;
  for (int64_t begin = 0; begin < p.n; begin += T::kElements) {
    float v[T::kHeld];
    summed<T>(p, x_at + begin, residual_at + begin, p.n - begin, thread, v);
    T::each(p.wide, thread, T::within(p.n - begin), [&](int i) {
      const float d = v[i] - shift;
      means[0] += d;
      means[1] = fmaf(d, d, means[1]);
    });
  }
  row_sums<kLongThreads>(means);
  means[0] /= static_cast<float>(p.n);
  means[1] /= static_cast<float>(p.n);
}

__global__ void __launch_bounds__(kLongThreads, 1) norm_fwd_long_kernel(NormForward p) {
  using T = LongTile;
  const int thread = threadIdx.x;
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const int64_t x_at = place_of(p.x, row), y_at = place_of(p.y, row);
    const int64_t residual_at = p.residual.data ? place_of(p.residual, row) : 0;
    float v[T::kHeld], shift = 0.0f, means[2];
    if (p.centered) {
      summed<T>(p, x_at, residual_at, p.n, thread, v);
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < T::kHeld; ++i) sum += v[i];
      shift = row_sum<kLongThreads>(sum) / static_cast<float>(T::kElements);
    }
    long_means(p, x_at, residual_at, shift, thread, means);
    if (p.centered) {
      if (unlike(means[0], means[1])) {
        shift += means[0];
        long_means(p, x_at, residual_at, shift, thread, means);
      }
      const float square = means[1] - means[0] * means[0];
      means[1] = square < 0.0f ? 0.0f : square;
    }
    const float rstd = rstd_of(means[1], p.eps);
    const int64_t h_at = p.h.data ? place_of(p.h, row) : 0;
    for (int64_t begin = 0; begin < p.n; begin += T::kElements) {
      summed<T>(p, x_at + begin, residual_at + begin, p.n - begin, thread, v);
      if (p.h.data) T::write(p.h, h_at + begin, p.n - begin, p.wide, thread, v);
#pragma unroll
      for (int i = 0; i < T::kHeld; ++i)
        v[i] = (p.centered ? v[i] - shift - means[0] : v[i]) * rstd;
      scaled<T>(p, begin, thread, v);
      T::write(p.y, y_at + begin, p.n - begin, p.wide, thread, v);
    }
  }
}

}  // namespace

int norm_fwd(const NormForward& p, void* stream) {
  if (p.rows == 0 || p.n == 0) return 0;
  const auto s = static_cast<cudaStream_t>(stream);
  if (p.n <= Tile<512>::kElements) {
    with_norm_threads<512>(p.n, [&](auto threads) {
      constexpr int kThreads = decltype(threads)::value, kRows = kRowsOfBlock<kThreads>;
      LLMOPS_LAUNCH(norm_fwd_kernel<kThreads>, grid_of((p.rows + kRows - 1) / kRows),
                    kBlock<kThreads>, 0, s, p);
    });
  } else if (p.wide && p.n <= Tile<kWideThreads>::kElements) {
    LLMOPS_LAUNCH(norm_fwd_wide_kernel, grid_of(p.rows), kWideThreads, 0, s, p);
  } else {
    LLMOPS_LAUNCH(norm_fwd_long_kernel, grid_of(p.rows), kLongThreads, 0, s, p);
  }
  return static_cast<int>(cudaGetLastError());
}

}  // namespace llmops::cuda
