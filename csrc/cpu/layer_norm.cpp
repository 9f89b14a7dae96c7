// Layer norm, add + layer norm and their backward: the row loops shared by the norms, with
// centering. Formula: layer_norm.h
#include "layer_norm.h"

#include "norm_backward.h"
#include "norm_forward.h"

namespace llmops::cpu::LLMOPS_ISA {

void layer_norm_fwd(const NormParams& p, const NormForwardRows& rows) {
  norm_forward<true>(p, rows);
}

void layer_norm_bwd(const NormParams& p, const NormBackwardRows& rows) {
  norm_backward<true>(p, rows);
}

}  // namespace llmops::cpu::LLMOPS_ISA
