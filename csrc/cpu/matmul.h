// y = a b + bias, for products large enough that their flops are the cost.
//   y[i][j] = sum_k a[i][k] b[k][j] + bias[j]
// a and b are any 2-D views that are dense in one dimension: x W^T, dy W and dy^T x alike.
#pragma once
#include "isa.h"

namespace llmops::cpu {

// One operand: element (outer, k) at data + outer * outer_step + k * k_step, one of the steps 1.
struct MatmulOperand {
  const void* data;
  int64_t outer_step, k_step;
};

struct MatmulParams {
  DType type;  // of a, b, bias and y
  int64_t m, n, k;
  MatmulOperand a, b;  // outer: rows of y; columns of y
  const void* bias;    // [n], dense; or null
  void* y;             // [m, n], rows y_stride elements apart
  int64_t y_stride;
  bool add = false;   // to what y holds, which then is fp32
  bool wide = false;  // y is fp32 and the others 16 bits: with AMX alone
  int parts = 3;      // of eight bits that fp32 by AMX counts of each element
  bool past = false;  // with AMX: y, aligned to vectors, is stored past the caches
};

// How the work is cut: a panel of columns of b is packed once, in strips, and multiplied by one
// block of rows of a after the other. Neither depends on the number of threads.
struct MatmulPlan {
  int64_t panel, strip, block;  // columns, columns, rows
  int64_t strip_floats;         // of a packed strip; 0: a block packs what it needs itself
  int64_t scratch_floats;       // that a block works in
};

}  // namespace llmops::cpu

LLMOPS_CPU_KERNEL(llmops::cpu::MatmulPlan, matmul_plan, const llmops::cpu::MatmulParams&)
// Columns [column, column + strip) of b into `out`.
LLMOPS_CPU_KERNEL(void, matmul_pack, const llmops::cpu::MatmulParams&, int64_t column, float* out)
// y's rows [row, row + block) of the panel that begins at `column` and ends at `end`, whose strips
// are in `packed` one behind the other.
LLMOPS_CPU_KERNEL(void, matmul_block, const llmops::cpu::MatmulParams&, int64_t column, int64_t end,
                  const float* packed, int64_t row, float* scratch)
