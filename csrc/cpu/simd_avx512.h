// Vec with sixteen lanes on AVX-512 (F, BW, DQ, VL), and bf16 stores by vcvtneps2bf16 where the
// AVX-512-BF16 copy is compiled. Included by simd.h.
#pragma once
#include <immintrin.h>

namespace llmops::cpu::LLMOPS_ISA {

constexpr int W = 16;
struct Vec {
  __m512 v;
};
struct Mask {
  __mmask16 v;
};

LLMOPS_INLINE Vec set1(float x) { return {_mm512_set1_ps(x)}; }
LLMOPS_INLINE Vec zero() { return {_mm512_setzero_ps()}; }
LLMOPS_INLINE Mask first_n(int n) {
  return {static_cast<__mmask16>(n >= 16 ? 0xffffu : (n <= 0 ? 0u : (1u << n) - 1u))};
}

LLMOPS_INLINE __m512 widen_bf16(__m256i x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
LLMOPS_INLINE __m256i narrow_bf16(__m512 x) {
#ifdef __AVX512BF16__
  return (__m256i)_mm512_cvtneps_pbh(x);
#else
  const __m512i u = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const __m512i quiet = _mm512_or_si512(u, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
#endif
}
LLMOPS_INLINE __m256i narrow_fp16(__m512 x) {
  return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

LLMOPS_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
LLMOPS_INLINE Vec load(const bf16* p) {
  return {widen_bf16(_mm256_loadu_si256((const __m256i*)p))};
}
LLMOPS_INLINE Vec load(const fp16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))};
}
LLMOPS_INLINE void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
LLMOPS_INLINE void store(bf16* p, Vec a) { _mm256_storeu_si256((__m256i*)p, narrow_bf16(a.v)); }
LLMOPS_INLINE void store(fp16* p, Vec a) { _mm256_storeu_si256((__m256i*)p, narrow_fp16(a.v)); }
// Past the caches; p aligned to the vector's size in memory. Ends with stream_fence().
LLMOPS_INLINE void stream(float* p, Vec a) { _mm512_stream_ps(p, a.v); }
LLMOPS_INLINE void stream(bf16* p, Vec a) { _mm256_stream_si256((__m256i*)p, narrow_bf16(a.v)); }
LLMOPS_INLINE void stream(fp16* p, Vec a) { _mm256_stream_si256((__m256i*)p, narrow_fp16(a.v)); }
LLMOPS_INLINE void stream_fence() { _mm_sfence(); }

// First n lanes of memory, `fill` in the rest; nothing past p[n-1] is read.
LLMOPS_INLINE Vec load_n(const float* p, int n, float fill = 0.0f) {
  return {_mm512_mask_loadu_ps(_mm512_set1_ps(fill), first_n(n).v, p)};
}
LLMOPS_INLINE Vec load_n(const bf16* p, int n, float fill = 0.0f) {
  const __mmask16 m = first_n(n).v;
  return {_mm512_mask_mov_ps(_mm512_set1_ps(fill), m, widen_bf16(_mm256_maskz_loadu_epi16(m, p)))};
}
LLMOPS_INLINE Vec load_n(const fp16* p, int n, float fill = 0.0f) {
  const __mmask16 m = first_n(n).v;
  return {
      _mm512_mask_mov_ps(_mm512_set1_ps(fill), m, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(m, p)))};
}
LLMOPS_INLINE void store_n(float* p, Vec a, int n) { _mm512_mask_storeu_ps(p, first_n(n).v, a.v); }
LLMOPS_INLINE void store_n(bf16* p, Vec a, int n) {
  _mm256_mask_storeu_epi16(p, first_n(n).v, narrow_bf16(a.v));
}
LLMOPS_INLINE void store_n(fp16* p, Vec a, int n) {
  _mm256_mask_storeu_epi16(p, first_n(n).v, narrow_fp16(a.v));
}

// a as the second argument's type holds it: rounded, and widened again.
LLMOPS_INLINE Vec round_as(Vec a, float) { return a; }
LLMOPS_INLINE Vec round_as(Vec a, bf16) { return {widen_bf16(narrow_bf16(a.v))}; }
LLMOPS_INLINE Vec round_as(Vec a, fp16) { return {_mm512_cvtph_ps(narrow_fp16(a.v))}; }

