// Row softmax: y[i] = exp(scale * x[i] - m) / sum_j exp(scale * x[j] - m). Formula: softmax.h
//
// One block per row, online: each thread keeps a running maximum and a sum rescaled to it, so that
// the row is read twice (statistics, then result) and written once; both reads of a row up to
// the cache's size come from L2. Maximum and sum are merged across lanes by shuffles and across
// warps through shared memory. fp32 throughout. Milakov and Gimelshein 2018.
#include "softmax.h"

#include "device.h"

namespace llmops::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// Maximum (in units of log2) and the sum of 2^(z - maximum) over some elements.
struct Statistics {
  float top;
  float sum;
};

__device__ __forceinline__ Statistics merge(Statistics a, Statistics b) {
  const float top = fmaxf(a.top, b.top);
  // Nothing seen on one side: its top is -inf, and -inf - -inf would be NaN.
  const float from_a = a.sum == 0.0f ? 0.0f : a.sum * exp2f(a.top - top);
  const float from_b = b.sum == 0.0f ? 0.0f : b.sum * exp2f(b.top - top);
  return {top, from_a + from_b};
}

__device__ __forceinline__ Statistics merge_lanes(Statistics s) {
  for (int distance = 16; distance > 0; distance /= 2) {
    const Statistics other = {__shfl_xor_sync(0xffffffffu, s.top, distance),
                              __shfl_xor_sync(0xffffffffu, s.sum, distance)};
    s = merge(s, other);
  }
  return s;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    softmax_fwd_kernel(const T* __restrict__ x, T* __restrict__ y, int64_t rows, int64_t n,
                       int64_t x_stride, int64_t y_stride, float factor) {
  LLMOPS_SHARED(Statistics, per_warp, kWarps);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  // A grid's first dimension holds 2^31 - 1 blocks; more rows than blocks are looped over.
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const T* from = x + row * x_stride;  // [n]
    T* to = y + row * y_stride;          // [n]
    Statistics s = {-INFINITY, 0.0f};
    for (int64_t i = threadIdx.x; i < n; i += kThreads) {
      const float z = to_float(load(from + i)) * factor;
      if (z > s.top) {
        // 1, but NaN for +inf, which makes the row NaN as in torch.
        const float own = fmaf(0.0f, z, 1.0f);
        s = {z, s.sum == 0.0f ? own : fmaf(s.sum, exp2f(s.top - z), own)};
      } else if (z != -INFINITY) {  // -inf adds nothing, and before a finite z it is its own top
        s.sum += exp2f(z - s.top);
      }
    }
    s = merge_lanes(s);
    if (lane == 0) per_warp[warp] = s;
    __syncthreads();
    s = per_warp[0];
    for (int w = 1; w < kWarps; ++w) s = merge(s, per_warp[w]);
    const float reciprocal = 1.0f / s.sum;
    for (int64_t i = threadIdx.x; i < n; i += kThreads)
      store(to + i, from_float<T>(exp2f(to_float(load(from + i)) * factor - s.top) * reciprocal));
    // The next row writes per_warp, which slower threads may still be reading.
    __syncthreads();
  }
}

template <class T>
int launch(const void* x, void* y, int64_t rows, int64_t n, int64_t x_stride, int64_t y_stride,
           float scale, cudaStream_t stream) {
  const int64_t most = 0x7fffffff;
  const unsigned blocks = static_cast<unsigned>(rows < most ? rows : most);
  LLMOPS_LAUNCH(softmax_fwd_kernel<T>, blocks, kThreads, 0, stream, static_cast<const T*>(x),
                static_cast<T*>(y), rows, n, x_stride, y_stride, scale * kLog2e);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace

int softmax_fwd(const void* x, void* y, int type, int64_t rows, int64_t n, int64_t x_stride,
                int64_t y_stride, float scale, void* stream) {
  if (rows == 0 || n == 0) return 0;
  const auto s = static_cast<cudaStream_t>(stream);
  switch (type) {
    case 0:
      return launch<float>(x, y, rows, n, x_stride, y_stride, scale, s);
    case 1:
      return launch<__nv_bfloat16>(x, y, rows, n, x_stride, y_stride, scale, s);
    case 2:
      return launch<__half>(x, y, rows, n, x_stride, y_stride, scale, s);
    default:
      return static_cast<int>(cudaErrorInvalidValue);
  }
}

}  // namespace llmops::cuda
