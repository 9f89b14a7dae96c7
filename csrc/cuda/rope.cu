// Rotary position embedding. Formula: rope.h
//
// A block takes one token: all heads of q and of k, so that its row of cos and sin is read once
// from memory. A thread turns eight pairs at a time by 16-byte accesses, or one. Elements past R
// are copied (in place: not touched). Each element is read and written by one thread, so in place
// needs no order. A position outside the tables, which a GPU cannot report, turns into NaN and
// reads nothing. fp32 inside, rounded once; 2 accesses per element. Su et al., "RoFormer", 2021.
#include "rope.h"

#include "tile.h"

namespace llmops::cuda {
namespace {

constexpr int kThreads = 128;

// kWidth neighbours from `at` on, of the tensor's type.
template <int kWidth>
__device__ __forceinline__ void read(const Rows& r, int64_t at, float* v) {
  if constexpr (kWidth == 1) {
    v[0] = element(r, at);
  } else if (r.type == kF32) {
    load_8(static_cast<const float*>(r.data) + at, v);
  } else {
    load_8(static_cast<const uint16_t*>(r.data) + at, r.type == kBf16, v);
  }
}
template <int kWidth>
__device__ __forceinline__ void write(const Rows& r, int64_t at, const float* v) {
  if constexpr (kWidth == 1) {
    set_element(r, at, v[0]);
  } else if (r.type == kF32) {
    store_8(static_cast<float*>(r.data) + at, v);
  } else {
    store_8(static_cast<uint16_t*>(r.data) + at, r.type == kBf16, v);
  }
}

// kWidth pairs from `pair` on, of a head that begins at x_at and y_at.
template <int kWidth>
__device__ __forceinline__ void turn(const Rope& p, const Rows& x, const Rows& y, int64_t x_at,
                                     int64_t y_at, int64_t pair, const float* cos,
                                     const float* sin) {
  float v[2 * kWidth], a[kWidth], b[kWidth];
  // Interleaved, 2 kWidth neighbours hold the pairs; else kWidth here and kWidth half a row on.
  const int64_t first = p.interleaved ? 2 * pair : pair;
  const int64_t second = p.interleaved ? first + kWidth : pair + p.half;
  read<kWidth>(x, x_at + first, v);
  read<kWidth>(x, x_at + second, v + kWidth);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    a[i] = p.interleaved ? v[2 * i] : v[i];
    b[i] = p.interleaved ? v[2 * i + 1] : v[kWidth + i];
  }
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    const float c = cos[i], s = p.inverse ? -sin[i] : sin[i];
    const float turned = a[i] * c - b[i] * s, other = b[i] * c + a[i] * s;
    if (p.interleaved) {
      v[2 * i] = turned, v[2 * i + 1] = other;
    } else {
      v[i] = turned, v[kWidth + i] = other;
    }
  }
  write<kWidth>(y, y_at + first, v);
  write<kWidth>(y, y_at + second, v + kWidth);
}

template <int kWidth>
__device__ __forceinline__ void turn_heads(const Rope& p, const RopeHeads& h, int64_t b, int64_t t,
                                           int64_t position) {
  const bool known = position >= 0 && position < p.table_rows;
  const float* cos_row = p.cos + b * p.cos_batch + (known ? position : 0) * p.cos_row;
  const float* sin_row = p.sin + b * p.sin_batch + (known ? position : 0) * p.sin_row;
  const Rows x{const_cast<void*>(h.x), p.type}, y{h.y, p.type};
  const int64_t x_at = b * h.x_strides[0] + t * h.x_strides[2];
  const int64_t y_at = b * h.y_strides[0] + t * h.y_strides[2];
  // One token's elements are fewer than 2^31: the binding says so.
  const int units = static_cast<int>(p.half) / kWidth, heads = static_cast<int>(h.heads);
  for (int unit = threadIdx.x; unit < heads * units; unit += kThreads) {
    const int head = unit / units, pair = unit % units * kWidth;
    float c[kWidth], s[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) c[i] = s[i] = __uint_as_float(0x7fc00000u);
    if (known && kWidth == 8) {
      load_8(cos_row + pair, c);
      load_8(sin_row + pair, s);
    } else if (known) {
      c[0] = load(cos_row + pair);
      s[0] = load(sin_row + pair);
    }
    turn<kWidth>(p, x, y, x_at + head * h.x_strides[1], y_at + head * h.y_strides[1], pair, c, s);
  }
  if (p.in_place) return;
  const int turned = 2 * static_cast<int>(p.half), rest = static_cast<int>(p.dim) - turned;
  for (int i = threadIdx.x; i < heads * rest; i += kThreads) {
    const int head = i / rest, column = turned + i % rest;
    set_element(y, y_at + head * h.y_strides[1] + column,
                element(x, x_at + head * h.x_strides[1] + column));
  }
}

template <int kWidth>
__global__ void __launch_bounds__(kThreads, 1) rope_kernel(Rope p) {
  for (int64_t at = blockIdx.x; at < p.batch * p.tokens; at += gridDim.x) {
    const int64_t b = divided(at, p.of_tokens), t = at - b * p.tokens;
    int64_t position = t;
    if (p.ids) {
      const int64_t id = b * p.ids_batch + t * p.ids_token;
      position = p.ids_64 ? load(static_cast<const int64_t*>(p.ids) + id)
                          : load(static_cast<const int32_t*>(p.ids) + id);
    }
    turn_heads<kWidth>(p, p.q, b, t, position);
    turn_heads<kWidth>(p, p.k, b, t, position);
  }
}

}  // namespace

int rope(const Rope& p, void* stream) {
  if (p.batch * p.tokens * p.dim * (p.q.heads + p.k.heads) == 0) return 0;
  const auto s = static_cast<cudaStream_t>(stream);
  const unsigned grid = grid_of(p.batch * p.tokens);
  if (p.wide) {
    LLMOPS_LAUNCH(rope_kernel<8>, grid, kThreads, 0, s, p);
  } else {
    LLMOPS_LAUNCH(rope_kernel<1>, grid, kThreads, 0, s, p);
  }
  return static_cast<int>(cudaGetLastError());
}

}  // namespace llmops::cuda