// Stores a; what the memory now holds.
LLMOPS_INLINE Vec store_rounded(bf16* p, Vec a) {
  const __m256i narrow = narrow_bf16(a.v);
  _mm256_storeu_si256((__m256i*)p, narrow);
  return {widen_bf16(narrow)};
}
LLMOPS_INLINE Vec store_rounded(fp16* p, Vec a) {
  const __m256i narrow = narrow_fp16(a.v);
  _mm256_storeu_si256((__m256i*)p, narrow);
  return {_mm512_cvtph_ps(narrow)};
}

LLMOPS_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
LLMOPS_INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
LLMOPS_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
LLMOPS_INLINE Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
LLMOPS_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
LLMOPS_INLINE Vec fnma(Vec a, Vec b, Vec c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }
// The second operand where either is NaN.
LLMOPS_INLINE Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
LLMOPS_INLINE Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
LLMOPS_INLINE Vec sqrt(Vec a) { return {_mm512_sqrt_ps(a.v)}; }
LLMOPS_INLINE Vec abs(Vec a) { return {_mm512_abs_ps(a.v)}; }
LLMOPS_INLINE Vec round(Vec a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// p * 2^n for integer-valued n, with correct overflow, underflow and NaN.
LLMOPS_INLINE Vec scale_by_power(Vec p, Vec n) { return {_mm512_scalef_ps(p.v, n.v)}; }

// p * 2^floor(x) for p near 1; 0 where x is below -126, -inf included.
LLMOPS_INLINE Vec scale_by_small_power(Vec p, Vec x) {
  const __mmask16 normal = _mm512_cmp_ps_mask(x.v, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  return {_mm512_maskz_scalef_ps(normal, p.v, x.v)};
}
// x - floor(x), and 0 of an infinity: with it 2^x = 2^floor(x) 2^r for 0 <= r < 1, without the
// instructions that round to n and take it off.
LLMOPS_INLINE Vec fraction(Vec x) {
  return {_mm512_reduce_ps(x.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};
}

// table[i] of 32, i in the lowest bits of each lane.
LLMOPS_INLINE Vec look_up(const float* table, Vec index) {
  return {_mm512_permutex2var_ps(_mm512_loadu_ps(table), _mm512_castps_si512(index.v),
                                 _mm512_loadu_ps(table + 16))};
}
// y where x is at least `least` or NaN, else 0.
LLMOPS_INLINE Vec keep_from(float least, Vec x, Vec y) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, _mm512_set1_ps(least), _CMP_NLT_UQ), y.v)};
}
// Lanes whose index is at least `bound`.
LLMOPS_INLINE Mask lanes_ge(int bound) { return {static_cast<__mmask16>(~first_n(bound).v)}; }
LLMOPS_INLINE Mask less(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
LLMOPS_INLINE Mask equal(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
LLMOPS_INLINE Vec select(Mask m, Vec a, Vec b) { return {_mm512_mask_mov_ps(b.v, m.v, a.v)}; }
// One byte per lane, non-zero keeps.
LLMOPS_INLINE Mask load_mask_n(const uint8_t* p, int n) {
  const __m128i bytes = _mm_maskz_loadu_epi8(first_n(n).v, p);
  return {_mm_test_epi8_mask(bytes, bytes)};
}

// 32 unsigned bits to a lane, for random numbers.
struct Bits {
  __m512i v;
};
LLMOPS_INLINE Bits set1_bits(uint32_t x) { return {_mm512_set1_epi32(static_cast<int>(x))}; }
LLMOPS_INLINE Bits load_bits(const uint32_t* p) { return {_mm512_loadu_si512(p)}; }
LLMOPS_INLINE Bits operator^(Bits a, Bits b) { return {_mm512_xor_si512(a.v, b.v)}; }
// a * b, 64 bits wide.
LLMOPS_INLINE void mul_wide(Bits a, uint32_t b, Bits* high, Bits* low) {
  const __m512i factor = _mm512_set1_epi32(static_cast<int>(b));
  const __m512i even = _mm512_mul_epu32(a.v, factor);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(a.v, 32), factor);
  high->v = _mm512_mask_mov_epi32(_mm512_srli_epi64(even, 32), 0xaaaa, odd);
  low->v = _mm512_mask_mov_epi32(even, 0xaaaa, _mm512_slli_epi64(odd, 32));
}
LLMOPS_INLINE Mask below(Bits a, uint32_t b) {
  return {_mm512_cmplt_epu32_mask(a.v, set1_bits(b).v)};
}

// Bit i set where lane i is.
LLMOPS_INLINE uint32_t mask_bits(Mask m) { return m.v; }
LLMOPS_INLINE Mask mask_and(Mask a, Mask b) { return {static_cast<__mmask16>(a.v & b.v)}; }

// (low, high) hold x0 y0 x1 y1 ...; x and y get the even and the odd places, and back.
LLMOPS_INLINE void deinterleave(Vec low, Vec high, Vec* x, Vec* y) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  x->v = _mm512_permutex2var_ps(low.v, even, high.v);
  y->v = _mm512_permutex2var_ps(low.v, _mm512_or_si512(even, _mm512_set1_epi32(1)), high.v);
}
LLMOPS_INLINE void interleave(Vec x, Vec y, Vec* low, Vec* high) {
  const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  low->v = _mm512_permutex2var_ps(x.v, first, y.v);
  high->v = _mm512_permutex2var_ps(x.v, _mm512_add_epi32(first, _mm512_set1_epi32(8)), y.v);
}

