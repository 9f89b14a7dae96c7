// CUDA's language and intrinsics, as far as csrc/cuda uses them, for g++: what cuda_runtime.h,
// cuda_bf16.h and cuda_fp16.h are to nvcc. csrc/cuda/device.h includes it where LLMOPS_CUDA_SIM is
// defined. A new intrinsic needs its function here, or the simulated build does not compile.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "scheduler.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __restrict__ __restrict

#define LLMOPS_TEXT_(x) #x
#define LLMOPS_TEXT(x) LLMOPS_TEXT_(x)
#define LLMOPS_WHERE __FILE__ ":" LLMOPS_TEXT(__LINE__)

#define threadIdx (cuda_sim::current->index)
#define blockIdx (cuda_sim::block_index)
#define blockDim (cuda_sim::block_size)
#define gridDim (cuda_sim::grid_size)

using cudaStream_t = void*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorLaunchOutOfResources = 701,
};
// The last error, and forgets it.
inline cudaError_t cudaGetLastError() {
  return static_cast<cudaError_t>(cuda_sim::exchange_error(cudaSuccess));
}
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidValue           ? "invalid argument"
         : error == cudaErrorLaunchOutOfResources ? "too many resources requested for launch"
                                                  : "unrecognized error code";
}
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
// Few, so that persistent kernels loop.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  return *value = 2, cudaSuccess;
}

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
template <class Kernel>
inline cudaError_t cudaFuncSetAttribute(Kernel kernel, cudaFuncAttribute, int bytes) {
  return static_cast<cudaError_t>(
      cuda_sim::allow_dynamic(reinterpret_cast<const void*>(kernel), bytes));
}

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

// ---- 16-bit types

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};

namespace cuda_sim {

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline float half_to_float(uint16_t h) {
  const uint32_t sign = (h & 0x8000u) << 16, exponent = h >> 10 & 31, fraction = h & 1023;
  if (exponent == 0) return (sign ? -0x1p-24f : 0x1p-24f) * static_cast<float>(fraction);
  const uint32_t wide = exponent == 31 ? 255 : exponent + 112;
  return bit_cast<float>(sign | wide << 23 | fraction << 13);
}

// To nearest, ties to even.
inline uint16_t float_to_half(float f) {
  const uint16_t sign = bit_cast<uint32_t>(f) >> 16 & 0x8000;
  const float size = std::fabs(f);
  if (std::isnan(f)) return 0x7fff;
  if (size >= 65520.0f) return sign | 0x7c00;
  if (size < 0x1p-14f) return sign | static_cast<uint16_t>(std::nearbyint(std::ldexp(size, 24)));
  int exponent;
  const float fraction = std::frexp(size, &exponent);  // [1/2, 1)
  const auto digits = static_cast<uint32_t>(std::nearbyint(std::ldexp(fraction, 11)));
  // A fraction rounded up to 2048 carries into the exponent by itself.
  return static_cast<uint16_t>(sign | (((exponent + 13) << 10) + digits));
}

}  // namespace cuda_sim

