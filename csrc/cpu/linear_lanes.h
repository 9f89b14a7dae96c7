// linear's product for 13 to 64 rows of x (AVX2: 128), by FMAs: y^T = W x^T, a lane to each row.
//
// Too many rows for dot products, each of which ends in a reduction, and too few to pay for packing
// W: x is packed once, W is read as it lies. A tile of R rows of weights by V vectors of rows of x,
// R V = 24 (AVX2: 12), stays in registers; a step of k broadcasts R weights to V vectors: R + V
// loads for R V FMAs, of which AVX-512 does two each a cycle. Sums begin anew with each kSteps, and
// are added up. 16-bit weights are widened kSteps at a time, into L1.
#pragma once
#include "linear.h"
#include "simd.h"

namespace llmops::cpu::LLMOPS_ISA {
namespace {

constexpr int64_t kMostLanes = W == 16 ? 64 : 128;  // rows of x
constexpr int kGroupVecs = W == 16 ? 4 : 2;         // of them in one tile, at most
constexpr int kGroup = kGroupVecs * W;
constexpr int kMostWeights = W == 16 ? 12 : 6;  // rows in one tile
constexpr int64_t kSteps = 256;

// 16-bit weights are widened first: at 17 to 20 rows AVX2's dot products are ahead, below level.
template <class T>
LLMOPS_INLINE bool takes_lanes(int64_t rows) {
  constexpr int64_t kFewest = W == 8 && sizeof(T) < sizeof(float) ? 21 : 13;
  return W > 1 && rows >= kFewest && rows <= kMostLanes;
}
LLMOPS_INLINE int64_t lanes_of(int64_t rows) { return (rows + W - 1) / W * W; }

// out [groups][k][kGroup, or what is left]; zeros where x ends.
template <class T>
LLMOPS_INLINE void pack_lanes(const T* x, int64_t x_stride, int64_t rows, int64_t k, float* out) {
  for (int64_t first = 0; first < rows; first += W) {
    const int64_t group = first / kGroup * kGroup, left = lanes_of(rows) - group;
    const int64_t width = left < kGroup ? left : kGroup;
    float* const to = out + group * k + (first - group);
    for (int64_t d = 0; d < k; d += W) {
      const int steps = static_cast<int>(k - d < W ? k - d : W);
      Vec r[W];
      LLMOPS_UNROLL for (int i = 0; i < W; ++i) {
        r[i] = first + i < rows ? load_n(x + (first + i) * x_stride + d, steps) : zero();
      }
      transpose(r);
      LLMOPS_UNROLL for (int i = 0; i < W; ++i) {
        if (i < steps) store(to + (d + i) * width, r[i]);
      }
    }
  }
}

// sums [R][kGroup] += w x over `depth` steps of k. What is read next of the weights as they lie, of
// these rows of `source` that end after `left` steps or of those below them, is fetched ahead.
template <int R, int V, class T>
LLMOPS_NOINLINE void lanes_tile(const float* w, int64_t stride, const T* source,
                                int64_t source_stride, int64_t depth, int64_t left, const float* x,
                                float* sums) {
  Vec acc[R][V];
  LLMOPS_UNROLL for (int i = 0; i < R; ++i) {
    LLMOPS_UNROLL for (int j = 0; j < V; ++j) acc[i][j] = zero();
  }
  const auto step = [&](int64_t d) __attribute__((always_inline)) {
    Vec rows[V];
    LLMOPS_UNROLL for (int j = 0; j < V; ++j) rows[j] = load(x + (d * V + j) * W);
    LLMOPS_UNROLL for (int i = 0; i < R; ++i) {
      const Vec each = set1(w[i * stride + d]);
      LLMOPS_UNROLL for (int j = 0; j < V; ++j) acc[i][j] = fma(each, rows[j], acc[i][j]);
    }
  };
  // Of weights that are widened, what is read next is the next kSteps.
  constexpr int64_t kLine = 16, kAhead = sizeof(T) == sizeof(float) ? 4 * kLine : kSteps;
  int64_t d = 0;
  for (; d + kLine <= depth; d += kLine) {
    const T* const ahead = source + d + kAhead + (d + kAhead < left ? 0 : R * source_stride - left);
    LLMOPS_UNROLL for (int i = 0; i < R; ++i) __builtin_prefetch(ahead + i * source_stride);
    for (int64_t e = d; e < d + kLine; ++e) step(e);
  }
  for (; d < depth; ++d) step(d);
  LLMOPS_UNROLL for (int i = 0; i < R; ++i) {
    LLMOPS_UNROLL for (int j = 0; j < V; ++j) {
      float* const sum = sums + i * kGroup + j * W;
      store(sum, load(sum) + acc[i][j]);
    }
  }
}

// y's columns [column, column + count) of the group of rows from `row` on; sums [count][kGroup].
template <class T>
LLMOPS_INLINE void store_lanes(const LinearParams& p, const float* sums, int64_t row,
                               int64_t column, int count) {
  const T* const bias = static_cast<const T*>(p.bias);
  const Vec added = bias ? load_n(bias + column, count) : zero();
  for (int64_t end = p.rows - row < kGroup ? p.rows : row + kGroup; row < end;
       row += W, sums += W) {
    T* const y = static_cast<T*>(p.y) + row * p.y_stride + column;
    Vec r[W];
    LLMOPS_UNROLL for (int i = 0; i < W; ++i) r[i] = i < count ? load(sums + i * kGroup) : zero();
    transpose(r);
    LLMOPS_UNROLL for (int i = 0; i < W; ++i) {
      if (row + i < end) store_n(y + i * p.y_stride, r[i] + added, count);
    }
  }
}

// V vectors of rows in each group but the last, which may have one.
template <class T, int V>
LLMOPS_NOINLINE void run_lanes(const LinearParams& p, const float* packed, int64_t begin,
                               int64_t end) {
  constexpr int R = V == 1 ? kMostWeights : kGroupVecs * 6 / V;
  constexpr int64_t kGroups = (kMostLanes + kGroup - 1) / kGroup;
  const T* const weights = static_cast<const T*>(p.w);
  alignas(64) float sums[kGroups * R * kGroup], wide[R * kSteps];
  // The last rows of weights, where they do not fill a tile, are read with those before them.
  const bool direct = sizeof(T) == sizeof(float) && end >= R;
  for (int64_t n = begin; n < end; n += R) {
    const int count = static_cast<int>(end - n < R ? end - n : R);
    const int64_t from = direct ? n + count - R : n;
    for (float& sum : sums) sum = 0.0f;
    for (int64_t k = 0; k < p.k; k += kSteps) {
      const int64_t depth = p.k - k < kSteps ? p.k - k : kSteps;
      const T* const w = weights + from * p.w_stride + k;
      for (int i = 0; i < (direct ? 0 : count); ++i) {
        const T* const from_row = w + i * p.w_stride;
        float* const to_row = wide + i * kSteps;
        int64_t d = 0;
        for (; d + W <= depth; d += W) store(to_row + d, load(from_row + d));
        if (d < depth) store(to_row + d, load_n(from_row + d, static_cast<int>(depth - d)));
      }
      const float* const rows = direct ? reinterpret_cast<const float*>(w) : wide;
      const int64_t stride = direct ? p.w_stride : kSteps;
      for (int64_t row = 0; row < p.rows; row += kGroup) {
        const float* const x = packed + row * p.k;
        float* const to = sums + row * R;
        if (V == 1 || p.rows - row > W) {
          lanes_tile<R, V>(rows, stride, w, p.w_stride, depth, p.k - k, x + k * V * W, to);
        } else {
          lanes_tile<R, 1>(rows, stride, w, p.w_stride, depth, p.k - k, x + k * W, to);
        }
      }
    }
    for (int64_t row = 0; row < p.rows; row += kGroup)
      store_lanes<T>(p, sums + row * R + (n - from) * kGroup, row, n, count);
  }
}

template <class T>
LLMOPS_INLINE void linear_by_lanes(const LinearParams& p, const float* packed, int64_t begin,
                                   int64_t end) {
  if constexpr (kGroupVecs == 2) return run_lanes<T, 2>(p, packed, begin, end);
  if (p.rows <= W) return run_lanes<T, 1>(p, packed, begin, end);
  if (p.rows <= 2 * W) return run_lanes<T, 2>(p, packed, begin, end);
  if (p.rows <= 3 * W) return run_lanes<T, 3>(p, packed, begin, end);
  run_lanes<T, 4>(p, packed, begin, end);
}

}  // namespace
}  // namespace llmops::cpu::LLMOPS_ISA
