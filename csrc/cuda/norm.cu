// RMS norm and layer norm, forward and backward. Formulas: norm.h
//
// Forward: a row of up to 8192 elements stays in registers; a longer one is swept, mostly from L2.
// Backward: as many programs (warps with a row each, or blocks) as the device holds walk over the
// rows, each with its own fp32 sums for the parameters in registers (beyond 8192 elements in
// memory, where a thread meets its own columns only); a second kernel adds the programs' sums in
// their order, so that the bits depend on the number of processors and nothing else.
//
// The mean of a row with mean 25,000 is off by more than a small deviation: all sums are of h less
// a first mean, and the second, small one corrects it. fp32 inside, rounded once. Accesses per
// element: 2 forward (4 with a residual), 3 backward (4 with dh_in). Ba, Kiros and Hinton, "Layer
// Normalization", 2016; Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
#include "norm.h"

#include "tile.h"

namespace llmops::cuda {
namespace {

__device__ __forceinline__ float rstd_of(float square, float eps) {
  return 1.0f / sqrtf(square + eps);
}

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

// d in place of h, 0 from n on; gives rstd.
template <int kThreads>
__device__ __forceinline__ float deviations(float (&d)[Tile<kThreads>::kHeld], int64_t n, bool wide,
                                            bool centered, float eps, int thread) {
  using T = Tile<kThreads>;
  const float count = static_cast<float>(n);
  float sums[2] = {0.0f, 0.0f};
  if (centered) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < T::kHeld; ++i) sum += d[i];
    const float mean = row_sum<kThreads>(sum) / count;
#pragma unroll
    for (int i = 0; i < T::kHeld; ++i) {
      d[i] = T::column(wide, thread, i) < n ? d[i] - mean : 0.0f;
      sums[0] += d[i];
    }
  }
#pragma unroll
  for (int i = 0; i < T::kHeld; ++i) sums[1] = fmaf(d[i], d[i], sums[1]);
  row_sums<kThreads>(sums);
  float square = sums[1] / count;
  if (centered) {
    const float left = sums[0] / count;  // the first mean's rounding
    // Not fmaxf, which would give 0 for NaN.
    square = square - left * left < 0.0f ? 0.0f : square - left * left;
#pragma unroll
    for (int i = 0; i < T::kHeld; ++i)
      if (T::column(wide, thread, i) < n) d[i] -= left;
  }
  return rstd_of(square, eps);
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

template <int kThreads>
__global__ void __launch_bounds__(kBlock<kThreads>, 1) norm_fwd_kernel(NormForward p) {
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

constexpr int kLongThreads = 256;
using LongTile = Tile<kLongThreads>;

// Whether sums about `shift` must be taken again about a better mean: the row's beginning, whose
// mean it was, is unlike the row.
__device__ __forceinline__ bool unlike(float left, float square) {
  return left * left > 16.0f * (square - left * left);
}

// The means of d and d^2 over a row, d = h - shift.
__device__ __forceinline__ void long_means(const NormForward& p, int64_t x_at, int64_t residual_at,
                                           float shift, int thread, float (&means)[2]) {
  using T = LongTile;
  means[0] = means[1] = 0.0f;
  for (int64_t begin = 0; begin < p.n; begin += T::kElements) {
    float v[T::kHeld];
    summed<T>(p, x_at + begin, residual_at + begin, p.n - begin, thread, v);
#pragma unroll
    for (int i = 0; i < T::kHeld; ++i) {
      if (T::column(p.wide, thread, i) >= p.n - begin) continue;
      const float d = v[i] - shift;
      means[0] += d;
      means[1] = fmaf(d, d, means[1]);
    }
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

template <class Tile>
__device__ __forceinline__ void store_gradients(const NormBackward& p, int64_t row, int64_t begin,
                                                int thread, float (&total)[Tile::kHeld]) {
  const int64_t n = p.n - begin;
  if (p.dh_in.data) {
    float more[Tile::kHeld];
    Tile::read(p.dh_in, place_of(p.dh_in, row) + begin, n, p.wide, thread, more, 0.0f);
#pragma unroll
    for (int i = 0; i < Tile::kHeld; ++i) total[i] += more[i];
  }
  if (p.dh.data) Tile::write(p.dh, place_of(p.dh, row) + begin, n, p.wide, thread, total);
  if (p.dx.data) Tile::write(p.dx, place_of(p.dx, row) + begin, n, p.wide, thread, total);
}

// weight + offset of the columns from `begin` on; 1 where there is no weight.
template <class Tile>
__device__ __forceinline__ void factors(const NormBackward& p, int64_t begin, int thread,
                                        float (&w)[Tile::kHeld]) {
  if (p.weight.data) Tile::read(p.weight, begin, p.n - begin, p.wide, thread, w, 0.0f);
#pragma unroll
  for (int i = 0; i < Tile::kHeld; ++i) w[i] = p.weight.data ? w[i] + p.offset : 1.0f;
}

template <int kThreads>
__global__ void __launch_bounds__(kBlock<kThreads>, 1) norm_bwd_kernel(NormBackward p) {
  using T = Tile<kThreads>;
  constexpr int kRows = kRowsOfBlock<kThreads>;
  const int thread = threadIdx.x % kThreads;
  const int64_t program = static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.x / kThreads;
  const int64_t programs = static_cast<int64_t>(gridDim.x) * kRows;
  const float count = static_cast<float>(p.n);
  float w[T::kHeld], weight_sum[T::kHeld], bias_sum[T::kHeld];
  factors<T>(p, 0, thread, w);
#pragma unroll
  for (int i = 0; i < T::kHeld; ++i) weight_sum[i] = bias_sum[i] = 0.0f;
  for (int64_t row = program; row < p.rows; row += programs) {
    float z[T::kHeld], g[T::kHeld];
    T::read(p.h, place_of(p.h, row), p.n, p.wide, thread, z, 0.0f);
    T::read(p.dy, place_of(p.dy, row), p.n, p.wide, thread, g, 0.0f);
    const float rstd = deviations<kThreads>(z, p.n, p.wide, p.centered, p.eps, thread);
    float sums[2] = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < T::kHeld; ++i) {
      z[i] *= rstd;
      weight_sum[i] = fmaf(g[i], z[i], weight_sum[i]);
      bias_sum[i] += g[i];
      g[i] *= w[i];
      sums[0] = fmaf(g[i], z[i], sums[0]);
      sums[1] += g[i];
    }
    row_sums<kThreads>(sums);
    const float gz = sums[0] / count, mean = p.centered ? sums[1] / count : 0.0f;
#pragma unroll
    for (int i = 0; i < T::kHeld; ++i) g[i] = (g[i] - z[i] * gz - mean) * rstd;
    store_gradients<T>(p, row, 0, thread, g);
  }
  // Where rows are wide, so are those of the sums, which are fp32.
  const int64_t at = program * p.n;
  if (p.weight_sums) {
    const Rows to{p.weight_sums, kF32, p.n};
    T::write(to, at, p.n, p.wide, thread, weight_sum);
  }
  if (p.bias_sums) {
    const Rows to{p.bias_sums, kF32, p.n};
    T::write(to, at, p.n, p.wide, thread, bias_sum);
  }
}

// The means of d, d^2, g and g d over a row, d = h - shift.
__device__ __forceinline__ void long_means(const NormBackward& p, int64_t row, float shift,
                                           int thread, float (&means)[4]) {
  using T = LongTile;
  const int64_t h_at = place_of(p.h, row), dy_at = place_of(p.dy, row);
#pragma unroll
  for (int k = 0; k < 4; ++k) means[k] = 0.0f;
  for (int64_t begin = 0; begin < p.n; begin += T::kElements) {
    float d[T::kHeld], g[T::kHeld], w[T::kHeld];
    T::read(p.h, h_at + begin, p.n - begin, p.wide, thread, d, shift);
    T::read(p.dy, dy_at + begin, p.n - begin, p.wide, thread, g, 0.0f);
    factors<T>(p, begin, thread, w);
#pragma unroll
    for (int i = 0; i < T::kHeld; ++i) {
      d[i] -= shift;
      g[i] *= w[i];
      means[0] += d[i];
      means[1] = fmaf(d[i], d[i], means[1]);
      means[2] += g[i];
      means[3] = fmaf(g[i], d[i], means[3]);
    }
  }
  row_sums<kLongThreads>(means);
#pragma unroll
  for (int k = 0; k < 4; ++k) means[k] /= static_cast<float>(p.n);
}

__device__ __forceinline__ void add_to(float* sums, int64_t at, float value, bool first) {
  store(sums + at, first ? value : load(sums + at) + value);
}

__global__ void __launch_bounds__(kLongThreads, 1) norm_bwd_long_kernel(NormBackward p) {
  using T = LongTile;
  const int thread = threadIdx.x;
  const int64_t program = blockIdx.x;
  for (int64_t row = program; row < p.rows; row += gridDim.x) {
    const int64_t h_at = place_of(p.h, row), dy_at = place_of(p.dy, row);
    float z[T::kHeld], g[T::kHeld], shift = 0.0f, means[4];
    if (p.centered) {
      T::read(p.h, h_at, p.n, p.wide, thread, z, 0.0f);
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < T::kHeld; ++i) sum += z[i];
      shift =
          row_sum<kLongThreads>(sum) / static_cast<float>(p.n < T::kElements ? p.n : T::kElements);
    }
    long_means(p, row, shift, thread, means);
    if (p.centered && unlike(means[0], means[1])) {
      shift += means[0];
      long_means(p, row, shift, thread, means);
    }
    const float left = p.centered ? means[0] : 0.0f, mean = p.centered ? means[2] : 0.0f;
    const float square = means[1] - left * left;
    const float rstd = rstd_of(square < 0.0f ? 0.0f : square, p.eps);
    const float gz = (means[3] - left * mean) * rstd;
    for (int64_t begin = 0; begin < p.n; begin += T::kElements) {
      float w[T::kHeld];
      T::read(p.h, h_at + begin, p.n - begin, p.wide, thread, z, 0.0f);
      T::read(p.dy, dy_at + begin, p.n - begin, p.wide, thread, g, 0.0f);
      factors<T>(p, begin, thread, w);
#pragma unroll
      for (int i = 0; i < T::kHeld; ++i) {
        const int64_t column = begin + T::column(p.wide, thread, i);
        z[i] = (z[i] - shift - left) * rstd;
        if (column < p.n && p.weight_sums)
          add_to(p.weight_sums, program * p.n + column, g[i] * z[i], row == program);
        if (column < p.n && p.bias_sums)
          add_to(p.bias_sums, program * p.n + column, g[i], row == program);
        g[i] = (g[i] * w[i] - z[i] * gz - mean) * rstd;
      }
      store_gradients<T>(p, row, begin, thread, g);
    }
  }
}

// dweight (block row 0) or dbias (1) of 32 columns: the programs' sums, in their order.
constexpr int kSlices = 8;
__global__ void __launch_bounds__(32 * kSlices, 1)
    norm_sum_kernel(NormBackward p, int64_t programs) {
  LLMOPS_SHARED(float, parts, 32 * kSlices);
  const int lane = threadIdx.x % 32, slice = threadIdx.x / 32;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * 32 + lane;
  const float* from = blockIdx.y == 0 ? p.weight_sums : p.bias_sums;
  float sum = 0.0f;
  if (column < p.n)
    for (int64_t program = slice; program < programs; program += kSlices)
      sum += load(from + program * p.n + column);
  parts[slice * 32 + lane] = sum;
  __syncthreads();
  if (slice > 0 || column >= p.n) return;
  for (int s = 1; s < kSlices; ++s) sum += parts[s * 32 + lane];
  set_element(blockIdx.y == 0 ? p.dweight : p.dbias, column, sum);
}

// The longest rows that are held: beyond, a block has not the registers for its tiles.
constexpr int64_t kLongestForward = Tile<512>::kElements;
constexpr int64_t kLongestBackward = Tile<256>::kElements;

// f(threads), the last of them kMost.
template <int kMost, class F>
void with_norm_threads(int64_t n, const F& f) {
  if (n <= Tile<32>::kElements) {
    f(Constant<32>{});
  } else if (n <= Tile<128>::kElements) {
    f(Constant<128>{});
  } else {
    f(Constant<kMost>{});
  }
}

}  // namespace

int norm_fwd(const NormForward& p, void* stream) {
  if (p.rows == 0 || p.n == 0) return 0;
  const auto s = static_cast<cudaStream_t>(stream);
  if (p.n > kLongestForward) {
    LLMOPS_LAUNCH(norm_fwd_long_kernel, grid_of(p.rows), kLongThreads, 0, s, p);
  } else {
    with_norm_threads<512>(p.n, [&](auto threads) {
      constexpr int kThreads = decltype(threads)::value, kRows = kRowsOfBlock<kThreads>;
      LLMOPS_LAUNCH(norm_fwd_kernel<kThreads>, grid_of((p.rows + kRows - 1) / kRows),
                    kBlock<kThreads>, 0, s, p);
    });
  }
  return static_cast<int>(cudaGetLastError());
}

// Blocks that fill the device once: 512 threads to a processor, for they take half its registers or
// more.
static int64_t backward_blocks(int64_t rows, int threads, int rows_of_block) {
  const int64_t most = static_cast<int64_t>(processors()) * (512 / threads);
  const int64_t needed = (rows + rows_of_block - 1) / rows_of_block;
  return needed < most ? needed : most;
}

int64_t norm_bwd_programs(int64_t rows, int64_t n) {
  if (n > kLongestBackward) return backward_blocks(rows, kLongThreads, 1);
  int64_t programs = 0;
  with_norm_threads<256>(n, [&](auto threads) {
    constexpr int kThreads = decltype(threads)::value, kRows = kRowsOfBlock<kThreads>;
    programs = backward_blocks(rows, kBlock<kThreads>, kRows) * kRows;
  });
  return programs;
}

int norm_bwd(const NormBackward& p, void* stream) {
  if (p.rows == 0 || p.n == 0) return 0;
  const auto s = static_cast<cudaStream_t>(stream);
  const int64_t programs = norm_bwd_programs(p.rows, p.n);
  if (p.n > kLongestBackward) {
    LLMOPS_LAUNCH(norm_bwd_long_kernel, grid_of(programs), kLongThreads, 0, s, p);
  } else {
    with_norm_threads<256>(p.n, [&](auto threads) {
      constexpr int kThreads = decltype(threads)::value, kRows = kRowsOfBlock<kThreads>;
      LLMOPS_LAUNCH(norm_bwd_kernel<kThreads>, grid_of(programs / kRows), kBlock<kThreads>, 0, s,
                    p);
    });
  }
  int status = static_cast<int>(cudaGetLastError());
  if (status == 0 && p.weight_sums) {
    const dim3 grid(static_cast<unsigned>((p.n + 31) / 32), p.bias_sums ? 2 : 1);
    LLMOPS_LAUNCH(norm_sum_kernel, grid, 32 * kSlices, 0, s, p, programs);
    status = static_cast<int>(cudaGetLastError());
  }
  return status;
}

}  // namespace llmops::cuda
