// AVX-512 by AVX2, so that the kernels' AVX-512 copies run on processors without it.
//
// Read before the compiler's own <immintrin.h>, which it replaces (-include, with AVX2 flags; see
// LLMOPS_EMULATE_AVX512 in setup.py): a 512-bit value is a struct of two 256-bit halves, and each
// function here has the name and the results of the intrinsic, bit for bit but for the payload of a
// NaN. It holds the intrinsics that csrc/cpu/simd_avx512.h uses and no others: one that is missing
// is "not declared" when the emulated build compiles, and is to be added. The semantics are those
// of the operation sections in Intel's Software Developer's Manual; tests/test_cpu_vector.py runs
// on both. AMX's tiles are in amx.h beside.
#pragma once
#ifdef __AVX512BW__
#error "compile the emulation without -mavx512*: it would hide the real intrinsics"
#endif
#if !defined(__GNUC__) || defined(__clang__)
#error "the emulation knows GCC's headers; build it with CXX=g++"
#endif

// <immintrin.h> up to AVX2 and FMA; the rest of it would declare the names below.
#define _IMMINTRIN_H_INCLUDED
#include <smmintrin.h>
#include <stdint.h>

#include <avxintrin.h>

#include <avx2intrin.h>
#include <f16cintrin.h>
#include <fmaintrin.h>

namespace llmops_emulation {

#define LLMOPS_EMULATED static inline __attribute__((always_inline, unused))

// One type for __m512, __m512i, __m512d and __m512bh: a cast between them is then no conversion.
struct Wide {
  __m256 low, high;
};
typedef uint16_t Mask16;
typedef uint32_t Mask32;

// The lanes of a Wide as an array.
template <typename T>
struct Lanes {
  T at[64 / sizeof(T)];
};
template <typename T>
LLMOPS_EMULATED Lanes<T> lanes(Wide a) {
  Lanes<T> out;
  __builtin_memcpy(&out, &a, 64);
  return out;
}
template <typename T>
LLMOPS_EMULATED Wide wide(const Lanes<T>& a) {
  Wide out;
  __builtin_memcpy(&out, &a, 64);
  return out;
}
LLMOPS_EMULATED __m256i as_int(__m256 a) { return _mm256_castps_si256(a); }
LLMOPS_EMULATED __m256 as_float(__m256i a) { return _mm256_castsi256_ps(a); }
LLMOPS_EMULATED Wide wide(__m256i low, __m256i high) { return {as_float(low), as_float(high)}; }

// All ones in the 32-bit lanes whose bit (of the lower eight) is set.
LLMOPS_EMULATED __m256i spread_mask(unsigned mask) {
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(mask)), bit), bit);
}

// Subnormal values to zero of their sign, as the bf16 instructions treat operands and results.
LLMOPS_EMULATED __m256 flush(__m256 x) {
  const __m256 sign = _mm256_and_ps(x, _mm256_set1_ps(-0.0f));
  const __m256 size = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x);
  const __m256 tiny = _mm256_cmp_ps(size, _mm256_set1_ps(0x1p-126f), _CMP_LT_OQ);
  return _mm256_blendv_ps(x, sign, tiny);
}
// fp32 to bf16 in the low half of each lane: to nearest even, NaN quiet.
LLMOPS_EMULATED __m256i round_to_bf16(__m256 x) {
  const __m256i u = as_int(flush(x));
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
  const __m256i nan = as_int(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_srli_epi32(_mm256_blendv_epi8(up, quiet, nan), 16);
}
// The low halves of sixteen lanes, in order.
LLMOPS_EMULATED __m256i low_halves(__m256i a, __m256i b) {
  const __m256i ones = _mm256_set1_epi32(0xffff);
  const __m256i packed = _mm256_packus_epi32(_mm256_and_si256(a, ones), _mm256_and_si256(b, ones));
  return _mm256_permute4x64_epi64(packed, 0xd8);
}
// sum + a * b on bf16 values; the product is exact in fp32.
LLMOPS_EMULATED __m256 add_product(__m256 sum, __m256 a, __m256 b) {
  return flush(_mm256_fmadd_ps(flush(a), flush(b), flush(sum)));
}
LLMOPS_EMULATED __m256 add_pair_products(__m256 sum, __m256 a, __m256 b) {
  const __m256 odd = as_float(_mm256_set1_epi32(static_cast<int>(0xffff0000u)));
  sum = add_product(sum, _mm256_and_ps(a, odd), _mm256_and_ps(b, odd));
  return add_product(sum, as_float(_mm256_slli_epi32(as_int(a), 16)),
                     as_float(_mm256_slli_epi32(as_int(b), 16)));
}
// Masked lanes are neither read nor written.
template <int N, typename T>
LLMOPS_EMULATED void copy_where(T* to, const void* from, uint32_t mask) {
  for (int i = 0; i < N; ++i) {
    if (mask >> i & 1) to[i] = static_cast<const T*>(from)[i];
  }
}

}  // namespace llmops_emulation

