// Cross-entropy of logits and class indices on CUDA, and its gradient, also over the logits
// themselves.
//   lse = log sum_j exp(x_j)
//   loss = (1 - s) w_t (lse - x_t) + (s / C) sum_j w_j (lse - x_j) + z lse^2
//   dx_j = a exp(x_j - lse) - b [j = t] - c w_j
#pragma once
#include "rows.h"

namespace llmops::cuda {

enum Reduction : int { kNone = 0, kMean = 1, kSum = 2 };

struct CrossEntropy {
  Rows x;              // [rows, n]
  const void* target;  // [rows], int64 or int32, dense
  bool target_64;
  const float* weight;  // [n] or null
  double* lse;          // [rows]; 0 where the target is ignored
  int64_t rows, n, ignore_index;
  double smoothing, uniform, z_loss;  // uniform: smoothing / n, 0 where n is
  int reduction;
  bool wide;
};

struct CrossEntropyForward {
  CrossEntropy of;
  Rows loss;       // kNone: one of each row; else one
  double* losses;  // [rows], where the reduction is not kNone
};
int cross_entropy_fwd(const CrossEntropyForward& p, void* stream);

struct CrossEntropyBackward {
  CrossEntropy of;
  Rows grad;               // one of each row, or one
  const double* grad_lse;  // [rows] or null
  double* scales;          // [3], scratch: see cross_entropy_scales_kernel
  Rows dx;                 // [rows, n]; may be x
};
int cross_entropy_bwd(const CrossEntropyBackward& p, void* stream);

}  // namespace llmops::cuda
