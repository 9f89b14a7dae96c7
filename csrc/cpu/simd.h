// One vector of fp32 lanes, `Vec`, with W lanes, in whichever instruction set this file is compiled
// for (LLMOPS_ISA: scalar, avx2, avx512, avx512_bf16). Kernels are written once against it.
//
// Storage types are float, bf16 and fp16; arithmetic is always fp32. Everything is a static
// always-inline function: a kernel object must hold no weak or inline symbol, since the linker may
// keep the AVX-512 copy of such a symbol and crash an older processor (tools/check_objects.py).
// For the same reason no standard C++ header is included here or in any kernel.
#pragma once
#include <stdint.h>

#ifndef LLMOPS_ISA
#error "compile kernels through setup.py, which defines LLMOPS_ISA per instruction set"
#endif

#define LLMOPS_INLINE static inline __attribute__((always_inline))
// For a large function of few types that many instantiations call: one copy instead of one in each.
// Static, like everything here: a plain template function would be a weak symbol.
#define LLMOPS_NOINLINE static __attribute__((noinline))
// GCC 12 puts an array of accumulators on the stack unless every loop over it is unrolled.
#define LLMOPS_UNROLL _Pragma("GCC unroll 32")

#include "isa.h"

// Runs `...` with the type T that a runtime DType names.
#define LLMOPS_DISPATCH(dtype, T, ...)   \
  do {                                   \
    switch (dtype) {                     \
      case ::llmops::cpu::DType::f32: {  \
        using T = float;                 \
        __VA_ARGS__;                     \
        break;                           \
      }                                  \
      case ::llmops::cpu::DType::bf16: { \
        using T = ::llmops::cpu::bf16;   \
        __VA_ARGS__;                     \
        break;                           \
      }                                  \
      case ::llmops::cpu::DType::f16: {  \
        using T = ::llmops::cpu::fp16;   \
        __VA_ARGS__;                     \
        break;                           \
      }                                  \
    }                                    \
  } while (0)

namespace llmops::cpu {
struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};
}  // namespace llmops::cpu

namespace llmops::cpu::LLMOPS_ISA {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kInf = __builtin_inff();

LLMOPS_INLINE uint32_t float_bits(float x) {
  uint32_t u;
  __builtin_memcpy(&u, &x, 4);
  return u;
}
LLMOPS_INLINE float bits_float(uint32_t u) {
  float x;
  __builtin_memcpy(&x, &u, 4);
  return x;
}

LLMOPS_INLINE float to_float(float x) { return x; }
LLMOPS_INLINE float to_float(bf16 x) { return bits_float(static_cast<uint32_t>(x.bits) << 16); }
LLMOPS_INLINE float to_float(fp16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_float(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  if (magnitude >= 0x400u) return bits_float(sign | ((magnitude << 13) + (112u << 23)));
  // Subnormal: magnitude * 2^-24, exact in fp32.
  return bits_float(sign | float_bits(static_cast<float>(magnitude) * 0x1p-24f));
}

LLMOPS_INLINE void from_float(float x, float* out) { *out = x; }
// Round to nearest, ties to even; a NaN stays a (quiet) NaN instead of rounding up to infinity.
LLMOPS_INLINE void from_float(float x, bf16* out) {
  const uint32_t u = float_bits(x);
  out->bits = (u & 0x7fffffffu) > 0x7f800000u
                  ? static_cast<uint16_t>((u >> 16) | 0x40u)
                  : static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
LLMOPS_INLINE void from_float(float x, fp16* out) {
  const uint32_t u = float_bits(x), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    out->bits = static_cast<uint16_t>(sign | 0x7e00u);
  } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
    out->bits = static_cast<uint16_t>(sign | 0x7c00u);
  } else if (magnitude >= 0x38800000u) {  // normal
    const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
    out->bits = static_cast<uint16_t>(sign | ((rounded - (112u << 23)) >> 13));
  } else {  // subnormal: adding 0.5 puts the value's last bit at 2^-24 with the hardware's rounding
    const float shifted = bits_float(magnitude) + 0.5f;
    out->bits = static_cast<uint16_t>(sign | (float_bits(shifted) - 0x3f000000u));
  }
}

}  // namespace llmops::cpu::LLMOPS_ISA

#if defined(__AVX512F__)
#include "simd_avx512.h"
#elif defined(__AVX2__)
#include "simd_avx2.h"
#else
#include "simd_scalar.h"
#endif

#include "simd_math.h"

namespace llmops::cpu::LLMOPS_ISA {

constexpr uint32_t kAllLanes = (1u << W) - 1;  // mask_bits of whole vectors

// The lines of four vectors that a later sweep will need: without it memory idles while a sweep
// works in cache. An address past the end is no fault.
template <class T>
LLMOPS_INLINE void prefetch_block(const T* p) {
  LLMOPS_UNROLL for (int byte = 0; byte < 4 * W * static_cast<int>(sizeof(T)); byte += 64) {
    __builtin_prefetch(reinterpret_cast<const char*>(p) + byte);
  }
}

}  // namespace llmops::cpu::LLMOPS_ISA
