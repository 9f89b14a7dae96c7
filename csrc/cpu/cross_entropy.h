// Cross-entropy of one row of logits x [n] with target t, and its gradient.
//   lse    = log sum_j exp(x[j])
//   nll    = lse - x[t]
//   smooth = sum_j w[j] (lse - x[j])
//   dx[j]  = a exp(x[j] - lse) - b [j == t] - c w[j]
// What a row's loss and a, b, c are is the binding's business (class weights, label smoothing,
// z-loss, reduction).
#pragma once
#include "isa.h"

namespace llmops::cpu {

// fp64: the losses are differences of these. The gradient needs more of lse than fp32 holds: half
// an ulp of 20 is an error of 1e-6 in every exp(x - lse).
struct CrossEntropyRow {
  double lse, nll, smooth;
};

// `rest` is a - b - c w[t], without the rounding that the differences would bring in.
struct CrossEntropyGrad {
  double lse, a, rest, c;
  int64_t target;
};

}  // namespace llmops::cpu

// x: n elements, dense. `smooth` is only computed where asked for; `weight` [n], null for all ones,
// only counts there.
LLMOPS_CPU_KERNEL(llmops::cpu::CrossEntropyRow, cross_entropy_fwd_row, llmops::cpu::DType type,
                  int64_t n, const void* x, int64_t target, bool smooth, const float* weight)

// dx may be x. `past_caches` writes dx by non-temporal stores. `weight`: null for all ones.
LLMOPS_CPU_KERNEL(void, cross_entropy_bwd_row, llmops::cpu::DType type, int64_t n, const void* x,
                  const llmops::cpu::CrossEntropyGrad& grad, const float* weight, bool past_caches,
                  void* dx)
