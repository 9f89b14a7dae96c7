// What the attention operators share: one forward and one backward over equal or unequal sequences.
#pragma once
#include <tuple>

#include "attention_checks.h"
#include "cpu/attention.h"

namespace llmops {

// Sequences of unequal lengths: the first five members of each are the caller's, checked to lie in
// the tensors; the plans and the tasks are made here.
struct UnequalSequences {
  bool packed;  // all in one batch item of q, k and v, which are [1, H, total, D]
  std::vector<cpu::AttentionSequence> sequences;
  int64_t page = 0;  // k and v are [blocks, Hkv, page, D], where it is not 0
  std::vector<cpu::AttentionTask> tasks;
};

// q [B, Hq, Tq, D], k [B, Hkv, Tk, D], v [B, Hkv, Tk, Dv]. `unequal` null: all alike.
std::tuple<Tensor, Tensor> attention_forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                             const std::optional<Tensor>& mask, bool causal,
                                             double scale, const AttentionModifiers& modifiers,
                                             UnequalSequences* unequal);

// dq, dk, dv, dmask where it is asked for, dsinks where there are sinks.
using AttentionGradients =
    std::tuple<Tensor, Tensor, Tensor, std::optional<Tensor>, std::optional<Tensor>>;
AttentionGradients attention_backward(const Tensor& grad_out, const std::optional<Tensor>& grad_lse,
                                      const Tensor& q, const Tensor& k, const Tensor& v,
                                      const std::optional<Tensor>& mask, const Tensor& out,
                                      const Tensor& lse, bool causal, double scale,
                                      bool need_mask_grad, const AttentionModifiers& modifiers,
                                      UnequalSequences* unequal);

}  // namespace llmops
