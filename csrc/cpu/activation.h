// The activations that swiglu.cpp and gelu.cpp share, and their derivatives, on Vec.
#pragma once
#include "isa.h"

namespace llmops::cpu {

enum class Activation : int { silu = 0, gelu = 1, gelu_tanh = 2 };

}  // namespace llmops::cpu

#ifdef LLMOPS_ISA
#include "simd.h"

namespace llmops::cpu::LLMOPS_ISA {

// silu: x s(x) with s the logistic function. gelu: x Phi(x). gelu_tanh: as gelu with
// Phi(x) = (1 + tanh(u)) / 2 = s(2u), u = sqrt(2 / pi) (x + 0.044715 x^3).
constexpr float kTanhLinear = 1.5957691216f;  // 2 sqrt(2 / pi)
constexpr float kTanhCubic = 1.5957691216f * 0.044715f;

// The factor of x, and where it is a logistic function, what is left of it to 1 without
// cancellation: with e = exp(-argument), gate = 1 / (1 + e) and rest = e gate.
template <Activation kind>
LLMOPS_INLINE Vec gate_of(Vec x, Vec* rest = nullptr) {
  if constexpr (kind == Activation::gelu) {
    return normal_cdf(x);
  } else {
    Vec e;
    if constexpr (kind == Activation::silu) {
      e = exp_minus(x);
    } else {
      const Vec minus_2u = x * fma(x * x, set1(-kLog2e * kTanhCubic), set1(-kLog2e * kTanhLinear));
      const Vec bounded = min(set1(252.0f), max(set1(-252.0f), minus_2u)), n = round(bounded);
      e = exp2_of(n, bounded - n);
    }
    const Vec gate = set1(1.0f) / (set1(1.0f) + e);
    // inf * 0 where gate is 0: min takes its second operand then.
    if (rest != nullptr) *rest = min(e * gate, set1(1.0f));
    return gate;
  }
}

// d/dx (x gate(x)) = gate + x gate'.
template <Activation kind>
LLMOPS_INLINE Vec derivative(Vec x, Vec gate, Vec rest) {
  if constexpr (kind == Activation::gelu) {
    return fma(x, normal_pdf(x), gate);
  } else {
    // gate' = gate (1 - gate) times the derivative of the logistic function's argument. The small
    // factors come first: far out they are 0, and x times the rest may overflow.
    Vec slope = gate * rest * x;
    if constexpr (kind == Activation::gelu_tanh) {
      const Vec w = min(x * x, set1(1e4f));
      slope = slope * fma(w, set1(3.0f * kTanhCubic), set1(kTanhLinear));
    }
    return gate + slope;
  }
}

}  // namespace llmops::cpu::LLMOPS_ISA
#endif