using __m512 = llmops_emulation::Wide;
using __m512i = llmops_emulation::Wide;
using __m512d = llmops_emulation::Wide;
using __m512bh = llmops_emulation::Wide;
using __m256bh = __m256i;
using __mmask16 = uint16_t;
using __mmask32 = uint32_t;

// ---- the halves by themselves
// --------------------------------------------------------------------

#define LLMOPS_HALVES_PS(name)                                           \
  LLMOPS_EMULATED __m512 _mm512_##name(__m512 a, __m512 b) {             \
    return {_mm256_##name(a.low, b.low), _mm256_##name(a.high, b.high)}; \
  }
LLMOPS_HALVES_PS(add_ps)
LLMOPS_HALVES_PS(sub_ps)
LLMOPS_HALVES_PS(mul_ps)
LLMOPS_HALVES_PS(div_ps)
LLMOPS_HALVES_PS(max_ps)
LLMOPS_HALVES_PS(min_ps)
LLMOPS_HALVES_PS(unpacklo_ps)
LLMOPS_HALVES_PS(unpackhi_ps)

#define LLMOPS_HALVES_INT(name, half)                           \
  LLMOPS_EMULATED __m512i _mm512_##name(__m512i a, __m512i b) { \
    using namespace llmops_emulation;                           \
    return wide(_mm256_##half(as_int(a.low), as_int(b.low)),    \
                _mm256_##half(as_int(a.high), as_int(b.high))); \
  }
LLMOPS_HALVES_INT(and_si512, and_si256)
LLMOPS_HALVES_INT(or_si512, or_si256)
LLMOPS_HALVES_INT(xor_si512, xor_si256)
LLMOPS_HALVES_INT(mul_epu32, mul_epu32)
LLMOPS_HALVES_INT(add_epi32, add_epi32)
LLMOPS_HALVES_INT(add_epi16, add_epi16)
LLMOPS_HALVES_INT(unpacklo_epi16, unpacklo_epi16)
LLMOPS_HALVES_INT(unpackhi_epi16, unpackhi_epi16)
LLMOPS_HALVES_INT(unpacklo_pd, unpacklo_epi64)
LLMOPS_HALVES_INT(unpackhi_pd, unpackhi_epi64)

