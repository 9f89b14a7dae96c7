// What rms_norm and layer_norm share: their row arguments, and two helpers around the row kernels.
//   forward   h = x + residual (or x), rounded to h's dtype; y = normalize(h) * weight + bias
//   backward  dh = normalize's gradient (+ the gradient that arrived for h itself), dweight, dbias
// Nothing is saved for the backward: it reads h anyway, and its statistics cost one more sweep of a
// row that is in cache.
#pragma once
#include "isa.h"

namespace llmops::cpu {

struct NormParams {
  DType x_type;         // of x, y and dy
  DType residual_type;  // x_type or f32; forward only
  DType h_type;         // of h, dh: the wider of x_type and residual_type
  int64_t n;            // row length
  float eps;
  const float* weight;  // [n], fp32, offset included; ones when there is none
  const float* bias;    // [n], fp32; zeros when there is none; null for rms_norm
  // Both in x_type instead, in a forward whose x_type has 16 bits; else null.
  const void *narrow_weight, *narrow_bias;
  bool stream;  // outputs go past the caches
};

// `count` rows, each dense, consecutive ones `_step` bytes apart.
struct NormForwardRows {
  const void *x, *residual;  // residual: null without
  void *y, *h;               // h: null without residual
  float* scratch;            // [n]; null without residual
  int64_t x_step, residual_step, y_step, h_step;
  int64_t count;
};

struct NormBackwardRows {
  const void *dy, *h, *dh_in;  // dh_in: gradient of the output h, null without
  void* dh;                    // null when only the parameters' gradients are wanted
  void* dx;                    // dh once more in x's dtype, null unless that differs and is wanted
  float *dweight, *dbias;      // [n] fp32, added to; null when not wanted
  int64_t dy_step, h_step, dh_in_step, dh_step, dx_step;
  int64_t count;
};

}  // namespace llmops::cpu

// out[i] = in[i] + offset in fp32.
LLMOPS_CPU_KERNEL(void, norm_widen, llmops::cpu::DType type, int64_t n, const void* in,
                  float offset, float* out)
// out[i] = sum over the chunks, in order, of partials[c * n + i].
LLMOPS_CPU_KERNEL(void, norm_reduce, llmops::cpu::DType type, int64_t chunks, int64_t n,
                  const float* partials, void* out)
