// Row softmax and its gradient. Formulas: softmax.h
//
// A row of up to 512 elements is held in a warp's registers, up to 16384 in a block's: read once
// and written once (backward: two reads). A longer row is swept in tiles: each thread keeps its own
// maximum and a sum rescaled to it, merged at the end; the second sweep, mostly from L2, writes.
// fp32 throughout, exp by ex2.approx (2 ulp). What mask or causal limit drops is not computed with,
// and a row with nothing left is zeros. Milakov and Gimelshein, "Online normalizer calculation for
// softmax", 2018.
#include "softmax.h"

#include "tile.h"

namespace llmops::cuda {
namespace {

__device__ __forceinline__ float exponential(float z, float top) {
  return exp2_approx((z - top) * kLog2e);
}

// Logits of the row's columns from `begin` on, -inf where there is nothing.
template <class Tile>
__device__ __forceinline__ void logits(const SoftmaxForward& p, int64_t row, int64_t begin,
                                       int64_t valid, int thread, float (&z)[Tile::kHeld]) {
  const int64_t at = place_of(p.x, row) + begin, left = valid - begin;
  Tile::read(p.x, at, left, p.wide, thread, z, -INFINITY);
  const int limit = Tile::within(left);
  Tile::each(p.wide, thread, limit, [&](int i) { z[i] *= p.scale; });
  if (!p.mask.data) return;
  const int64_t mask_at = place_of(p.mask, row);
#pragma unroll
  for (int i = 0; i < Tile::kHeld; ++i) {
    const int column = Tile::column(p.wide, thread, i);
    if (column >= limit) continue;
    const float m = element(p.mask, mask_at + (begin + column) * p.mask.step);
    if (p.mask.type != kBool) {
      z[i] += m;
    } else if (m == 0.0f) {
      z[i] = -INFINITY;
    }
  }
}

// How many columns of the row count, from the first on.
__device__ __forceinline__ int64_t valid_of(const SoftmaxForward& p, int64_t row) {
  if (!p.causal) return p.n;
  const int64_t query = row - divided(row, p.queries) * p.queries.by;
  const int64_t valid = query + 1 + p.n - p.queries.by;
  return valid > 0 ? valid : 0;
}

template <int kThreads>
__global__ void __launch_bounds__(kBlock<kThreads>, kBlocks<kThreads, 64>)
    softmax_fwd_kernel(SoftmaxForward p) {
  using T = Tile<kThreads>;
  constexpr int kRows = kRowsOfBlock<kThreads>;
  const int thread = threadIdx.x % kThreads;
  const bool may_be_empty = p.mask.data || p.causal;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.x / kThreads;
       row < p.rows; row += static_cast<int64_t>(gridDim.x) * kRows) {
    float z[T::kHeld];
    logits<T>(p, row, 0, valid_of(p, row), thread, z);
    float top = -INFINITY;
#pragma unroll
    for (int i = 0; i < T::kHeld; ++i) top = fmaxf(top, z[i]);
    top = row_max<kThreads>(top);
    // Nothing left: zeros, where -inf - -inf would be NaN. Without a mask NaN is the answer.
    if (may_be_empty && top == -INFINITY) top = 0.0f;
    // Beyond n: exp(-inf), 0 but where the maximum is -inf, in a row that is NaN in any case.
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < T::kHeld; ++i) {
      z[i] = exponential(z[i], top);
      sum += z[i];
    }
    sum = row_sum<kThreads>(sum);
    const float reciprocal = may_be_empty && sum == 0.0f ? 0.0f : 1.0f / sum;
#pragma unroll
    for (int i = 0; i < T::kHeld; ++i) z[i] *= reciprocal;
    T::write(p.y, place_of(p.y, row), p.n, p.wide, thread, z);
  }
}

constexpr int kLongThreads = 256;
using LongTile = Tile<kLongThreads>;

__global__ void __launch_bounds__(kLongThreads, 1) softmax_fwd_long_kernel(SoftmaxForward p) {
  using T = LongTile;
  const int thread = threadIdx.x;
  const bool may_be_empty = p.mask.data || p.causal;
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const int64_t valid = valid_of(p, row);
    float top = -INFINITY, sum = 0.0f, z[T::kHeld];
    for (int64_t begin = 0; begin < valid; begin += T::kElements) {
      logits<T>(p, row, begin, valid, thread, z);
      float next = top;
#pragma unroll
      for (int i = 0; i < T::kHeld; ++i) next = fmaxf(next, z[i]);
      // A thread that has seen nothing, or only -inf, adds nothing; a NaN makes its sum NaN.
      const float shift = next == -INFINITY ? 0.0f : next;
      sum *= exponential(top, shift);
#pragma unroll
      for (int i = 0; i < T::kHeld; ++i) sum += exponential(z[i], shift);
      top = next;
    }
    float row_top = row_max<kLongThreads>(top);
    if (top != -INFINITY) sum *= exponential(top, row_top);
    sum = row_sum<kLongThreads>(sum);
    if (may_be_empty && row_top == -INFINITY) row_top = 0.0f;
    const float reciprocal = may_be_empty && sum == 0.0f ? 0.0f : 1.0f / sum;
    const int64_t at = place_of(p.y, row);
    for (int64_t begin = 0; begin < p.n; begin += T::kElements) {
      logits<T>(p, row, begin, valid, thread, z);
#pragma unroll
      for (int i = 0; i < T::kHeld; ++i) z[i] = exponential(z[i], row_top) * reciprocal;
      T::write(p.y, at + begin, p.n - begin, p.wide, thread, z);
    }
  }
}