LLMOPS_EMULATED __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
LLMOPS_EMULATED __m512 _mm512_fnmadd_ps(__m512 a, __m512 b, __m512 c) {
  return {_mm256_fnmadd_ps(a.low, b.low, c.low), _mm256_fnmadd_ps(a.high, b.high, c.high)};
}
LLMOPS_EMULATED __m512 _mm512_sqrt_ps(__m512 a) {
  return {_mm256_sqrt_ps(a.low), _mm256_sqrt_ps(a.high)};
}
LLMOPS_EMULATED __m512 _mm512_abs_ps(__m512 a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.low), _mm256_andnot_ps(sign, a.high)};
}
// imm: 2, the smaller magnitude with a's sign, or 7, the larger with its own. A signalling NaN is
// made quiet, whichever operand it is.
LLMOPS_EMULATED __m512 _mm512_range_ps(__m512 a, __m512 b, int imm) {
  using namespace llmops_emulation;
  if (imm != 2 && imm != 7) __builtin_trap();
  Lanes<float> x = lanes<float>(a);
  const Lanes<float> y = lanes<float>(b);
  const auto signals = [](const float& f) {
    uint32_t bits;
    __builtin_memcpy(&bits, &f, 4);
    return (bits & 0x7fffffffu) > 0x7f800000u && !(bits & 0x400000u);
  };
  for (int i = 0; i < 16; ++i) {
    const float sign = x.at[i];
    const bool less = __builtin_fabsf(y.at[i]) < __builtin_fabsf(x.at[i]);
    if (signals(sign) || signals(y.at[i])) {
      x.at[i] = __builtin_nanf("");
      continue;
    }
    if (x.at[i] != x.at[i] || less == (imm == 2)) x.at[i] = y.at[i];
    if (imm == 2) x.at[i] = __builtin_copysignf(x.at[i], sign);
  }
  return wide(x);
}
// imm: rounding mode and exceptions; a number of fraction bits in its upper half is not emulated.
LLMOPS_EMULATED __m512 _mm512_roundscale_ps(__m512 a, int imm) {
  if (imm >> 4) __builtin_trap();
  return {_mm256_round_ps(a.low, imm), _mm256_round_ps(a.high, imm)};
}
// a less its rounding to an integer; 0 of an infinity.
LLMOPS_EMULATED __m512 _mm512_reduce_ps(__m512 a, int imm) {
  using namespace llmops_emulation;
  if (imm >> 4) __builtin_trap();
  const Lanes<float> x = lanes<float>(a), whole = lanes<float>(_mm512_roundscale_ps(a, imm));
  Lanes<float> out;
  for (int i = 0; i < 16; ++i) out.at[i] = __builtin_isinf(x.at[i]) ? 0.0f : x.at[i] - whole.at[i];
  return wide(out);
}
LLMOPS_EMULATED __m512i _mm512_slli_epi32(__m512i a, unsigned n) {
  using namespace llmops_emulation;
  return wide(_mm256_slli_epi32(as_int(a.low), static_cast<int>(n)),
              _mm256_slli_epi32(as_int(a.high), static_cast<int>(n)));
}
LLMOPS_EMULATED __m512i _mm512_srli_epi32(__m512i a, unsigned n) {
  using namespace llmops_emulation;
  return wide(_mm256_srli_epi32(as_int(a.low), static_cast<int>(n)),
              _mm256_srli_epi32(as_int(a.high), static_cast<int>(n)));
}
LLMOPS_EMULATED __m512i _mm512_slli_epi64(__m512i a, unsigned n) {
  using namespace llmops_emulation;
  return wide(_mm256_slli_epi64(as_int(a.low), static_cast<int>(n)),
              _mm256_slli_epi64(as_int(a.high), static_cast<int>(n)));
}
LLMOPS_EMULATED __m512i _mm512_srli_epi64(__m512i a, unsigned n) {
  using namespace llmops_emulation;
  return wide(_mm256_srli_epi64(as_int(a.low), static_cast<int>(n)),
              _mm256_srli_epi64(as_int(a.high), static_cast<int>(n)));
}

// ---- constants and casts
// -------------------------------------------------------------------------

