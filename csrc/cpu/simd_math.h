// exp and its relatives on Vec, in every instruction set. Included by simd.h.
//
// exp2(x) = 2^n * 2^r with n = round(x), |r| <= 1/2, 2^r by a degree-6 minimax polynomial.
// Range: all of fp32; results below 2^-150 (2^-126 with AVX-512, and of exp) are 0, above 2^128 are
// inf; NaN gives NaN.
// Maximum error 1.6 ULP for exp2 on normal results (tests/test_cpu_math.py holds all of these).
#pragma once

namespace llmops::cpu::LLMOPS_ISA {

// p 2^n for p near 1. A subnormal result costs Intel's processors 60 ns a vector, and nobody who
// asks for an exponential here needs it: 0 where n is below -126. AVX2 pays for the comparison,
// which is only worth it where logits are -inf (kMasked).
template <bool kMasked = false>
LLMOPS_INLINE Vec times_power(Vec p, Vec n) {
  if constexpr (W == 16) return scale_by_small_power(p, n);
  if constexpr (!kMasked) return scale_by_power(p, n);
  const Vec least = set1(-126.0f);
  return select(less(n, least), zero(), scale_by_power(p, max(least, n)));
}

LLMOPS_INLINE Vec exp2(Vec x) {
  // Bounds that keep n within scale_by_power; the constant comes first, so that NaN passes.
  x = min(set1(252.0f), max(set1(-252.0f), x));
  const Vec n = round(x), r = x - n;
  Vec p = set1(1.5353362e-4f);
  p = fma(p, r, set1(1.3398874e-3f));
  p = fma(p, r, set1(9.6184373e-3f));
  p = fma(p, r, set1(5.5503324e-2f));
  p = fma(p, r, set1(2.4022648e-1f));
  p = fma(p, r, set1(6.9314720e-1f));
  p = fma(p, r, set1(1.0f));
  return times_power(p, n);
}

// 2^x for x <= 127, as a softmax needs it once its maximum is taken off. Degree 5, relative error
// below 1.7e-7 (1.95e-7 without fma) down to 2^-126; smaller results decay to exactly 0 at x <=
// -127, which is what a masked logit of -inf must give; NaN gives NaN.
LLMOPS_INLINE Vec exp2_softmax(Vec x) {
#if defined(__AVX512F__)
  // 2^floor(x) 2^r, 0 <= r < 1. Without fma that rounds worse than |r| <= 1/2.
  constexpr float kTerms[] = {1.86713013e-3f, 9.01702978e-3f, 5.57999127e-2f,
                              2.40164444e-1f, 6.93151295e-1f, 1.0f};
  const Vec n = x, r = fraction(x);
#else
  constexpr float kTerms[] = {1.32647273e-3f, 9.67151299e-3f, 5.55073358e-2f,
                              2.40222424e-1f, 6.93147004e-1f, 1.0f};
  x = max(set1(-127.0f), x);  // n is held to its range there
  const Vec n = round(x), r = x - n;
#endif
  Vec p = set1(kTerms[0]);
  LLMOPS_UNROLL for (int i = 1; i < 6; ++i) p = fma(p, r, set1(kTerms[i]));
  return scale_by_small_power(p, n);
}

// 2^x for results of 16 bits: relative error 2.6e-6; 0 and infinity in the limits, NaN for NaN.
LLMOPS_INLINE Vec exp2_narrow(Vec x) {
#if defined(__AVX512F__)
  const Vec r = fraction(x);
  Vec p = fma(set1(1.35341679e-2f), r, set1(5.20114606e-2f));
  p = fma(p, r, set1(2.41442757e-1f));
  p = fma(p, r, set1(6.93003834e-1f));
  return scale_by_small_power(fma(p, r, set1(1.00000259f)), x);
#else
  return exp2(x);
#endif
}

// exp(x) = 2^(x log2 e), the product split in two so that its rounding does not show: one fp32
// product of 88 * log2 e would be off by 2^-18 relative.
LLMOPS_INLINE Vec exp(Vec x) {
  x = min(set1(170.0f), max(set1(-170.0f), x));
  const Vec n = round(x * set1(kLog2e));
  Vec r = fnma(n, set1(0.693359375f), x);  // ln 2, high part: n * high is exact
  r = fnma(n, set1(-2.12194440e-4f), r);   // ln 2, low part
  Vec p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = fma(p * r, r, r) + set1(1.0f);
  return times_power<true>(p, n);
}

// 2^(n + r) for an integer-valued n and |r| <= 1/2: the polynomial of exp2 with pairs of terms
// evaluated side by side, for loops that are bound by the latency of one chain.
LLMOPS_INLINE Vec exp2_of(Vec n, Vec r) {
  const Vec r2 = r * r;
  const Vec high = fma(r2, set1(1.5353362e-4f), fma(r, set1(1.3398874e-3f), set1(9.6184373e-3f)));
  const Vec middle = fma(r2, high, fma(r, set1(5.5503324e-2f), set1(2.4022648e-1f)));
  return times_power(fma(r2, middle, fma(r, set1(6.9314720e-1f), set1(1.0f))), n);
}

// exp(-x), reduced by ln 2 in two parts as exp is, the polynomial as in exp2_of: relative error
// below 4e-7; infinity and 0 in the limits, NaN for NaN.
LLMOPS_INLINE Vec exp_minus(Vec x) {
  x = min(set1(170.0f), max(set1(-170.0f), x));
  const Vec n = round(x * set1(-kLog2e));
  const Vec minus_r = fma(n, set1(-2.12194440e-4f), fma(n, set1(0.693359375f), x));
  return exp2_of(n, minus_r * set1(-kLog2e));
}

// 1 / (1 + exp(-x)); 0 and 1 in the limits, NaN for NaN. Maximum error 3.1 ULP on normal results.
LLMOPS_INLINE Vec sigmoid(Vec x) { return set1(1.0f) / (set1(1.0f) + exp_minus(x)); }

// tanh(x), relative error below 3e-7; -1 and 1 in the limits, NaN for NaN. Near 0, where the
// exponentials would cancel, an odd polynomial (Cephes' tanhf).
LLMOPS_INLINE Vec tanh(Vec x) {
  const Vec w = x * x, size = abs(x);
  Vec p = set1(-5.70498872745e-3f);
  p = fma(p, w, set1(2.06390887954e-2f));
  p = fma(p, w, set1(-5.37397155531e-2f));
  p = fma(p, w, set1(1.33314422036e-1f));
  p = fma(p, w, set1(-3.33332819422e-1f));
  const Vec near = fma(p * w, x, x);
  const Vec e = exp_minus(size + size);
  const Vec far = (set1(1.0f) - e) / (set1(1.0f) + e);
  return select(less(size, set1(0.625f)), near, select(less(x, zero()), zero() - far, far));
}

// x^2, with AVX-512 and 2^-120 more, for sums in which that is nothing: see times_power.
LLMOPS_INLINE Vec square_of(Vec x) { return W < 16 ? x * x : fma(x, x, set1(0x1p-120f)); }

// The standard normal distribution Phi(x) = (1 + erf(x / sqrt 2)) / 2.
//
// 1/2 + x P(x^2) / Q(x^2), degrees 5 and 5, a minimax fit on |x| <= 5.35; beyond, where Phi is 0 or
// 1 to half an fp32 ulp of 1, exactly those. Maximum absolute error 1.6e-7 (tests/test_gelu.py),
// relative error 1e-4 at -3; NaN for NaN.
LLMOPS_INLINE Vec normal_cdf(Vec x) {
  const Vec c = min(set1(5.35f), max(set1(-5.35f), x)), w = square_of(c);
  Vec p = set1(2.3621467e-8f), q = set1(1.2255599e-6f);
  p = fma(p, w, set1(6.3891521e-6f));
  q = fma(q, w, set1(7.2500137e-5f));
  p = fma(p, w, set1(1.6413580e-4f));
  q = fma(q, w, set1(1.8577662e-3f));
  p = fma(p, w, set1(4.6501090e-3f));
  q = fma(q, w, set1(2.8356738e-2f));
  p = fma(p, w, set1(3.3323579e-2f));
  q = fma(q, w, set1(2.5019565e-1f));
  p = fma(p, w, set1(3.9894223e-1f));
  q = fma(q, w, set1(1.0f));
  // Rounding may take it an ulp below 0.
  return max(zero(), set1(0.5f) + c * p / q);
}

// The standard normal density exp(-x^2 / 2) / sqrt(2 pi).
LLMOPS_INLINE Vec normal_pdf(Vec x) {
  return set1(0.3989422804f) * exp2(square_of(x) * set1(-0.5f * kLog2e));
}

// Scalar versions by the same code, for the few places outside the vector loops.
LLMOPS_INLINE float exp2_scalar(float x) { return first_lane(exp2(set1(x))); }
LLMOPS_INLINE float exp_scalar(float x) { return first_lane(exp(set1(x))); }

}  // namespace llmops::cpu::LLMOPS_ISA