LLMOPS_INLINE float reduce_add(Vec a) { return _mm512_reduce_add_ps(a.v); }
LLMOPS_INLINE float reduce_max(Vec a) { return _mm512_reduce_max_ps(a.v); }
LLMOPS_INLINE float first_lane(Vec a) { return _mm512_cvtss_f32(a.v); }

// r[i] lane j <-> r[j] lane i.
LLMOPS_INLINE void transpose(Vec* r) {
  __m512 t[16];
  LLMOPS_UNROLL for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i].v, r[2 * i + 1].v);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i].v, r[2 * i + 1].v);
  }
  LLMOPS_UNROLL for (int i = 0; i < 4; ++i) {
    LLMOPS_UNROLL for (int h = 0; h < 2; ++h) {
      const __m512d a = _mm512_castps_pd(t[4 * i + h]), b = _mm512_castps_pd(t[4 * i + 2 + h]);
      r[4 * i + 2 * h].v = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      r[4 * i + 2 * h + 1].v = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  }
  LLMOPS_UNROLL for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(r[i].v, r[i + 4].v, 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(r[i].v, r[i + 4].v, 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(r[i + 8].v, r[i + 12].v, 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(r[i + 8].v, r[i + 12].v, 0xdd);
  }
  LLMOPS_UNROLL for (int i = 0; i < 4; ++i) {
    r[i].v = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    r[i + 8].v = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
    r[i + 4].v = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12].v = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// Lane i of the result is the sum of r[i]'s lanes, for W vectors.
LLMOPS_INLINE Vec reduce_each(const Vec* r) {
  __m512 t[8], u[4], w[2];
  LLMOPS_UNROLL for (int i = 0; i < 8; ++i) {
    t[i] = _mm512_add_ps(_mm512_unpacklo_ps(r[2 * i].v, r[2 * i + 1].v),
                         _mm512_unpackhi_ps(r[2 * i].v, r[2 * i + 1].v));
  }
  LLMOPS_UNROLL for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(t[2 * i]), b = _mm512_castps_pd(t[2 * i + 1]);
    u[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                         _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  LLMOPS_UNROLL for (int i = 0; i < 2; ++i) {
    w[i] = _mm512_add_ps(_mm512_shuffle_f32x4(u[2 * i], u[2 * i + 1], 0x88),
                         _mm512_shuffle_f32x4(u[2 * i], u[2 * i + 1], 0xdd));
  }
  return {_mm512_add_ps(_mm512_shuffle_f32x4(w[0], w[1], 0x88),
                        _mm512_shuffle_f32x4(w[0], w[1], 0xdd))};
}

// bf16 pairs: a Vec whose 32-bit lanes hold two bf16 each, the first in the low half.
LLMOPS_INLINE Vec load_pairs(const bf16* p) { return {_mm512_castsi512_ps(_mm512_loadu_si512(p))}; }
LLMOPS_INLINE Vec load_pairs_n(const bf16* p, int n) {
  if (n >= 32) return load_pairs(p);
  const __mmask32 m = n <= 0 ? 0u : (1u << n) - 1u;
  return {_mm512_castsi512_ps(_mm512_maskz_loadu_epi16(m, p))};
}
// 32 bf16 of each of two rows, interleaved into 32 pairs (row a in the low halves).
LLMOPS_INLINE void interleave_pairs(Vec a, Vec b, Vec* out) {
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8,
                                       39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  const __m512i x = _mm512_castps_si512(a.v), y = _mm512_castps_si512(b.v);
  out[0].v = _mm512_castsi512_ps(_mm512_permutex2var_epi16(x, low, y));
  out[1].v = _mm512_castsi512_ps(_mm512_permutex2var_epi16(x, high, y));
}
LLMOPS_INLINE Vec flip_pair_signs(Vec a) {
  return {_mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(a.v),
                                               _mm512_set1_epi32(static_cast<int>(0x80008000u))))};
}
// Pairs (a[i], b[i]) of 32 columns in the order that costs two shuffles and no constant: what is
// accumulated from them is put in column order by repack_halves.
LLMOPS_INLINE void unpack_pairs(Vec a, Vec b, Vec* out) {
  const __m512i x = _mm512_castps_si512(a.v), y = _mm512_castps_si512(b.v);
  out[0].v = _mm512_castsi512_ps(_mm512_unpacklo_epi16(x, y));
  out[1].v = _mm512_castsi512_ps(_mm512_unpackhi_epi16(x, y));
}
LLMOPS_INLINE void repack_halves(Vec* r) {
  const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  const __m512 a = r[0].v, b = r[1].v;
  r[0].v = _mm512_permutex2var_ps(a, low, b);
  r[1].v = _mm512_permutex2var_ps(a, high, b);
}
#ifdef __AVX512BF16__
#define LLMOPS_HAS_DOT_PAIRS 1
// 32 floats rounded to bf16, in order.
LLMOPS_INLINE Vec narrow_pairs(Vec first, Vec second) {
  return {(__m512)_mm512_cvtne2ps_pbh(second.v, first.v)};
}
// narrow_pairs' result, a lane of the first beside the same lane of the second; and its halves, by
// row. One conversion and one permutation, where narrowing each and merging are eight.
LLMOPS_INLINE Vec merge_halves(Vec a) {
  const __m512i index = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return {_mm512_castsi512_ps(_mm512_permutexvar_epi16(index, _mm512_castps_si512(a.v)))};
}
LLMOPS_INLINE void store_halves(bf16* first, bf16* second, Vec a) {
  const __m512i x = _mm512_castps_si512(a.v);
  _mm256_storeu_si256((__m256i*)first, _mm512_castsi512_si256(x));
  _mm256_storeu_si256((__m256i*)second, _mm512_extracti64x4_epi64(x, 1));
}
// Lane i: (low[i], high[i]) rounded to bf16.
LLMOPS_INLINE Vec make_pairs(Vec low, Vec high) { return merge_halves(narrow_pairs(low, high)); }
// Lane i: the upper halves of low[i] and high[i], which is truncation to bf16.
LLMOPS_INLINE Vec high_half(Vec a) {
  const __m512i mask = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(a.v), mask))};
}
LLMOPS_INLINE Vec pair_high_halves(Vec low, Vec high) {
  const __m512i half = _mm512_srli_epi32(_mm512_castps_si512(low.v), 16);
  return {_mm512_castsi512_ps(_mm512_or_si512(half, _mm512_castps_si512(high_half(high).v)))};
}
// Whichever is larger, or smaller, in magnitude; the smaller with a's sign. b where a is
// NaN, NaN where either signals.
LLMOPS_INLINE Vec larger(Vec a, Vec b) { return {_mm512_range_ps(a.v, b.v, 7)}; }
LLMOPS_INLINE Vec smaller(Vec a, Vec b) { return {_mm512_range_ps(a.v, b.v, 2)}; }
// c + a.low * b.low + a.high * b.high, in fp32 (subnormal products and sums flush to zero).
LLMOPS_INLINE Vec dot_pairs(Vec a, Vec b, Vec c) {
  return {_mm512_dpbf16_ps(c.v, (__m512bh)a.v, (__m512bh)b.v)};
}
#endif

}  // namespace llmops::cpu::LLMOPS_ISA
