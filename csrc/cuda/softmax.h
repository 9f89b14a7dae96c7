// Row softmax on CUDA, with scale, mask and causal limit, and its gradient. No torch here: raw
// pointers in, a cudaError_t as int out.
//   y[r, i] = exp(z[r, i] - max z[r]) / sum_j exp(z[r, j] - max z[r]),  z = scale x + mask
//   dx[r, i] = scale y[r, i] (dy[r, i] - sum_j y[r, j] dy[r, j])
#pragma once
#include "rows.h"

namespace llmops::cuda {

struct SoftmaxForward {
  Rows x, y;  // [rows, n], dense along n
  Rows mask;  // kBool: true keeps; else added; data null: none. Any step.
  int64_t rows, n;
  bool causal;  // row r is query r % queries, and the last one sees all n
  Divisor queries;
  float scale;
  bool wide;
};
// Queued on `stream`; returns at once.
int softmax_fwd(const SoftmaxForward& p, void* stream);

struct SoftmaxBackward {
  Rows dy, y, dx;
  int64_t rows, n;
  float scale;
  bool wide;
};
int softmax_bwd(const SoftmaxBackward& p, void* stream);

}  // namespace llmops::cuda
