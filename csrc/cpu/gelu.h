// GELU, exact (erf) or in its tanh form, and its backward.
//   y = x Phi(x),   dx = dy (Phi(x) + x Phi'(x))
#pragma once
#include "activation.h"

// Dense runs of n elements, all of one type; kind is gelu or gelu_tanh. `stream`: store past the
// caches (where y is aligned).
LLMOPS_CPU_KERNEL(void, gelu_fwd, llmops::cpu::Activation, llmops::cpu::DType, int64_t n,
                  const void* x, void* y, bool stream)
LLMOPS_CPU_KERNEL(void, gelu_bwd, llmops::cpu::Activation, llmops::cpu::DType, int64_t n,
                  const void* dy, const void* x, void* dx)
