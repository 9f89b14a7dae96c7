// y = x W^T + b for few rows of x: a product whose cost is to read W.
//   y[r][n] = sum_k x[r][k] w[n][k] + bias[n]
#pragma once
#include "isa.h"

namespace llmops::cpu {

struct LinearParams {
  DType type;  // of x, w, bias and y
  int64_t rows, k;
  const void* w;     // [N, k], rows w_stride elements apart
  const void* bias;  // [N], dense; or null
  void* y;           // [rows, N], rows y_stride elements apart
  int64_t w_stride, y_stride;
};

}  // namespace llmops::cpu

// x's rows as the kernel wants them: floats of scratch for `rows` rows, and the copy. Rows of x are
// x_stride elements apart and dense.
LLMOPS_CPU_KERNEL(int64_t, linear_scratch, llmops::cpu::DType, int64_t rows, int64_t k)
LLMOPS_CPU_KERNEL(void, linear_pack, llmops::cpu::DType, int64_t rows, int64_t k, const void* x,
                  int64_t x_stride, float* packed)
// Columns [begin, end) of y. The bits of a column do not depend on begin and end.
LLMOPS_CPU_KERNEL(void, linear_fwd, const llmops::cpu::LinearParams&, const float* packed,
                  int64_t begin, int64_t end)
