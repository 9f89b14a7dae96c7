// Draws one token from a row of logits: temperature, top-k, top-p, min-p, then the inverse of the
// cumulative distribution in token order, at a given uniform number.
#pragma once
#include "isa.h"

namespace llmops::cpu {

struct SampleParams {
  float temperature;  // 0: the first maximum, nothing else is looked at
  int64_t top_k;      // 0: all
  float top_p;        // 1: all
  float min_p;        // 0: all
};

// Instead of a token, where the row has no distribution.
constexpr int64_t kSampleNan = -1, kSampleEmpty = -2, kSampleInfinite = -3;
// Floats of scratch for a row of n.
constexpr int64_t sample_scratch(int64_t n) { return 4 * n + 64; }

}  // namespace llmops::cpu

// n logits, dense, 0 < n < 2^31; uniform in [0, 1). Returns the token or one of the codes above.
LLMOPS_CPU_KERNEL(int64_t, sample_row, const llmops::cpu::SampleParams&, llmops::cpu::DType,
                  int64_t n, const void* logits, double uniform, float* scratch)
