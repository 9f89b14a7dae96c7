// Kernels for tests/test_cuda_sim.py: right ones, and wrong ones that the simulator must tell.
#include "selftest.h"

#include <functional>
#include <map>

#include "mma.h"
#include "tile.h"

namespace llmops::cuda {
namespace {

__global__ void sum_kernel(const float* x, float* y, int n) {
  LLMOPS_SHARED(float, parts, 4);
  float s = 0.0f;
  for (int i = threadIdx.x; i < n; i += blockDim.x) s += load(x + i);
  for (int distance = 16; distance > 0; distance /= 2) s += __shfl_xor_sync(kAllLanes, s, distance);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = s;
  __syncthreads();
  store(y + threadIdx.x, parts[0] + parts[1] + parts[2] + parts[3]);
}

__global__ void missing_barrier_kernel(const float* x, float* y) {
  LLMOPS_SHARED(float, turned, 128);
  turned[threadIdx.x] = load(x + threadIdx.x);
  store(y + threadIdx.x, turned[127 - threadIdx.x]);
}

__global__ void missing_warp_barrier_kernel(const float* x, float* y) {
  LLMOPS_SHARED(float, turned, 128);
  turned[threadIdx.x] = load(x + threadIdx.x);
  store(y + threadIdx.x, turned[threadIdx.x ^ 1]);
}

__global__ void divergent_barrier_kernel(float* y) {
  if (threadIdx.x < 100) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  store(y + threadIdx.x, 1.0f);
}

__global__ void barrier_and_collective_kernel(float* y) {
  if (threadIdx.x < 70) __syncthreads();
  store(y + threadIdx.x, __shfl_sync(kAllLanes, 1.0f, 0));
  if (threadIdx.x >= 70) __syncthreads();
}

__global__ void partial_mask_kernel(float* y) {
  float v = static_cast<float>(threadIdx.x);
  if (threadIdx.x % 32 < 16) v += __shfl_xor_sync(kAllLanes, v, 1);
  store(y + threadIdx.x, v);
}

__global__ void foreign_lane_kernel(float* y) {
  if (threadIdx.x % 32 < 16) store(y + threadIdx.x, __shfl_sync(0x0000ffffu, 1.0f, 20));
}

// 16 lanes meet twice as often as the others: what they gave must not be mixed up.
__global__ void uneven_masks_kernel(float* y) {
  const int lane = threadIdx.x % 32;
  float v = static_cast<float>(lane);
  if (lane < 16)
    for (int i = 0; i < 3; ++i) v = __shfl_xor_sync(0x0000ffffu, v, 1);
  v = __shfl_sync(kAllLanes, v, 31 - lane);
  store(y + threadIdx.x, v);
}

__global__ void out_of_range_kernel(const float* x, float* y, int n) {
  store(y + threadIdx.x, load(x + threadIdx.x + (threadIdx.x == 127 ? n : 0)));
}

__global__ void misaligned_kernel(const float* x, float* y) {
  const auto* from = reinterpret_cast<const float4*>(x + 1);
  store(y + threadIdx.x, load(from).x);
}

__global__ void shared_out_of_range_kernel(float* y) {
  LLMOPS_SHARED(float, small, 127);
  small[threadIdx.x] = 1.0f;
  __syncthreads();
  store(y + threadIdx.x, small[0]);
}

__global__ void shared_read_past_end_kernel(const float* x, float* y) {
  LLMOPS_SHARED(float, own, 128);
  own[threadIdx.x] = load(x + threadIdx.x);
  __syncthreads();
  store(y + threadIdx.x, 0.5f * (own[threadIdx.x] + own[threadIdx.x + 1]));
}

// Block 1 relies on what block 0 left in shared memory.
__global__ void stale_shared_kernel(float* y) {
  LLMOPS_SHARED(float, left, 128);
  if (blockIdx.x == 0) left[threadIdx.x] = 1.0f;
  __syncthreads();
  if (blockIdx.x == 1) store(y + threadIdx.x, left[threadIdx.x]);
}

template <bool kWait, bool kLate>
__global__ void copy_kernel(const float* x, float* y) {
  LLMOPS_DYNAMIC_SHARED(float, tile);
  if (threadIdx.x < 32) cp_async_16(tile + 4 * threadIdx.x, x + 4 * threadIdx.x);
  cp_async_commit();
  if (kWait && !kLate) cp_async_wait<0>();
  __syncthreads();
  store(y + threadIdx.x, tile[127 - threadIdx.x]);
  if (kLate) cp_async_wait<0>();
}

// a [16, 16], b [16, 8] -> d [16, 8], all row by row.
template <class T>
__global__ void product_kernel(const T* a, const T* b, float* d) {
  LLMOPS_SHARED(T, tile_a, 16 * 16);
  LLMOPS_SHARED(T, tile_b, 16 * 8);
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) tile_a[i] = load(a + i);
  for (int i = lane; i < 128; i += 32) tile_b[i] = load(b + i);
  __syncwarp();
  uint32_t x[4], y[4];
  ldmatrix_x4(x, tile_a + lane % 16 * 16 + lane / 16 * 8);
  // Rows of b are k: transposed they are the columns that mma wants. The upper half is not used.
  ldmatrix_x4_transposed(y, tile_b + lane % 16 * 8);
  float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  const uint32_t low[2] = {y[0], y[1]};
  mma_m16n8k16(sum, x, low, T{});
  for (int i = 0; i < 4; ++i) store(d + (lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2, sum[i]);
}

// x and y [rows, columns], rows up to 32: x y^T [32, 32], x^T y [columns, columns] and, with the
// first 32 columns of x, x y [32, columns], so that each fragment meets both forms of the other.
template <class T, int kColumns>
__global__ void tiles_kernel(const T* from, float* d, int rows, bool wide) {
  using Tile = SharedTile<T, 32, kColumns>;
  LLMOPS_DYNAMIC_SHARED(T, memory);
  const Tile x{memory}, y{memory + Tile::kElements};
  const int lane = lane_of_warp(), warp = threadIdx.x / 32, columns = kColumns - 8;
  load_tile<64>(x, from, columns, rows, columns, wide, threadIdx.x);
  load_tile<64>(y, from + rows * columns, columns, rows, columns, wide, threadIdx.x);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  // 16 rows and 16 columns of d by each warp in turn.
  const auto product = [&](int m, int n, int inner, const auto& load_left, const auto& load_right) {
    for (int at = warp; at < m * n / 256; at += 2) {
      const int row = at / (n / 16) * 16, column = at % (n / 16) * 16;
      float sum[2][4] = {};
      for (int k = 0; k < inner; k += 16) {
        uint32_t a[4], b[4];
        load_left(a, row, k);
        load_right(b, column, k);
        mma_pair<T>(sum[0], sum[1], a, b);
      }
      for (int i = 0; i < 8; ++i)
        store(d + (row + lane / 4 + i / 2 % 2 * 8) * n + column + i / 4 * 8 + lane % 4 * 2 + i % 2,
              sum[i / 4][i % 4]);
    }
    d += m * n;
  };
  const auto left = [&](auto& a, int row, int k) { load_a(a, x, row, k); };
  product(32, 32, kColumns, left, [&](auto& b, int n, int k) { load_b(b, y, n, k); });
  const auto right = [&](auto& b, int n, int k) { load_b_transposed(b, y, k, n); };
  product(
      kColumns, kColumns, 32, [&](auto& a, int row, int k) { load_a_transposed(a, x, k, row); },
      right);
  product(32, kColumns, 32, left, right);
}

__global__ void atomic_kernel(float* y) { atomicAdd(y, 1.0f); }

// Each lane writes a hash of what the collectives gave it; see the test for what that is.
__global__ void collectives_kernel(float* y) {
  const int lane = threadIdx.x % 32;
  LLMOPS_SHARED(int, most, 4);
  if (lane == 0) most[threadIdx.x / 32] = 0;
  __syncwarp();
  atomicMax(&most[threadIdx.x / 32], static_cast<int>(threadIdx.x));
  const int down = __shfl_down_sync(kAllLanes, lane, 3), up = __shfl_up_sync(kAllLanes, lane, 5);
  const unsigned odd = __ballot_sync(kAllLanes, lane % 2);
  const bool any = __any_sync(kAllLanes, lane == 31), all = __all_sync(kAllLanes, lane < 31);
  const bool right = odd == 0xaaaaaaaau && any && !all;
  __syncwarp();
  const int last = most[threadIdx.x / 32];
  store(y + threadIdx.x, static_cast<float>(right ? down + 100 * up + 10000 * last : -1));
}

__global__ void lane_not_in_mask_kernel(float* y) {
  store(y + threadIdx.x, __shfl_sync(0x0000ffffu, 1.0f, 0));
}

// cp.async of the block's first 32 threads, their shared and their global addresses off by so many
// floats.
__global__ void shifted_copy_kernel(const float* x, int shared, int global) {
  LLMOPS_DYNAMIC_SHARED(float, tile);
  if (threadIdx.x < 32) cp_async_16(tile + 4 * threadIdx.x + shared, x + 4 * threadIdx.x + global);
  cp_async_commit();
  cp_async_wait<0>();
}

__global__ void misaligned_matrix_kernel(float* y) {
  LLMOPS_SHARED(__half, tile, 16 * 16 + 8);
  uint32_t a[4];
  ldmatrix_x4(a, tile + threadIdx.x % 16 * 16 + threadIdx.x / 16 * 4);
  store(y + threadIdx.x, __uint_as_float(a[0]));
}

__global__ void large_shared_kernel(float* y) {
  LLMOPS_SHARED(float, large, 13000);
  store(y + threadIdx.x, large[threadIdx.x]);
}

__global__ void dynamic_shared_kernel(float* y) {
  LLMOPS_DYNAMIC_SHARED(float, tile);
  store(y + threadIdx.x, tile[threadIdx.x]);
}

template <class T, int kColumns>
void launch_tiles(const float* x, float* y, int rows, bool wide) {
  void* stream = nullptr;
  const auto* from = reinterpret_cast<const T*>(x);
  LLMOPS_LAUNCH((tiles_kernel<T, kColumns>), 1, 64, 2 * 32 * kColumns * 2, stream, from, y, rows,
                wide);
}

}  // namespace

bool selftest(const std::string& name, const float* x, float* y, int n) {
  void* stream = nullptr;
  const auto* bf16 = reinterpret_cast<const __nv_bfloat16*>(x);
  const auto* fp16 = reinterpret_cast<const __half*>(x);
#define ONE(name, kernel, grid, block, bytes, ...)                                \
  {                                                                               \
    name, [&] { LLMOPS_LAUNCH(kernel, grid, block, bytes, stream, __VA_ARGS__); } \
  }
  const std::map<std::string, std::function<void()>> kernels = {
      ONE("sum", sum_kernel, 1, 128, 0, x, y, n),
      ONE("collectives", collectives_kernel, 1, 128, 0, y),
      ONE("uneven masks", uneven_masks_kernel, 1, 128, 0, y),
      ONE("atomic", atomic_kernel, 100, 256, 0, y),
      ONE("copy", (copy_kernel<true, false>), 1, 128, 512, x, y),
      ONE("product bf16", product_kernel<__nv_bfloat16>, 1, 32, 0, bf16, bf16 + 256, y),
      ONE("product fp16", product_kernel<__half>, 1, 32, 0, fp16, fp16 + 256, y),
      {"tiles bf16 64", [&] { launch_tiles<__nv_bfloat16, 64>(x, y, n, true); }},
      {"tiles bf16 96", [&] { launch_tiles<__nv_bfloat16, 96>(x, y, n, true); }},
      {"tiles fp16 128", [&] { launch_tiles<__half, 128>(x, y, n, true); }},
      {"tiles fp16 64 narrow", [&] { launch_tiles<__half, 64>(x, y, n, false); }},
      // Wrong on purpose.
      ONE("missing barrier", missing_barrier_kernel, 1, 128, 0, x, y),
      ONE("missing warp barrier", missing_warp_barrier_kernel, 1, 128, 0, x, y),
      ONE("divergent barrier", divergent_barrier_kernel, 1, 128, 0, y),
      ONE("barrier and collective", barrier_and_collective_kernel, 1, 128, 0, y),
      ONE("partial mask", partial_mask_kernel, 1, 128, 0, y),
      ONE("foreign lane", foreign_lane_kernel, 1, 128, 0, y),
      ONE("lane not in its mask", lane_not_in_mask_kernel, 1, 128, 0, y),
      ONE("out of range", out_of_range_kernel, 1, 128, 0, x, y, n),
      ONE("misaligned", misaligned_kernel, 1, 128, 0, x, y),
      ONE("misaligned matrix", misaligned_matrix_kernel, 1, 32, 0, y),
      ONE("shared out of range", shared_out_of_range_kernel, 1, 128, 0, y),
      ONE("shared read past its end", shared_read_past_end_kernel, 1, 128, 0, x, y),
      ONE("stale shared", stale_shared_kernel, 2, 128, 0, y),
      ONE("copy not waited for", (copy_kernel<false, false>), 1, 128, 512, x, y),
      ONE("copy waited for late", (copy_kernel<true, true>), 1, 128, 512, x, y),
      ONE("copy to a misaligned place", shifted_copy_kernel, 1, 32, 528, x, 1, 0),
      ONE("copy from a misaligned place", shifted_copy_kernel, 1, 32, 528, x, 0, 1),
      ONE("copy from out of range", shifted_copy_kernel, 1, 32, 528, x, 0, 4),
      ONE("copy to out of range", shifted_copy_kernel, 1, 32, 512, x, 4, 0),
      ONE("too much static shared", large_shared_kernel, 1, 128, 0, y),
      ONE("no dynamic shared", dynamic_shared_kernel, 1, 128, 0, y),
      ONE("too much dynamic shared", dynamic_shared_kernel, 1, 128, 49153, y),
      ONE("too many threads", atomic_kernel, 1, 2048, 0, y),
      ONE("too many blocks", atomic_kernel, dim3(1, 65536), 32, 0, y),
      ONE("no blocks", atomic_kernel, 0, 32, 0, y),
  };
#undef ONE
  const auto found = kernels.find(name);
  if (found == kernels.end()) return false;
  found->second();
  return true;
}

int64_t quotient(int64_t x, int64_t by) { return divided(x, Divisor(by)); }

void convert(const float* x, uint16_t* y, float* back, int n, bool bf16) {
  for (int i = 0; i < n; ++i) {
    if (bf16) {
      const auto value = from_float<__nv_bfloat16>(x[i]);
      y[i] = value.bits;
      back[i] = to_float(value);
    } else {
      const auto value = from_float<__half>(x[i]);
      y[i] = value.bits;
      back[i] = to_float(value);
    }
  }
}

}  // namespace llmops::cuda
