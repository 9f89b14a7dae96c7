// RMS norm, add + RMS norm and their backward: the row loops shared by the norms, without
// centering. Formula: rms_norm.h
#include "rms_norm.h"

#include "norm_backward.h"
#include "norm_forward.h"

namespace llmops::cpu::LLMOPS_ISA {

void rms_norm_fwd(const NormParams& p, const NormForwardRows& rows) {
  norm_forward<false>(p, rows);
}

void rms_norm_bwd(const NormParams& p, const NormBackwardRows& rows) {
  norm_backward<false>(p, rows);
}

}  // namespace llmops::cpu::LLMOPS_ISA
