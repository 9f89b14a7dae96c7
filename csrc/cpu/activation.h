// The activations that swiglu.cpp and gelu.cpp share, and their derivatives, on Vec.
#pragma once
#include "isa.h"

namespace llmops::cpu {

enum class Activation : int { silu = 0, gelu = 1, gelu_tanh = 2 };

}  // namespace llmops::cpu

#ifdef LLMOPS_ISA
#include <type_traits>

#include "gelu_table.h"
#include "simd.h"

namespace llmops::cpu::LLMOPS_ISA {

// silu: x s(x) with s the logistic function. gelu: x Phi(x). gelu_tanh: as gelu with
// Phi(x) = (1 + tanh(u)) / 2 = s(2u), u = sqrt(2 / pi) (x + 0.044715 x^3).
constexpr float kTanhLinear = 1.5957691216f;  // 2 sqrt(2 / pi)
constexpr float kTanhCubic = 1.5957691216f * 0.044715f;

// exp(-argument) of the logistic function. T is what results are rounded to.
template <Activation kind, class T>
LLMOPS_INLINE Vec exponential(Vec x) {
  constexpr bool kNarrow = W == 16 && sizeof(T) == 2;
  if constexpr (kind == Activation::silu) {
    return kNarrow ? exp2_narrow(x * set1(-kLog2e)) : exp_minus(x);
  } else {
    const Vec minus_2u = x * fma(x * x, set1(-kLog2e * kTanhCubic), set1(-kLog2e * kTanhLinear));
    if constexpr (kNarrow) return exp2_narrow(minus_2u);
    const Vec bounded = min(set1(252.0f), max(set1(-252.0f), minus_2u)), n = round(bounded);
    return exp2_of(n, bounded - n);
  }
}

template <class T>
constexpr bool kInPieces = W == 16 && std::is_same_v<T, bf16>;
template <class T>
LLMOPS_INLINE Vec normal_cdf_as(Vec x) {
#ifdef LLMOPS_HAS_PIECES
  if constexpr (kInPieces<T>) return in_pieces(x, kPhi);
#endif
  return normal_cdf(x);
}

// x gate(x).
template <Activation kind, class T>
LLMOPS_INLINE Vec activation(Vec x) {
  if constexpr (kind == Activation::gelu) return x * normal_cdf_as<T>(x);
  return x / (set1(1.0f) + exponential<kind, T>(x));
}

// gate(x), and the derivative of x gate(x) = gate + x gate'.
template <Activation kind, class T>
LLMOPS_INLINE Vec gate_and_slope(Vec x, Vec* slope) {
  if constexpr (kind == Activation::gelu) {
    const Vec gate = normal_cdf_as<T>(x);
#ifdef LLMOPS_HAS_PIECES
    if constexpr (kInPieces<T>) {
      *slope = in_pieces(x, kGeluSlope);
      return gate;
    }
#endif
    *slope = fma(x, normal_pdf(x), gate);
    return gate;
  } else {
    // With e = exp(-argument), gate = 1 / (1 + e), and e gate is what is left of it to 1 without
    // cancellation. inf * 0 where gate is 0: min takes its second operand then.
    const Vec e = exponential<kind, T>(x), gate = set1(1.0f) / (set1(1.0f) + e);
    const Vec rest = min(e * gate, set1(1.0f));
    // gate' = gate (1 - gate) times the derivative of the logistic function's argument. The small
    // factors come first: far out they are 0, and x times the rest may overflow.
    Vec rise = gate * rest * x;
    if constexpr (kind == Activation::gelu_tanh) {
      const Vec w = min(x * x, set1(1e4f));
      rise = rise * fma(w, set1(3.0f * kTanhCubic), set1(kTanhLinear));
    }
    *slope = gate + rise;
    return gate;
  }
}

}  // namespace llmops::cpu::LLMOPS_ISA
#endif