inline float __bfloat162float(__nv_bfloat16 x) {
  return cuda_sim::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16);
}
inline __nv_bfloat16 __float2bfloat16(float f) {
  const auto bits = cuda_sim::bit_cast<uint32_t>(f);
  if (f != f) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline float __half2float(__half x) { return cuda_sim::half_to_float(x.bits); }
inline __half __float2half(float f) { return {cuda_sim::float_to_half(f)}; }

// ---- arithmetic

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __frsqrt_rn(float x) { return 1.0f / std::sqrt(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fmul_rn(float a, float b) { return a * b; }
using std::fmaxf;
using std::fminf;
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline double __longlong_as_double(long long x) { return cuda_sim::bit_cast<double>(x); }
inline uint64_t __umul64hi(uint64_t a, uint64_t b) {
  return static_cast<uint64_t>(static_cast<unsigned __int128>(a) * b >> 64);
}
inline unsigned __float_as_uint(float x) { return cuda_sim::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return cuda_sim::bit_cast<float>(x); }

// ---- barriers and collectives

#define __syncthreads() cuda_sim::sync_threads(LLMOPS_WHERE)
#define __syncwarp(...) cuda_sim::sync_warp(LLMOPS_WHERE, cuda_sim::mask_of(__VA_ARGS__))

#define __shfl_sync(mask, value, lane) \
  cuda_sim::shuffle("__shfl_sync", LLMOPS_WHERE, mask, value, (lane) & 31)
#define __shfl_xor_sync(mask, value, with) \
  cuda_sim::shuffle("__shfl_xor_sync", LLMOPS_WHERE, mask, value, cuda_sim::current->lane ^ (with))
#define __shfl_down_sync(mask, value, by) \
  cuda_sim::shuffle("__shfl_down_sync", LLMOPS_WHERE, mask, value, cuda_sim::lower(by))
#define __shfl_up_sync(mask, value, by) \
  cuda_sim::shuffle("__shfl_up_sync", LLMOPS_WHERE, mask, value, cuda_sim::higher(by))
#define __ballot_sync(mask, value) cuda_sim::ballot(LLMOPS_WHERE, mask, value)
#define __any_sync(mask, value) (cuda_sim::ballot(LLMOPS_WHERE, mask, value) != 0)
#define __all_sync(mask, value) (cuda_sim::ballot(LLMOPS_WHERE, mask, !(value)) == 0)

namespace cuda_sim {

inline uint32_t mask_of(uint32_t mask = 0xffffffffu) { return mask; }
inline int lower(int by) { return current->lane + by < 32 ? current->lane + by : current->lane; }
inline int higher(int by) { return current->lane >= by ? current->lane - by : current->lane; }

template <class T>
inline T shuffle(const char* what, const char* where, uint32_t mask, T value, int from) {
  Hidden hidden;
  const Round* round = meet(what, where, mask, &value, sizeof value);
  if (!(mask >> from & 1))
    fail(where, "bad mask: %s reads lane %d, not in mask %08x", what, from, mask);
  std::memcpy(&value, round->given[from], sizeof value);
  leave(round);
  return value;
}

inline uint32_t ballot(const char* where, uint32_t mask, bool value) {
  Hidden hidden;
  const Round* round = meet("__ballot_sync", where, mask, &value, sizeof value);
  uint32_t result = 0;
  for (int lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1 && round->given[lane][0]) result |= 1u << lane;
  leave(round);
  return result;
}

}  // namespace cuda_sim

// ---- atomics

template <class T>
inline T atomicAdd(T* to, T value) {
  T old, sum;
  __atomic_load(to, &old, __ATOMIC_RELAXED);
  do sum = old + value;
  while (!__atomic_compare_exchange(to, &old, &sum, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}
template <class T>
inline T atomicMax(T* to, T value) {
  T old, most;
  __atomic_load(to, &old, __ATOMIC_RELAXED);
  do most = old > value ? old : value;
  while (!__atomic_compare_exchange(to, &old, &most, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}

// ---- what device.h has two forms of

#define LLMOPS_SHARED(T, name, count) \
  static char name##_site;            \
  T* const name = static_cast<T*>(    \
      cuda_sim::shared(&name##_site, sizeof(T) * (count), #name " of " LLMOPS_WHERE))
#define LLMOPS_DYNAMIC_SHARED(T, name) \
  T* const name = static_cast<T*>(cuda_sim::dynamic_shared(LLMOPS_WHERE))
#define LLMOPS_LAUNCH(kernel, grid, block, bytes, stream, ...)                        \
  do {                                                                                \
    (void)(stream);                                                                   \
    const auto run = kernel;                                                          \
    cuda_sim::launch(#kernel, reinterpret_cast<const void*>(run), grid, block, bytes, \
                     [&] { run(__VA_ARGS__); });                                      \
  } while (0)
