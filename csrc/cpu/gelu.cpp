// GELU over dense runs. Formulas: gelu.h, activation.h
//
// Elementwise, lanes along the run, two vectors at a time; fp32 with one rounding. About 25
// operations per vector forward, 40 backward (a second exponential, for the density); bf16 with
// AVX-512 20 and 20 (gelu_table.h).
#include "gelu.h"

namespace llmops::cpu::LLMOPS_ISA {
namespace {

template <Activation kind, class T>
LLMOPS_INLINE Vec gradient(Vec dy, Vec x) {
  Vec slope;
  gate_and_slope<kind, T>(x, &slope);
  return dy * slope;
}

template <Activation kind, class T>
LLMOPS_INLINE void forward(int64_t n, const T* x, T* y, bool past_caches) {
  int64_t i = 0;
  if (past_caches) {
    for (; i + 2 * W <= n; i += 2 * W) {
      LLMOPS_UNROLL for (int j = 0; j < 2; ++j) {
        stream(y + i + j * W, activation<kind, T>(load(x + i + j * W)));
      }
    }
    stream_fence();
  }
  for (; i + 2 * W <= n; i += 2 * W) {
    LLMOPS_UNROLL for (int j = 0; j < 2; ++j) {
      store(y + i + j * W, activation<kind, T>(load(x + i + j * W)));
    }
  }
  for (; i < n; i += W) {
    const int left = n - i < W ? static_cast<int>(n - i) : W;
    store_n(y + i, activation<kind, T>(load_n(x + i, left)), left);
  }
}

template <Activation kind, class T>
LLMOPS_INLINE void backward(int64_t n, const T* dy, const T* x, T* dx) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(dx + i, gradient<kind, T>(load(dy + i), load(x + i)));
  const int left = static_cast<int>(n - i);
  if (left > 0) store_n(dx + i, gradient<kind, T>(load_n(dy + i, left), load_n(x + i, left)), left);
}

}  // namespace

void gelu_fwd(Activation kind, DType type, int64_t n, const void* x, void* y, bool stream) {
  const bool past_caches = stream && reinterpret_cast<uintptr_t>(y) % 64 == 0;
  LLMOPS_DISPATCH(type, T, {
    const T* in = static_cast<const T*>(x);
    T* out = static_cast<T*>(y);
    if (kind == Activation::gelu) {
      forward<Activation::gelu>(n, in, out, past_caches);
    } else {
      forward<Activation::gelu_tanh>(n, in, out, past_caches);
    }
  });
}

void gelu_bwd(Activation kind, DType type, int64_t n, const void* dy, const void* x, void* dx) {
  LLMOPS_DISPATCH(type, T, {
    const T *d = static_cast<const T*>(dy), *in = static_cast<const T*>(x);
    if (kind == Activation::gelu) {
      backward<Activation::gelu>(n, d, in, static_cast<T*>(dx));
    } else {
      backward<Activation::gelu_tanh>(n, d, in, static_cast<T*>(dx));
    }
  });
}

}  // namespace llmops::cpu::LLMOPS_ISA
