// Layer norm over dense rows, with an optional residual added first; its backward.
//   m = mean(h), r = 1 / sqrt(mean((h - m)^2) + eps), z = (h - m) r      y[i] = z[i] w[i] + b[i]
//   g[i] = dy[i] w[i]                      dh[i] = r (g[i] - mean(g) - z[i] mean(g z))
//   dw[i] = sum over rows of dy[i] z[i]    db[i] = sum over rows of dy[i]
#pragma once
#include "norm.h"

LLMOPS_CPU_KERNEL(void, layer_norm_fwd, const llmops::cpu::NormParams&,
                  const llmops::cpu::NormForwardRows&)
LLMOPS_CPU_KERNEL(void, layer_norm_bwd, const llmops::cpu::NormParams&,
                  const llmops::cpu::NormBackwardRows&)
