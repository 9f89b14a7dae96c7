// Root-mean-square norm over dense rows, with an optional residual added first; its backward.
//   r = 1 / sqrt(mean(h^2) + eps)          y[i] = h[i] r w[i]
//   g[i] = dy[i] w[i]                      dh[i] = r (g[i] - h[i] r^2 mean(g h))
//   dw[i] = sum over rows of dy[i] h[i] r
#pragma once
#include "norm.h"

LLMOPS_CPU_KERNEL(void, rms_norm_fwd, const llmops::cpu::NormParams&,
                  const llmops::cpu::NormForwardRows&)
LLMOPS_CPU_KERNEL(void, rms_norm_bwd, const llmops::cpu::NormParams&,
                  const llmops::cpu::NormBackwardRows&)
