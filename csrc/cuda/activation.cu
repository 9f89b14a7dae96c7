// gelu, swiglu and geglu, forward and backward. Formulas: activation.h
//
// Elementwise: a warp takes 512 elements of a short row, a block of 256 threads 4096 of a long one.
// The logistic function is made of exp(-|x|) alone: nothing overflows, and neither s nor 1 - s is a
// difference, so both keep their relative precision far out. fp32 inside, rounded once; 2 accesses
// per element of gelu forward and 3 backward, 3 and 5 of the gated forms.
#include "activation.h"

#include "tile.h"

namespace llmops::cuda {
namespace {

struct Value {
  float value, slope;  // act(x), act'(x)
};

// s(x) and 1 - s(x).
__device__ __forceinline__ void logistic(float x, float& s, float& rest) {
  const float e = expf(-fabsf(x));
  const float larger = 1.0f / (1.0f + e), smaller = e * larger;
  s = x < 0.0f ? smaller : larger;
  rest = x < 0.0f ? larger : smaller;
}

template <int kActivation>
__device__ __forceinline__ Value activated(float x) {
  float s, rest;
  if constexpr (kActivation == kSilu) {
    logistic(x, s, rest);
    return {x * s, s * (1.0f + x * rest)};
  } else if constexpr (kActivation == kGelu) {
    s = 0.5f + 0.5f * erff(x * 0.7071067811865476f);
    return {x * s, s + x * (0.3989422804014327f * expf(-0.5f * x * x))};
  } else {
    logistic(1.5957691216057308f * (x + 0.044715f * x * x * x), s, rest);
    // s (1 - s) is 0 beyond 12, where the square overflows in the end: no 0 times infinity.
    const float near = x < -12.0f ? -12.0f : (x > 12.0f ? 12.0f : x);
    const float inner = 1.5957691216057308f + 0.2140644488178072f * near * near;
    return {x * s, s + s * rest * near * inner};
  }
}

// f(values) of the activation known at run time; the choice is outside the loop over elements.
template <class F>
__device__ __forceinline__ void with_activation(int activation, const F& f) {
  if (activation == kSilu) {
    f([](float x) { return activated<kSilu>(x); });
  } else if (activation == kGelu) {
    f([](float x) { return activated<kGelu>(x); });
  } else {
    f([](float x) { return activated<kGeluTanh>(x); });
  }
}

template <int kThreads>
__global__ void __launch_bounds__(kBlock<kThreads>, kBlocks<kThreads, kThreads == 32 ? 96 : 80>)
    activation_fwd_kernel(ActivationForward p, Tiles tiles) {
  using T = Tile<kThreads>;
  const int thread = threadIdx.x % kThreads;
  for_tiles<kThreads>(tiles, [&](int64_t row, int64_t begin) {
    const int64_t n = p.n - begin;
    float g[T::kHeld], u[T::kHeld];
    T::read(p.gate, place_of(p.gate, row) + begin, n, p.wide, thread, g, 0.0f);
    if (p.up.data) T::read(p.up, place_of(p.up, row) + begin, n, p.wide, thread, u, 0.0f);
    with_activation(p.activation, [&](auto act) {
#pragma unroll
      for (int i = 0; i < T::kHeld; ++i) g[i] = act(g[i]).value;
    });
    if (p.up.data) {
#pragma unroll
      for (int i = 0; i < T::kHeld; ++i) g[i] *= u[i];
    }
    T::write(p.y, place_of(p.y, row) + begin, n, p.wide, thread, g);
  });
}

template <int kThreads>
__global__ void __launch_bounds__(kBlock<kThreads>, kBlocks<kThreads, kThreads == 32 ? 160 : 128>)
    activation_bwd_kernel(ActivationBackward p, Tiles tiles) {
  using T = Tile<kThreads>;
  const int thread = threadIdx.x % kThreads;
  for_tiles<kThreads>(tiles, [&](int64_t row, int64_t begin) {
    const int64_t n = p.n - begin;
    float d[T::kHeld], g[T::kHeld], u[T::kHeld];
    T::read(p.dy, place_of(p.dy, row) + begin, n, p.wide, thread, d, 0.0f);
    T::read(p.gate, place_of(p.gate, row) + begin, n, p.wide, thread, g, 0.0f);
    if (p.up.data) {
      T::read(p.up, place_of(p.up, row) + begin, n, p.wide, thread, u, 0.0f);
    } else {
#pragma unroll
      for (int i = 0; i < T::kHeld; ++i) u[i] = 1.0f;
    }
    with_activation(p.activation, [&](auto act) {
#pragma unroll
      for (int i = 0; i < T::kHeld; ++i) {
        const Value v = act(g[i]);
        g[i] = d[i] * u[i] * v.slope;
        u[i] = d[i] * v.value;
      }
    });
    T::write(p.dgate, place_of(p.dgate, row) + begin, n, p.wide, thread, g);
    if (p.dup.data) T::write(p.dup, place_of(p.dup, row) + begin, n, p.wide, thread, u);
  });
}

}  // namespace

int activation_fwd(const ActivationForward& p, void* stream) {
  if (p.rows == 0 || p.n == 0) return 0;
  const auto s = static_cast<cudaStream_t>(stream);
  with_tiles(p.rows, p.n, [&](auto threads, unsigned grid, const Tiles& tiles) {
    constexpr int kThreads = decltype(threads)::value;
    LLMOPS_LAUNCH(activation_fwd_kernel<kThreads>, grid, kBlock<kThreads>, 0, s, p, tiles);
  });
  return static_cast<int>(cudaGetLastError());
}

int activation_bwd(const ActivationBackward& p, void* stream) {
  if (p.rows == 0 || p.n == 0) return 0;
  const auto s = static_cast<cudaStream_t>(stream);
  with_tiles(p.rows, p.n, [&](auto threads, unsigned grid, const Tiles& tiles) {
    constexpr int kThreads = decltype(threads)::value;
    LLMOPS_LAUNCH(activation_bwd_kernel<kThreads>, grid, kBlock<kThreads>, 0, s, p, tiles);
  });
  return static_cast<int>(cudaGetLastError());
}

}  // namespace llmops::cuda
