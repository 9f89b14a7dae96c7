// Vec with eight lanes on AVX2, FMA and F16C. Included by simd.h.
#pragma once
#include <immintrin.h>

namespace llmops::cpu::LLMOPS_ISA {

constexpr int W = 8;
struct Vec {
  __m256 v;
};
struct Mask {
  __m256 v;  // all bits of a lane set or clear
};

LLMOPS_INLINE Vec set1(float x) { return {_mm256_set1_ps(x)}; }
LLMOPS_INLINE Vec zero() { return {_mm256_setzero_ps()}; }
LLMOPS_INLINE __m256i lane_index() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
LLMOPS_INLINE Mask first_n(int n) {
  return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane_index()))};
}

LLMOPS_INLINE __m256 widen_bf16(__m128i x) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
}
LLMOPS_INLINE __m128i narrow_bf16(__m256 x) {
  const __m256i u = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256 nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
  const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
  const __m256i bits =
      _mm256_srli_epi32(_mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(rounded),
                                                             _mm256_castsi256_ps(quiet), nan)),
                        16);
  // packus works within 128-bit halves: bring the two useful quarters together.
  return _mm256_castsi256_si128(
      _mm256_permute4x64_epi64(_mm256_packus_epi32(bits, bits), 0b11011000));
}
LLMOPS_INLINE __m128i narrow_fp16(__m256 x) {
  return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

LLMOPS_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
LLMOPS_INLINE Vec load(const bf16* p) { return {widen_bf16(_mm_loadu_si128((const __m128i*)p))}; }
LLMOPS_INLINE Vec load(const fp16* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p))};
}
// Elements 0, 2, ... and 1, 3, ... of the 2 * W from p on: one instruction each, where widening
// them in order takes a shuffle and a shift.
#define LLMOPS_HAS_SPLIT_LOADS
LLMOPS_INLINE Vec load_even(const bf16* p) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256((const __m256i*)p), 16))};
}
LLMOPS_INLINE Vec load_odd(const bf16* p) {
  const __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  return {_mm256_castsi256_ps(_mm256_and_si256(_mm256_loadu_si256((const __m256i*)p), high))};
}
LLMOPS_INLINE void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
LLMOPS_INLINE void store(bf16* p, Vec a) { _mm_storeu_si128((__m128i*)p, narrow_bf16(a.v)); }
LLMOPS_INLINE void store(fp16* p, Vec a) { _mm_storeu_si128((__m128i*)p, narrow_fp16(a.v)); }
// Past the caches; p aligned to the vector's size in memory. Ends with stream_fence().
LLMOPS_INLINE void stream(float* p, Vec a) { _mm256_stream_ps(p, a.v); }
LLMOPS_INLINE void stream(bf16* p, Vec a) { _mm_stream_si128((__m128i*)p, narrow_bf16(a.v)); }
LLMOPS_INLINE void stream(fp16* p, Vec a) { _mm_stream_si128((__m128i*)p, narrow_fp16(a.v)); }
LLMOPS_INLINE void stream_fence() { _mm_sfence(); }

// First n lanes of memory, `fill` in the rest; nothing past p[n-1] is read.
LLMOPS_INLINE Vec load_n(const float* p, int n, float fill = 0.0f) {
  const Mask m = first_n(n);
  return {
      _mm256_blendv_ps(_mm256_set1_ps(fill), _mm256_maskload_ps(p, _mm256_castps_si256(m.v)), m.v)};
}
// AVX2 has no masked 16-bit load: the few elements go through a buffer.
template <class T>
LLMOPS_INLINE Vec load_n(const T* p, int n, float fill = 0.0f) {
  T buffer[W] = {};
  for (int i = 0; i < (n < W ? n : W); ++i) buffer[i] = p[i];
  return {_mm256_blendv_ps(_mm256_set1_ps(fill), load(buffer).v, first_n(n).v)};
}
LLMOPS_INLINE void store_n(float* p, Vec a, int n) {
  _mm256_maskstore_ps(p, _mm256_castps_si256(first_n(n).v), a.v);
}
template <class T>
LLMOPS_INLINE void store_n(T* p, Vec a, int n) {
  T buffer[W];
  store(buffer, a);
  for (int i = 0; i < (n < W ? n : W); ++i) p[i] = buffer[i];
}

// a as the second argument's type holds it: rounded, and widened again.
LLMOPS_INLINE Vec round_as(Vec a, float) { return a; }
LLMOPS_INLINE Vec round_as(Vec a, bf16) { return {widen_bf16(narrow_bf16(a.v))}; }
LLMOPS_INLINE Vec round_as(Vec a, fp16) { return {_mm256_cvtph_ps(narrow_fp16(a.v))}; }
// Stores a; what the memory now holds.
LLMOPS_INLINE Vec store_rounded(bf16* p, Vec a) {
  const __m128i narrow = narrow_bf16(a.v);
  _mm_storeu_si128((__m128i*)p, narrow);
  return {widen_bf16(narrow)};
}
LLMOPS_INLINE Vec store_rounded(fp16* p, Vec a) {
  const __m128i narrow = narrow_fp16(a.v);
  _mm_storeu_si128((__m128i*)p, narrow);
  return {_mm256_cvtph_ps(narrow)};
}