template <int kThreads>
__global__ void __launch_bounds__(kBlock<kThreads>, kBlocks<kThreads, 64>)
    softmax_bwd_kernel(SoftmaxBackward p) {
  using T = Tile<kThreads>;
  constexpr int kRows = kRowsOfBlock<kThreads>;
  const int thread = threadIdx.x % kThreads;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.x / kThreads;
       row < p.rows; row += static_cast<int64_t>(gridDim.x) * kRows) {
    float g[T::kHeld], y[T::kHeld];
    T::read(p.dy, place_of(p.dy, row), p.n, p.wide, thread, g, 0.0f);
    T::read(p.y, place_of(p.y, row), p.n, p.wide, thread, y, 0.0f);
    float dot = 0.0f;
#pragma unroll
    for (int i = 0; i < T::kHeld; ++i) dot = fmaf(y[i], g[i], dot);
    dot = row_sum<kThreads>(dot);
#pragma unroll
    for (int i = 0; i < T::kHeld; ++i) g[i] = p.scale * y[i] * (g[i] - dot);
    T::write(p.dx, place_of(p.dx, row), p.n, p.wide, thread, g);
  }
}

__global__ void __launch_bounds__(kLongThreads, 1) softmax_bwd_long_kernel(SoftmaxBackward p) {
  using T = LongTile;
  const int thread = threadIdx.x;
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const int64_t dy_at = place_of(p.dy, row), y_at = place_of(p.y, row);
    const int64_t dx_at = place_of(p.dx, row);
    float dot = 0.0f, g[T::kHeld], y[T::kHeld];
    for (int64_t begin = 0; begin < p.n; begin += T::kElements) {
      T::read(p.dy, dy_at + begin, p.n - begin, p.wide, thread, g, 0.0f);
      T::read(p.y, y_at + begin, p.n - begin, p.wide, thread, y, 0.0f);
#pragma unroll
      for (int i = 0; i < T::kHeld; ++i) dot = fmaf(y[i], g[i], dot);
    }
    dot = row_sum<kLongThreads>(dot);
    for (int64_t begin = 0; begin < p.n; begin += T::kElements) {
      T::read(p.dy, dy_at + begin, p.n - begin, p.wide, thread, g, 0.0f);
      T::read(p.y, y_at + begin, p.n - begin, p.wide, thread, y, 0.0f);
#pragma unroll
      for (int i = 0; i < T::kHeld; ++i) g[i] = p.scale * y[i] * (g[i] - dot);
      T::write(p.dx, dx_at + begin, p.n - begin, p.wide, thread, g);
    }
  }
}

}  // namespace

int softmax_fwd(const SoftmaxForward& p, void* stream) {
  if (p.rows == 0 || p.n == 0) return 0;
  const auto s = static_cast<cudaStream_t>(stream);
  if (p.n > kLongest) {
    LLMOPS_LAUNCH(softmax_fwd_long_kernel, grid_of(p.rows), kLongThreads, 0, s, p);
  } else {
    with_threads(p.n, [&](auto threads) {
      constexpr int kThreads = decltype(threads)::value;
      constexpr int kRows = kRowsOfBlock<kThreads>;
      LLMOPS_LAUNCH((softmax_fwd_kernel<kThreads>), grid_of((p.rows + kRows - 1) / kRows),
                    kBlock<kThreads>, 0, s, p);
    });
  }
  return static_cast<int>(cudaGetLastError());
}

int softmax_bwd(const SoftmaxBackward& p, void* stream) {
  if (p.rows == 0 || p.n == 0) return 0;
  const auto s = static_cast<cudaStream_t>(stream);
  if (p.n > kLongest) {
    LLMOPS_LAUNCH(softmax_bwd_long_kernel, grid_of(p.rows), kLongThreads, 0, s, p);
  } else {
    with_threads(p.n, [&](auto threads) {
      constexpr int kThreads = decltype(threads)::value;
      constexpr int kRows = kRowsOfBlock<kThreads>;
      LLMOPS_LAUNCH((softmax_bwd_kernel<kThreads>), grid_of((p.rows + kRows - 1) / kRows),
                    kBlock<kThreads>, 0, s, p);
    });
  }
  return static_cast<int>(cudaGetLastError());
}

}  // namespace llmops::cuda
