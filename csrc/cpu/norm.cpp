// Parameters to fp32 before the rows, and partial parameter gradients to one sum after them.
#include "norm.h"

#include "simd.h"

namespace llmops::cpu::LLMOPS_ISA {
namespace {

template <class T>
LLMOPS_INLINE void widen(int64_t n, const T* in, float offset, float* out) {
  const Vec shift = set1(offset);
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    LLMOPS_UNROLL for (int j = 0; j < 4; ++j) store(out + i + j * W, load(in + i + j * W) + shift);
  }
  for (; i + W <= n; i += W) store(out + i, load(in + i) + shift);
  const int left = static_cast<int>(n - i);
  store_n(out + i, load_n(in + i, left) + shift, left);
}

template <class T>
LLMOPS_INLINE void reduce(int64_t chunks, int64_t n, const float* partials, T* out) {
  for (int64_t i = 0; i < n; i += W) {
    const int left = n - i < W ? static_cast<int>(n - i) : W;
    Vec sum = zero();
    for (int64_t c = 0; c < chunks; ++c) sum = sum + load_n(partials + c * n + i, left);
    store_n(out + i, sum, left);
  }
}

}  // namespace

void norm_widen(DType type, int64_t n, const void* in, float offset, float* out) {
  LLMOPS_DISPATCH(type, T, widen(n, static_cast<const T*>(in), offset, out));
}

void norm_reduce(DType type, int64_t chunks, int64_t n, const float* partials, void* out) {
  LLMOPS_DISPATCH(type, T, reduce(chunks, n, partials, static_cast<T*>(out)));
}

}  // namespace llmops::cpu::LLMOPS_ISA
