// Rotary position embedding: each pair (a, b) of a head's first R elements turns by its angle.
//   a' = a cos - b sin,   b' = b cos + a sin        (inverse: the same with -sin)
// Pair i is (x[i], x[i + R/2]) in halves (GPT-NeoX, Llama) or (x[2i], x[2i + 1]) (GPT-J);
// the elements from R on pass through.
#pragma once
#include "isa.h"

namespace llmops::cpu {

struct RopeParams {
  DType type;
  bool interleaved;
  bool inverse;
  int64_t head_dim;  // D
  int64_t rotary;    // R, even, at most D
};

// A run of rows, each one head of one token. Steps are in elements.
struct RopeRows {
  const void* x;  // [rows, D], rows x_step apart, dense within
  void* y;        // the same as x, or memory apart from it
  int64_t x_step, y_step;
  int64_t rows;
  const float* cos;  // table, [*, R/2]; row i of the run uses table row `positions[i]`, or i
  const float* sin;
  int64_t cos_step, sin_step;  // between table rows; 0: every row turns by the same angles
  const int64_t* positions;    // [rows], or null
};

}  // namespace llmops::cpu

LLMOPS_CPU_KERNEL(void, rope_rows, const llmops::cpu::RopeParams&, const llmops::cpu::RopeRows&)
