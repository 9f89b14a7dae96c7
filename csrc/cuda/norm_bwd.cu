// RMS norm and layer norm backward. Formulas: norm.h
//
// As many programs (warps with a row each, or blocks) as the device holds walk over the rows, each
// with its own fp32 sums for the parameters: in registers with rows of up to 4096 elements, in
// shared memory with wide ones of up to 16384 (12288 where there is a bias), in memory beyond,
// where rows are swept. A thread meets its own columns only. A second kernel adds the programs'
// sums in their order, so that the bits depend on the number of processors and nothing else. fp32
// inside, rounded once. Accesses per element: 3, and 4 with dh_in.
#include "norm.h"

#include "norm_rows.h"
#include "tile.h"

namespace llmops::cuda {
namespace {

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

// Eight neighbours in shared memory.
__device__ __forceinline__ void take_8(const float* from, float* v) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float4 x = reinterpret_cast<const float4*>(from)[i];
    v[4 * i] = x.x, v[4 * i + 1] = x.y, v[4 * i + 2] = x.z, v[4 * i + 3] = x.w;
  }
}
__device__ __forceinline__ void keep_8(float* to, const float* v) {
#pragma unroll
  for (int i = 0; i < 2; ++i)
    reinterpret_cast<float4*>(to)[i] = float4{v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3]};
}

// Wide rows that 512 threads hold, or 256, of which a processor has two blocks: of 128 registers a
// thread needs 64 for its elements of h and dy.
template <int kThreads>
using WideTile = Tile<kThreads, 4>;

template <int kThreads>
__global__ void __launch_bounds__(kThreads, 512 / kThreads) norm_bwd_wide_kernel(NormBackward p) {
  using T = WideTile<kThreads>;
  LLMOPS_DYNAMIC_SHARED(float, weight_sums);  // [n], and [n] for the bias
  float* const bias_sums = weight_sums + p.n;
  const int thread = threadIdx.x;
  const float count = static_cast<float>(p.n);
  const auto for_chunks = [&](const auto& f) {
#pragma unroll
    for (int c = 0; c < T::kChunks; ++c) {
      const int first = T::column(true, opaque(thread), 8 * c);
      if (first < p.n) f(c, first);
    }
  };
  for_chunks([&](int, int first) {
    const float zeros[8] = {};
    if (p.weight_sums) keep_8(weight_sums + first, zeros);
    if (p.bias_sums) keep_8(bias_sums + first, zeros);
  });
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const auto other = [](float, float x) { return x; };
    float z[T::kHeld] = {}, g[T::kHeld] = {}, sums[2] = {0.0f, 0.0f};
    combined<T>(p.h, place_of(p.h, row), p.n, thread, z, other);
    combined<T>(p.dy, place_of(p.dy, row), p.n, thread, g, other);
    const float rstd = deviations<kThreads>(z, p.n, true, p.centered, p.eps, opaque(thread));
    for_chunks([&](int c, int first) {
      float own[8];
      if (p.weight_sums) {
        take_8(weight_sums + first, own);
#pragma unroll
        for (int j = 0; j < 8; ++j) own[j] = fmaf(g[8 * c + j], z[8 * c + j] * rstd, own[j]);
        keep_8(weight_sums + first, own);
      }
      if (p.bias_sums) {
        take_8(bias_sums + first, own);
#pragma unroll
        for (int j = 0; j < 8; ++j) own[j] += g[8 * c + j];
        keep_8(bias_sums + first, own);
      }
    });
    if (p.weight.data) {
      const float offset = p.offset;
      combined<T>(p.weight, 0, p.n, thread, g, [&](float x, float w) { return x * (w + offset); });
    }
#pragma unroll
    for (int i = 0; i < T::kHeld; ++i) {
      z[i] *= rstd;
      sums[0] = fmaf(g[i], z[i], sums[0]);
      sums[1] += g[i];
    }
    row_sums<kThreads>(sums);
    const float gz = sums[0] / count, mean = p.centered ? sums[1] / count : 0.0f;
#pragma unroll
    for (int i = 0; i < T::kHeld; ++i) g[i] = (g[i] - z[i] * gz - mean) * rstd;
    if (p.dh_in.data)
      combined<T>(p.dh_in, place_of(p.dh_in, row), p.n, thread, g,
                  [](float x, float more) { return x + more; });
    if (p.dh.data) T::write(p.dh, place_of(p.dh, row), p.n, true, opaque(thread), g);
    if (p.dx.data) T::write(p.dx, place_of(p.dx, row), p.n, true, opaque(thread), g);
  }
  const int64_t at = static_cast<int64_t>(blockIdx.x) * p.n;
  for_chunks([&](int, int first) {
    float own[8];
    if (p.weight_sums) {
      take_8(weight_sums + first, own);
      store_8(p.weight_sums + at + first, own);
    }
    if (p.bias_sums) {
      take_8(bias_sums + first, own);
      store_8(p.bias_sums + at + first, own);
    }
  });
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

// The longest rows that are held with their sums: beyond, a block has not the registers for its
// tiles.
constexpr int64_t kLongestHeld = Tile<256>::kElements;

// What the sums of wide rows take of shared memory, and the most that they may: 99 KiB are the
// least there is.
int64_t sums_bytes(const NormBackward& p) { return 4 * p.n * (p.dbias.data ? 2 : 1); }
constexpr int64_t kMostBytes = 96 << 10;

// The threads of a block of norm_bwd_wide_kernel; 0 where that is not for such rows.
int wide_threads(const NormBackward& p) {
  if (!p.wide || p.n <= kLongestHeld || sums_bytes(p) > kMostBytes) return 0;
  if (p.n <= WideTile<256>::kElements) return 256;
  return p.n <= WideTile<512>::kElements ? 512 : 0;
}

// Blocks that fill the device once: 512 threads to a processor, for they take half its registers or
// more.
int64_t backward_blocks(int64_t rows, int threads, int rows_of_block) {
  const int64_t most = static_cast<int64_t>(processors()) * (512 / threads);
  const int64_t needed = (rows + rows_of_block - 1) / rows_of_block;
  return needed < most ? needed : most;
}

}  // namespace

int64_t norm_bwd_programs(const NormBackward& p) {
  if (const int threads = wide_threads(p)) return backward_blocks(p.rows, threads, 1);
  if (p.n > kLongestHeld) return backward_blocks(p.rows, kLongThreads, 1);
  int64_t programs = 0;
  with_norm_threads<256>(p.n, [&](auto threads) {
    constexpr int kThreads = decltype(threads)::value, kRows = kRowsOfBlock<kThreads>;
    programs = backward_blocks(p.rows, kBlock<kThreads>, kRows) * kRows;
  });
  return programs;
}

int norm_bwd(const NormBackward& p, void* stream) {
  if (p.rows == 0 || p.n == 0) return 0;
  const auto s = static_cast<cudaStream_t>(stream);
  const int64_t programs = norm_bwd_programs(p);
  if (const int threads = wide_threads(p)) {
    const auto kernel = threads == 256 ? norm_bwd_wide_kernel<256> : norm_bwd_wide_kernel<512>;
    const auto bytes = static_cast<int>(sums_bytes(p));
    if (const int error = allow_shared(kernel, bytes)) return error;
    LLMOPS_LAUNCH(kernel, grid_of(programs), threads, bytes, s, p);
  } else if (p.n > kLongestHeld) {
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
