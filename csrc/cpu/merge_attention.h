// Merging two partial attentions over disjoint keys, row by row (n elements and one log-sum-exp).
//   lse = log(exp(lse_a) + exp(lse_b)),  w_x = exp(lse_x - lse),  out = w_a out_a + w_b out_b
//   backward: dout_x = w_x dout,  dlse_x = w_x (dlse + dout . (out_x - out))
#pragma once
#include "isa.h"

LLMOPS_CPU_KERNEL(void, merge_attention_fwd_row, llmops::cpu::DType, int64_t n, const void* out_a,
                  float lse_a, const void* out_b, float lse_b, void* out, float* lse)
LLMOPS_CPU_KERNEL(void, merge_attention_bwd_row, llmops::cpu::DType, int64_t n, const void* out_a,
                  float lse_a, const void* out_b, float lse_b, const void* grad_out, float grad_lse,
                  void* grad_a, float* grad_lse_a, void* grad_b, float* grad_lse_b)
