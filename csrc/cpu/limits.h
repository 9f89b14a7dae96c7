// What the machine can do at best, as `llmops bench` measures it: loops with nothing in them but
// multiply-adds, reads, or reads and writes. Every percentage of a limit divides by these.
#pragma once
#include <stdint.h>

#include "isa.h"

// Multiply-adds of independent accumulators, in registers: `iterations` times over; the flops done.
// pairs: by the bf16 pair product (vdpbf16ps) where this instruction set has it; else 0 flops.
// `out` takes one float, so that nothing can be left out.
LLMOPS_CPU_KERNEL(int64_t, fma_peak, bool pairs, int64_t iterations, float* out)
// Sum of n floats.
LLMOPS_CPU_KERNEL(float, read_peak, int64_t n, const float* x)
// y = x by stores that bypass the caches (plain ones where y is not 64-byte aligned).
LLMOPS_CPU_KERNEL(void, copy_peak, int64_t n, const float* x, float* y)
