// Row softmax with scale, mask and causal limit in one pass over each row; its backward.
//   y[i] = exp(scale * x[i] + mask[i] - m) / sum_j exp(scale * x[j] + mask[j] - m)
//   dx[i] = scale * y[i] * (dy[i] - sum_j y[j] dy[j])
#pragma once
#include "isa.h"

namespace llmops::cpu {

enum class MaskKind : int { none = 0, boolean = 1, additive = 2 };

// One row. The caller walks the rows; strides and broadcasting are its business.
struct SoftmaxRow {
  const void* x;     // [n], dense
  const void* mask;  // [n] dense, or one element when mask_step is 0; null for MaskKind::none
  void* y;           // [n], dense
};

struct SoftmaxParams {
  DType x_type, y_type, mask_type;
  MaskKind mask_kind;
  int64_t mask_step;  // 0 or 1: the mask's stride along the row
  int64_t n;          // row length
  float scale;
  bool zero_if_empty;  // masked or causal: a row with nothing left is zeros, not NaN
};

}  // namespace llmops::cpu

// `valid`: columns from here on are cut off by the causal limit (zero in y, never read in x).
// `scratch`: n floats, used where y cannot hold the intermediate exponentials.
LLMOPS_CPU_KERNEL(void, softmax_fwd_row, const llmops::cpu::SoftmaxParams&,
                  const llmops::cpu::SoftmaxRow&, int64_t valid, float* scratch)

// dx from y and dy, all dense rows of n; `past_caches` writes dx by non-temporal stores.
LLMOPS_CPU_KERNEL(void, softmax_bwd_row, llmops::cpu::DType y_type, llmops::cpu::DType dx_type,
                  int64_t n, float scale, bool past_caches, const void* y, const void* dy, void* dx)
