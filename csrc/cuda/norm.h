// RMS norm and layer norm of rows on CUDA, with the residual addition before them, and their
// gradients.
//   h = x + residual as rounded to its type;  d = h - mean(h) (layer norm) or h
//   z = d rstd,  rstd = 1 / sqrt(mean(d^2) + eps),  y = z (weight + offset) + bias
//   dh = rstd (g - mean(g) - z mean(g z)) + dh_in,  g = dy (weight + offset); no mean(g) in RMS
//   norm dweight = sum over rows of dy z,  dbias = sum over rows of dy
#pragma once
#include "rows.h"

namespace llmops::cuda {

struct NormForward {
  Rows x, residual, y, h;  // [rows, n], dense along n; residual and h: both or none
  Rows weight, bias;       // [n], or none
  int64_t rows, n;
  float eps, offset;
  bool centered, wide;
};
int norm_fwd(const NormForward& p, void* stream);

struct NormBackward {
  Rows dy, h, dh_in, dh, dx;       // [rows, n]; dh_in, dh, dx: or none
  Rows weight;                     // [n], or none
  Rows dweight, dbias;             // [n], or none
  float *weight_sums, *bias_sums;  // [norm_bwd_programs(), n] each, where dweight, dbias are wanted
  int64_t rows, n;
  float eps, offset;
  bool centered, wide;
};
// How many sums of the parameters' gradients are taken side by side; all but the sums is there.
int64_t norm_bwd_programs(const NormBackward& p);
int norm_bwd(const NormBackward& p, void* stream);

}  // namespace llmops::cuda