LLMOPS_EMULATED __m512 _mm512_setzero_ps() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
LLMOPS_EMULATED __m512 _mm512_set1_ps(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
LLMOPS_EMULATED __m512i _mm512_set1_epi32(int x) {
  return llmops_emulation::wide(_mm256_set1_epi32(x), _mm256_set1_epi32(x));
}
LLMOPS_EMULATED __m512i _mm512_set1_epi16(short x) {
  return llmops_emulation::wide(_mm256_set1_epi16(x), _mm256_set1_epi16(x));
}
LLMOPS_EMULATED __m512i _mm512_setr_epi32(int a, int b, int c, int d, int e, int f, int g, int h,
                                          int i, int j, int k, int l, int m, int n, int o, int p) {
  return llmops_emulation::wide(_mm256_setr_epi32(a, b, c, d, e, f, g, h),
                                _mm256_setr_epi32(i, j, k, l, m, n, o, p));
}
// The highest lane comes first.
template <typename... Short>
LLMOPS_EMULATED __m512i _mm512_set_epi16(Short... x) {
  static_assert(sizeof...(x) == 32, "one value per lane");
  const short downward[] = {static_cast<short>(x)...};
  llmops_emulation::Lanes<short> upward;
  for (int i = 0; i < 32; ++i) upward.at[i] = downward[31 - i];
  return llmops_emulation::wide(upward);
}
LLMOPS_EMULATED __m512i _mm512_castps_si512(__m512 a) { return a; }
LLMOPS_EMULATED __m512 _mm512_castsi512_ps(__m512i a) { return a; }
LLMOPS_EMULATED __m512d _mm512_castps_pd(__m512 a) { return a; }
LLMOPS_EMULATED __m512 _mm512_castpd_ps(__m512d a) { return a; }
LLMOPS_EMULATED float _mm512_cvtss_f32(__m512 a) { return _mm256_cvtss_f32(a.low); }

// ---- memory
// --------------------------------------------------------------------------------------

LLMOPS_EMULATED __m512 _mm512_loadu_ps(const void* p) {
  __m512 out;
  __builtin_memcpy(&out, p, 64);
  return out;
}
LLMOPS_EMULATED __m512i _mm512_loadu_si512(const void* p) { return _mm512_loadu_ps(p); }
LLMOPS_EMULATED void _mm512_storeu_ps(void* p, __m512 a) { __builtin_memcpy(p, &a, 64); }
LLMOPS_EMULATED void _mm512_stream_ps(float* p, __m512 a) {
  if (reinterpret_cast<uintptr_t>(p) & 63) __builtin_trap();  // the processor faults as well
  _mm256_stream_ps(p, a.low);
  _mm256_stream_ps(p + 8, a.high);
}
LLMOPS_EMULATED __m512 _mm512_mask_mov_ps(__m512 a, __mmask16 m, __m512 b) {
  using namespace llmops_emulation;
  return {_mm256_blendv_ps(a.low, b.low, as_float(spread_mask(m))),
          _mm256_blendv_ps(a.high, b.high, as_float(spread_mask(m >> 8)))};
}
LLMOPS_EMULATED __m512i _mm512_mask_mov_epi32(__m512i a, __mmask16 m, __m512i b) {
  return _mm512_mask_mov_ps(a, m, b);
}
LLMOPS_EMULATED __m512 _mm512_mask_loadu_ps(__m512 a, __mmask16 m, const void* p) {
  using namespace llmops_emulation;
  const float* x = static_cast<const float*>(p);
  const __m512 loaded = {_mm256_maskload_ps(x, spread_mask(m)),
                         _mm256_maskload_ps(x + 8, spread_mask(m >> 8))};
  return _mm512_mask_mov_ps(a, m, loaded);
}
LLMOPS_EMULATED void _mm512_mask_storeu_ps(void* p, __mmask16 m, __m512 a) {
  using namespace llmops_emulation;
  float* x = static_cast<float*>(p);
  _mm256_maskstore_ps(x, spread_mask(m), a.low);
  _mm256_maskstore_ps(x + 8, spread_mask(m >> 8), a.high);
}
LLMOPS_EMULATED __m512i _mm512_maskz_loadu_epi16(__mmask32 m, const void* p) {
  llmops_emulation::Lanes<short> out = {};
  llmops_emulation::copy_where<32>(out.at, p, m);
  return llmops_emulation::wide(out);
}
LLMOPS_EMULATED __m256i _mm256_maskz_loadu_epi16(__mmask16 m, const void* p) {
  short out[16] = {};
  llmops_emulation::copy_where<16>(out, p, m);
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(out));
}
LLMOPS_EMULATED __m128i _mm_maskz_loadu_epi8(__mmask16 m, const void* p) {
  unsigned char out[16] = {};
  llmops_emulation::copy_where<16>(out, p, m);
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(out));
}
LLMOPS_EMULATED void _mm256_mask_storeu_epi16(void* p, __mmask16 m, __m256i a) {
  short x[16];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(x), a);
  llmops_emulation::copy_where<16>(static_cast<short*>(p), x, m);
}

