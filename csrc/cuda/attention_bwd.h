// Attention's gradients on CUDA, in the deterministic split form: no atomics, the same bits in
// every run. Formula: csrc/cpu/attention.h, whose names the members have.
#pragma once
#include "attention.h"

namespace llmops::cuda {

// Strides in elements. The last dimension of every tensor but dlse is dense.
struct AttentionBackward {
  Attention of;           // q, k, v, out and lse are read; no plan
  const void* grad_out;   // [B, Hq, Tq, Dv]
  const float* grad_lse;  // [B, Hq, Tq] by its strides, or null
  int64_t grad_out_stride[3], grad_lse_stride[3];
  bool wide_grad;  // grad_out can be read in 16-byte accesses; k and v are told apart
  bool wide_k, wide_v;
  void *dq, *dk, *dv;  // [B, Hq, Tq, D], [B, Hkv, Tk, D], [B, Hkv, Tk, Dv]
  int64_t dq_stride[3], dk_stride[3], dv_stride[3];
  // Of each row, made first, [B, Hq, Tq], contiguous: its log-sum-exp in the unit of the exponent,
  // +inf where it saw nothing; dout . out - dlse; what is left to multiply P by, 1 unless lse is
  // too large to resolve the sum it holds beside the maximum (null where scores are plain).
  float *row_lse, *row_delta, *row_norm;
  float* row_sink;  // what each row adds to its head's dsink, [B, Hq, Tq]
  float* dsinks;    // [Hq], or null; row_sink with it
  float* dmask;     // fp32, contiguous, of the mask's own sizes; or null
  int64_t dmask_size[4];
};

// Whether scores are modified beyond a usual scale and a limit of keys.
inline bool attention_bwd_modified(const Attention& p) {
  const bool plain = p.scale >= -kLargestPlainScale && p.scale <= kLargestPlainScale;
  return !plain || p.softcap != 0.0f || p.slopes || p.mask.data || p.dropout.active;
}
int attention_bwd(const AttentionBackward& p, void* stream);

// The parts of attention_bwd: dK and dV; dQ; the gradient of an additive mask.
int attention_bwd_dkdv(const AttentionBackward& p, void* stream);
int attention_bwd_dq(const AttentionBackward& p, void* stream);
int attention_dmask(const AttentionBackward& p, void* stream);

}  // namespace llmops::cuda
