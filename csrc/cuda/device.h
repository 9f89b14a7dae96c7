// What every CUDA source includes first: CUDA itself, or its simulator (tests/cuda_sim), and the
// few words in which kernels differ between the two.
//
//   LLMOPS_LAUNCH(kernel, grid, block, dynamic bytes, stream, arguments...)
//   LLMOPS_SHARED(float, sums, 32);      an array in the block's shared memory
//   LLMOPS_DYNAMIC_SHARED(float, tile);  the launch's dynamic shared memory
//   __launch_bounds__(threads, 1)        without the 1 ptxas spills some registers for occupancy
//   load(p), store(p, value)             of global memory: in the simulator checked for range and
//                                        alignment; no kernel touches global memory otherwise
#pragma once

#include <cstdint>

#if defined(LLMOPS_CUDA_SIM)
#include "cuda_sim.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define LLMOPS_SHARED(T, name, count) __shared__ __align__(16) T name[count]
#define LLMOPS_DYNAMIC_SHARED(T, name)                            \
  extern __shared__ __align__(16) unsigned char dynamic_shared[]; \
  T* const name = reinterpret_cast<T*>(dynamic_shared)
#define LLMOPS_LAUNCH(kernel, grid, block, bytes, stream, ...) \
  (kernel)<<<grid, block, bytes, stream>>>(__VA_ARGS__)
#endif

#include "ptx.h"

namespace llmops::cuda {

constexpr float kLog2e = 1.4426950408889634f;
constexpr unsigned kAllLanes = 0xffffffffu;
// A grid's first dimension holds so many blocks; kernels loop over what is beyond.
constexpr int64_t kMostBlocks = 0x7fffffff;

template <class T>
__device__ __forceinline__ T load(const T* p) {
#if defined(LLMOPS_CUDA_SIM)
  cuda_sim::check_global(p, sizeof(T), "a load");
#endif
  return *p;
}
template <class T>
__device__ __forceinline__ void store(T* p, T value) {
#if defined(LLMOPS_CUDA_SIM)
  cuda_sim::check_global(p, sizeof(T), "a store");
#endif
  *p = value;
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16(x);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half(x);
}

// 16-bit types and their bits.
template <class T>
__device__ __forceinline__ T from_bits(uint16_t bits) {
  T x;
  static_assert(sizeof x == sizeof bits, "");
  memcpy(&x, &bits, sizeof x);
  return x;
}
template <class T>
__device__ __forceinline__ uint16_t bits_of(T x) {
  uint16_t bits;
  static_assert(sizeof x == sizeof bits, "");
  memcpy(&bits, &x, sizeof x);
  return bits;
}

// Streaming multiprocessors of the current device: the size of a persistent grid.
inline int processors() {
  int device = 0, count = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

// Lets a kernel have so much dynamic shared memory; an error code. Above 48 KiB CUDA wants it said.
template <class Kernel>
int allow_shared(Kernel kernel, int bytes) {
  if (bytes <= 48 << 10) return 0;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) cudaGetLastError();  // or the next launch would be taken to have failed
  return static_cast<int>(error);
}

inline unsigned grid_of(int64_t blocks) {
  return static_cast<unsigned>(blocks < kMostBlocks ? blocks : kMostBlocks);
}

}  // namespace llmops::cuda