// ---- comparisons and conversions
// -----------------------------------------------------------------

LLMOPS_EMULATED __mmask16 _mm512_cmplt_epu32_mask(__m512i a, __m512i b) {
  using namespace llmops_emulation;
  const auto less = [](__m256 x, __m256 y) {  // unsigned: a < b where max(a, b) is not a
    const __m256i more = _mm256_cmpeq_epi32(_mm256_max_epu32(as_int(x), as_int(y)), as_int(x));
    return ~_mm256_movemask_ps(_mm256_castsi256_ps(more)) & 0xff;
  };
  return static_cast<__mmask16>(less(a.low, b.low) | less(a.high, b.high) << 8);
}
LLMOPS_EMULATED __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int how) {
  const int low = _mm256_movemask_ps(_mm256_cmp_ps(a.low, b.low, how));
  const int high = _mm256_movemask_ps(_mm256_cmp_ps(a.high, b.high, how));
  return static_cast<__mmask16>(low | high << 8);
}
LLMOPS_EMULATED __mmask16 _mm_test_epi8_mask(__m128i a, __m128i b) {
  const __m128i zero = _mm_cmpeq_epi8(_mm_and_si128(a, b), _mm_setzero_si128());
  return static_cast<__mmask16>(~_mm_movemask_epi8(zero));
}
LLMOPS_EMULATED __m512i _mm512_cvtepu16_epi32(__m256i a) {
  return llmops_emulation::wide(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(a)),
                                _mm256_cvtepu16_epi32(_mm256_extracti128_si256(a, 1)));
}
LLMOPS_EMULATED __m256i _mm512_cvtepi32_epi16(__m512i a) {
  using namespace llmops_emulation;
  return low_halves(as_int(a.low), as_int(a.high));
}
LLMOPS_EMULATED __m512 _mm512_cvtph_ps(__m256i a) {
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(a)),
          _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1))};
}
LLMOPS_EMULATED __m256i _mm512_cvtps_ph(__m512 a, int imm) {
  return _mm256_set_m128i(_mm256_cvtps_ph(a.high, imm), _mm256_cvtps_ph(a.low, imm));
}
// a * 2^floor(b) with one rounding. In double the product is exact: |floor(b)| is held to 300, from
// where every fp32 value has gone to infinity or to less than half the smallest subnormal.
LLMOPS_EMULATED __m512 _mm512_scalef_ps(__m512 a, __m512 b) {
  using namespace llmops_emulation;
  Lanes<float> x = lanes<float>(a);
  const Lanes<float> exponent = lanes<float>(b);
  for (int i = 0; i < 16; ++i) {
    const float e = __builtin_floorf(exponent.at[i]);
    const float held = e < -300.0f ? -300.0f : (e > 300.0f ? 300.0f : e);
    const int64_t bits = static_cast<int64_t>(1023 + static_cast<int>(held == held ? held : 0))
                         << 52;
    double power;
    __builtin_memcpy(&power, &bits, 8);
    if (e != e) power = e;
    if (e == __builtin_inff()) power = __builtin_inf();
    if (e == -__builtin_inff()) power = 0.0;
    x.at[i] = static_cast<float>(x.at[i] * power);
  }
  return wide(x);
}
LLMOPS_EMULATED __m512 _mm512_maskz_scalef_ps(__mmask16 m, __m512 a, __m512 b) {
  return _mm512_mask_mov_ps(_mm512_setzero_ps(), m, _mm512_scalef_ps(a, b));
}

