// Gated activations, SwiGLU and GEGLU, and their backward.
//   y = act(gate) up,   act(g) = g a(g) with a the logistic function, Phi, or Phi's tanh form
//   dgate = dy up act'(gate),   dup = dy act(gate)
#pragma once
#include "activation.h"

// Dense runs of n elements, all of one type. `stream`: store past the caches (where y is aligned).
LLMOPS_CPU_KERNEL(void, glu_fwd, llmops::cpu::Activation, llmops::cpu::DType, int64_t n,
                  const void* gate, const void* up, void* y, bool stream)
LLMOPS_CPU_KERNEL(void, glu_bwd, llmops::cpu::Activation, llmops::cpu::DType, int64_t n,
                  const void* dy, const void* gate, const void* up, void* dgate, void* dup)
