// The machine's limits. What each function is for: limits.h
//
// Ten accumulators cover two units of latency four or five and leave AVX2, with its sixteen
// registers, room for the factors; the read sums into eight, far above what memory delivers.
#include "limits.h"

#include "simd.h"

namespace llmops::cpu::LLMOPS_ISA {
namespace {

constexpr int kAccumulators = 10, kReads = 8;

template <class Step>
LLMOPS_INLINE float repeat(int64_t iterations, Vec a, Vec b, Step step) {
  Vec acc[kAccumulators];
  LLMOPS_UNROLL for (int i = 0; i < kAccumulators; ++i) acc[i] = set1(static_cast<float>(i));
  for (int64_t n = 0; n < iterations; ++n) {
    LLMOPS_UNROLL for (int i = 0; i < kAccumulators; ++i) acc[i] = step(acc[i], a, b);
  }
  Vec sum = zero();
  LLMOPS_UNROLL for (int i = 0; i < kAccumulators; ++i) sum = sum + acc[i];
  return reduce_add(sum);
}

}  // namespace

int64_t fma_peak(bool pairs, int64_t iterations, float* out) {
  if (pairs) {
#ifdef __AVX512BF16__
    *out = repeat(iterations, set1(0.0f), set1(0.0f),
                  [](Vec acc, Vec a, Vec b) { return dot_pairs(a, b, acc); });
    return iterations * kAccumulators * W * 4;
#else
    *out = 0.0f;
    return 0;
#endif
  }
  // acc = acc * 1/2 + 1 tends to 2: neither overflow nor subnormal numbers slow it down.
  *out = repeat(iterations, set1(0.5f), set1(1.0f),
                [](Vec acc, Vec a, Vec b) { return fma(acc, a, b); });
  return iterations * kAccumulators * W * 2;
}

float read_peak(int64_t n, const float* x) {
  Vec acc[kReads];
  LLMOPS_UNROLL for (int j = 0; j < kReads; ++j) acc[j] = zero();
  int64_t i = 0;
  for (; i + kReads * W <= n; i += kReads * W) {
    LLMOPS_UNROLL for (int j = 0; j < kReads; ++j) acc[j] = acc[j] + load(x + i + j * W);
  }
  for (; i < n; i += W) acc[0] = acc[0] + load_n(x + i, n - i < W ? static_cast<int>(n - i) : W);
  Vec sum = zero();
  LLMOPS_UNROLL for (int j = 0; j < kReads; ++j) sum = sum + acc[j];
  return reduce_add(sum);
}

void copy_peak(int64_t n, const float* x, float* y) {
  int64_t i = 0;
  if (reinterpret_cast<uintptr_t>(y) % 64 == 0) {
    for (; i + W <= n; i += W) stream(y + i, load(x + i));
    stream_fence();
  }
  for (; i < n; i += W) {
    const int left = n - i < W ? static_cast<int>(n - i) : W;
    store_n(y + i, load_n(x + i, left), left);
  }
}

}  // namespace llmops::cpu::LLMOPS_ISA