// ---- across lanes
// --------------------------------------------------------------------------------

LLMOPS_EMULATED __m512 _mm512_permutex2var_ps(__m512 a, __m512i index, __m512 b) {
  using namespace llmops_emulation;
  const Lanes<float> x = lanes<float>(a), y = lanes<float>(b);
  const Lanes<int> from = lanes<int>(index);
  Lanes<float> out;
  for (int i = 0; i < 16; ++i) out.at[i] = (from.at[i] & 16 ? y : x).at[from.at[i] & 15];
  return wide(out);
}
LLMOPS_EMULATED __m512i _mm512_permutex2var_epi16(__m512i a, __m512i index, __m512i b) {
  using namespace llmops_emulation;
  const Lanes<short> x = lanes<short>(a), y = lanes<short>(b), from = lanes<short>(index);
  Lanes<short> out;
  for (int i = 0; i < 32; ++i) out.at[i] = (from.at[i] & 32 ? y : x).at[from.at[i] & 31];
  return wide(out);
}
LLMOPS_EMULATED __m256i _mm512_castsi512_si256(__m512i a) { return _mm256_castps_si256(a.low); }
LLMOPS_EMULATED __m256i _mm512_extracti64x4_epi64(__m512i a, int half) {
  return _mm256_castps_si256(half ? a.high : a.low);
}
LLMOPS_EMULATED __m512i _mm512_permutexvar_epi16(__m512i index, __m512i a) {
  return _mm512_permutex2var_epi16(a, index, a);
}
LLMOPS_EMULATED __m512 _mm512_shuffle_f32x4(__m512 a, __m512 b, int imm) {
  return {_mm256_permute2f128_ps(a.low, a.high, (imm & 3) | (imm >> 2 & 3) << 4),
          _mm256_permute2f128_ps(b.low, b.high, (imm >> 4 & 3) | (imm >> 6 & 3) << 4)};
}
// In the order of GCC's own sequence: halves, quarters, pairs.
#define LLMOPS_REDUCE(name, half, quarter)                                            \
  LLMOPS_EMULATED float _mm512_##name(__m512 a) {                                     \
    const __m256 t = half(a.high, a.low);                                             \
    const __m128 u = quarter(_mm256_extractf128_ps(t, 1), _mm256_castps256_ps128(t)); \
    const __m128 v = quarter(u, _mm_shuffle_ps(u, u, 0x4e));                          \
    return _mm_cvtss_f32(quarter(v, _mm_shuffle_ps(v, v, 0xb1)));                     \
  }
LLMOPS_REDUCE(reduce_add_ps, _mm256_add_ps, _mm_add_ps)
LLMOPS_REDUCE(reduce_max_ps, _mm256_max_ps, _mm_max_ps)

// ---- bf16
// ----------------------------------------------------------------------------------------

LLMOPS_EMULATED __m256bh _mm512_cvtneps_pbh(__m512 a) {
  using namespace llmops_emulation;
  return low_halves(round_to_bf16(a.low), round_to_bf16(a.high));
}
// The second operand fills the lower half.
LLMOPS_EMULATED __m512bh _mm512_cvtne2ps_pbh(__m512 a, __m512 b) {
  return llmops_emulation::wide(_mm512_cvtneps_pbh(b), _mm512_cvtneps_pbh(a));
}
// The odd (upper) products are added first.
LLMOPS_EMULATED __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
  using namespace llmops_emulation;
  return {add_pair_products(sum.low, a.low, b.low), add_pair_products(sum.high, a.high, b.high)};
}

#include "amx.h"