LLMOPS_INLINE Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
LLMOPS_INLINE Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
LLMOPS_INLINE Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
LLMOPS_INLINE Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
LLMOPS_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
LLMOPS_INLINE Vec fnma(Vec a, Vec b, Vec c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }
// The second operand where either is NaN.
LLMOPS_INLINE Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
LLMOPS_INLINE Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
LLMOPS_INLINE Vec sqrt(Vec a) { return {_mm256_sqrt_ps(a.v)}; }
LLMOPS_INLINE Vec abs(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
LLMOPS_INLINE Vec round(Vec a) {
  return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// p * 2^n for integer-valued n in [-252, 254], in two factors: no early overflow or underflow.
LLMOPS_INLINE Vec scale_by_power(Vec p, Vec n) {
  const __m256i whole = _mm256_cvtps_epi32(n.v), half = _mm256_srai_epi32(whole, 1);
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256 a = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
  const __m256 b = _mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(whole, half), bias), 23));
  return {_mm256_mul_ps(_mm256_mul_ps(p.v, a), b)};
}

// The same for p near 1 and n in [-127, 127], by the exponent bits alone: p = 1, n = -127 is 0.
LLMOPS_INLINE Vec scale_by_small_power(Vec p, Vec n) {
  const __m256i shift = _mm256_slli_epi32(_mm256_cvtps_epi32(n.v), 23);
  return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p.v), shift))};
}

// Lanes whose index is at least `bound`.
LLMOPS_INLINE Mask lanes_ge(int bound) {
  return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(lane_index(), _mm256_set1_epi32(bound - 1)))};
}
LLMOPS_INLINE Mask less(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
LLMOPS_INLINE Mask equal(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)}; }
LLMOPS_INLINE Vec select(Mask m, Vec a, Vec b) { return {_mm256_blendv_ps(b.v, a.v, m.v)}; }
// One byte per lane, non-zero keeps.
LLMOPS_INLINE Mask load_mask_n(const uint8_t* p, int n) {
  uint64_t bytes = 0;
  if (n >= W) {
    __builtin_memcpy(&bytes, p, 8);
  } else {
    for (int i = 0; i < n; ++i) bytes |= static_cast<uint64_t>(p[i]) << (8 * i);
  }
  const __m256i wide = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<long long>(bytes)));
  return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(wide, _mm256_setzero_si256()))};
}

// 32 unsigned bits to a lane, for random numbers.
struct Bits {
  __m256i v;
};
LLMOPS_INLINE Bits set1_bits(uint32_t x) { return {_mm256_set1_epi32(static_cast<int>(x))}; }
LLMOPS_INLINE Bits load_bits(const uint32_t* p) { return {_mm256_loadu_si256((const __m256i*)p)}; }
LLMOPS_INLINE Bits operator^(Bits a, Bits b) { return {_mm256_xor_si256(a.v, b.v)}; }
// a * b, 64 bits wide.
LLMOPS_INLINE void mul_wide(Bits a, uint32_t b, Bits* high, Bits* low) {
  const __m256i factor = _mm256_set1_epi32(static_cast<int>(b));
  const __m256i even = _mm256_mul_epu32(a.v, factor);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(a.v, 32), factor);
  high->v = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
  low->v = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
}
// Compared as signed numbers with the top bit flipped.
LLMOPS_INLINE Mask below(Bits a, uint32_t b) {
  const __m256i top = _mm256_set1_epi32(static_cast<int>(0x80000000u));
  const __m256i limit = _mm256_set1_epi32(static_cast<int>(b ^ 0x80000000u));
  return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(limit, _mm256_xor_si256(a.v, top)))};
}

// Bit i set where lane i is.
LLMOPS_INLINE uint32_t mask_bits(Mask m) { return static_cast<uint32_t>(_mm256_movemask_ps(m.v)); }
LLMOPS_INLINE Mask mask_and(Mask a, Mask b) { return {_mm256_and_ps(a.v, b.v)}; }

// (low, high) hold x0 y0 x1 y1 ...; x and y get the even and the odd places, and back.
LLMOPS_INLINE void deinterleave(Vec low, Vec high, Vec* x, Vec* y) {
  // shuffle works within 128-bit halves and leaves the middle quarters exchanged.
  const __m256 even = _mm256_shuffle_ps(low.v, high.v, 0b10001000);
  const __m256 odd = _mm256_shuffle_ps(low.v, high.v, 0b11011101);
  x->v = _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(even), 0b11011000));
  y->v = _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(odd), 0b11011000));
}
LLMOPS_INLINE void interleave(Vec x, Vec y, Vec* low, Vec* high) {
  const __m256 a = _mm256_unpacklo_ps(x.v, y.v), b = _mm256_unpackhi_ps(x.v, y.v);
  low->v = _mm256_permute2f128_ps(a, b, 0x20);
  high->v = _mm256_permute2f128_ps(a, b, 0x31);
}

LLMOPS_INLINE float reduce_add(Vec a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
LLMOPS_INLINE float reduce_max(Vec a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
}
LLMOPS_INLINE float first_lane(Vec a) { return _mm256_cvtss_f32(a.v); }

// r[i] lane j <-> r[j] lane i.
LLMOPS_INLINE void transpose(Vec* r) {
  __m256 t[8], u[8];
  LLMOPS_UNROLL for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i].v, r[2 * i + 1].v);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i].v, r[2 * i + 1].v);
  }
  LLMOPS_UNROLL for (int i = 0; i < 2; ++i) {
    u[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    u[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    u[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    u[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
  LLMOPS_UNROLL for (int i = 0; i < 4; ++i) {
    r[i].v = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
    r[i + 4].v = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
  }
}

// Lane i of the result is the sum of r[i]'s lanes, for W vectors.
LLMOPS_INLINE Vec reduce_each(const Vec* r) {
  const __m256 a = _mm256_hadd_ps(_mm256_hadd_ps(r[0].v, r[1].v), _mm256_hadd_ps(r[2].v, r[3].v));
  const __m256 b = _mm256_hadd_ps(_mm256_hadd_ps(r[4].v, r[5].v), _mm256_hadd_ps(r[6].v, r[7].v));
  return {_mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31))};
}

}  // namespace llmops::cpu::LLMOPS_ISA
