// What the kernels of attention's backward share: which queries and keys see each other, the step
// from a strip of scores and dP to P and dS, and the products before and after it.
//
// A warp holds strips of 16 rows of a resident tile against 16 or 32 of one that passes by:
// queries in rows and keys in columns where dQ is summed, keys in rows where dK and dV are. Lane l
// has of each 16 x 8 the elements [l / 4 (+ 8)][l % 4 * 2 (+ 1)]. What comes out is rounded in
// registers and is the first factor of the next products: P and dS never go through memory.
//
// Plain scores are raw q . k, the scale and log2 e folded into the exponent; modified ones are
// natural logits (attention_tile.h says why). A probability is exp(s - lse) as the forward left
// lse.
#pragma once

#include "attention_bwd.h"
#include "attention_tile.h"

namespace llmops::cuda {

// The resident tile's rows, the passing one's, and how many of those are on their way or in use.
// Two blocks share a multiprocessor of sm_80 and sm_90 up to D 128; 99 KiB are the least there is.
template <int kDim>
struct BackwardShape {
  static constexpr int kHeld = 64;
  static constexpr int kPassing = kDim <= 96 ? 64 : 32;
  static constexpr int kStages = kDim <= 128 ? 2 : 1;
  static_assert(4 * kDim * (kHeld + kStages * kPassing) + 12 * kStages * kPassing <= 99 << 10,
                "what a block may have on every GPU from sm_80 on, with three numbers of a row");
};
// [begin, end): what any row of a tile sees; the tile's first row is `first`, of `count`.
struct Span {
  int begin, end;
};
// The keys that the queries [first, first + count) see.
__device__ __forceinline__ Span keys_of(const Attention& p, int first, int count) {
  const int last = min(first + count, static_cast<int>(p.queries)) - 1;
  return {key_start(p, first), key_limit(p, last)};
}
// The queries that see any of the keys [first, first + count); each of them sees one at least.
__device__ __forceinline__ Span queries_of(const Attention& p, int first, int count) {
  const int queries = static_cast<int>(p.queries), shift = static_cast<int>(p.keys - p.queries);
  const int last = min(first + count, static_cast<int>(p.keys)) - 1;
  Span s{0, queries};
  if (p.right >= 0) s.begin = clamped(first - shift - static_cast<int>(p.right), 0, queries);
  if (p.left >= 0) s.end = clamped(last - shift + static_cast<int>(p.left) + 1, 0, queries);
  return s;
}

// Query t sees keys with -left <= key - t - shift <= right.
struct Limits {
  int shift, left, right;
  __device__ __forceinline__ explicit Limits(const Attention& p)
      : shift(static_cast<int>(p.keys - p.queries)),
        left(p.left < 0 ? static_cast<int>(kAttentionTokens) * 2 : static_cast<int>(p.left)),
        right(p.right < 0 ? static_cast<int>(kAttentionTokens) * 2 : static_cast<int>(p.right)) {}
  __device__ __forceinline__ bool sees(int query, int key) const {
    const int distance = key - query - shift;
    return distance >= -left && distance <= right;
  }
  // Whether any, and whether all of a rectangle see each other.
  __device__ __forceinline__ bool any(int query, int queries, int key, int keys) const {
    return key - (query + queries - 1) - shift <= right && key + keys - 1 - query - shift >= -left;
  }
  __device__ __forceinline__ bool all(int query, int queries, int key, int keys) const {
    return key - (query + queries - 1) - shift >= -left && key + keys - 1 - query - shift <= right;
  }
};

// The modifiers of one query head.
struct ScoreHead {
  uint32_t plane = 0;  // batch * Hq + head
  float slope = 0.0f;
  int64_t mask_at = 0;

  __device__ __forceinline__ ScoreHead(const Attention& p, int batch, int head)
      : plane(static_cast<uint32_t>(batch * p.heads + head)),
        mask_at(batch * p.mask_stride[0] + head * p.mask_stride[1]) {
    if (p.slopes) slope = load(p.slopes + batch * p.slope_stride[0] + head * p.slope_stride[1]);
  }
};

// q . k of a query and a key that see each other, as a natural logit, and the soft cap's
// derivative. As Attend::modify of attention_tile.h.
__device__ __forceinline__ float modified_score(const Attention& p, const ScoreHead& of, int query,
                                                int key, float product, float& derivative) {
  float s = product * p.scale;
  derivative = 1.0f;
  if (p.softcap != 0.0f) {
    const float t = hyperbolic_tangent(s * (1.0f / p.softcap));
    s = p.softcap * t;
    derivative = 1.0f - t * t;
  }
  if (p.slopes) {
    const int distance = key - query - static_cast<int>(p.keys - p.queries);
    s -= of.slope * static_cast<float>(distance < 0 ? -distance : distance);
  }
  if (p.mask.data) {
    const float m = element(p.mask, of.mask_at + query * p.mask_stride[2] + key * p.mask_stride[3]);
    // Compared, not only added: a dropped key stays dropped where its score is inf or NaN.
    if (p.mask.type == kBool ? m == 0.0f : m == -INFINITY) {
      s = -INFINITY;
    } else if (p.mask.type != kBool) {
      s += m;
    }
  }
  return s;
}

struct RowStats {
  float lse, delta, norm;
};

// s [16, kColumns] and dp, products of q with k and of dout with v, become P as it multiplied v and
// dS, before the soft cap (kOfMask: after it, which is the gradient of a mask). The strip's first
// query and key are `query` and `key`; stats(h, n, i): of the query of an element. Queries and keys
// beyond the last have zeros in the tiles: whatever comes of them adds nothing, or is not stored.
template <bool kModified, bool kQueriesInRows, bool kOfMask, int kTiles, class Stats>
__device__ __forceinline__ void to_gradients(const Attention& p, const Limits& limits,
                                             const ScoreHead& of, int query, int key, bool whole,
                                             const Stats& stats, float (&s)[kTiles][4],
                                             float (&dp)[kTiles][4]) {
  const int row = lane_of_warp() / 4, column = lane_of_warp() % 4 * 2;
  const float factor = p.scale * kLog2e;
  [[maybe_unused]] uint32_t words[4] = {};
  [[maybe_unused]] uint64_t seed = 0;
  if (kModified && p.dropout.active) seed = load(p.dropout.seed);
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = row + i / 2 * 8, c = column + n * 8 + i % 2;
      const int own_query = query + (kQueriesInRows ? r : c),
                own_key = key + (kQueriesInRows ? c : r);
      const RowStats of_row = stats(i / 2, c);
      if constexpr (!kModified) {
        float weight = exp2_approx(fmaf(s[n][i], factor, -of_row.lse));
        if (!whole && (own_key >= p.keys || !limits.sees(own_query, own_key))) weight = 0.0f;
        s[n][i] = weight;
        dp[n][i] = weight * (dp[n][i] - of_row.delta);
      } else {
        const bool seen =
            own_query < p.queries && own_key < p.keys && (whole || limits.sees(own_query, own_key));
        float derivative = 1.0f, weight = 0.0f;
        if (seen) {
          const float logit = modified_score(p, of, own_query, own_key, s[n][i], derivative);
          weight = exp2_approx((logit - of_row.lse) * kLog2e) * of_row.norm;
        }
        float kept = weight;
        if (p.dropout.active) {
          // Neighbouring keys of a query share their words, where the lane has both.
          if (!kQueriesInRows || i % 2 == 0 || own_key % 4 == 0) {
            words[0] = static_cast<uint32_t>(own_key) / 4;
            words[1] = static_cast<uint32_t>(own_query);
            words[2] = of.plane;
            words[3] = 0;
            philox(seed, words);
          }
          const uint32_t low = own_key & 1 ? words[1] : words[0];
          const uint32_t high = own_key & 1 ? words[3] : words[2];
          const bool drop = (own_key & 2 ? high : low) < p.dropout.below;
          kept = drop ? 0.0f : weight * p.dropout.scale;
          dp[n][i] = drop ? 0.0f : dp[n][i] * p.dropout.scale;
        }
        s[n][i] = kept;
        dp[n][i] = weight * (dp[n][i] - of_row.delta);
        if (!kOfMask && p.softcap != 0.0f) dp[n][i] *= derivative;
      }
    }
  }
}

// s [16, 8 kTiles] += rows of a from `row` on times rows of b from `column` on, transposed.
template <class A, class B, int kTiles>
__device__ __forceinline__ void multiply_rows(float (&s)[kTiles][4], const A& a, int row,
                                              const B& b, int column) {
  // Of wide tiles not all at once: ptxas reads ahead as far as it sees, and spills.
  constexpr int kAhead = A::kColumns <= 64 ? A::kColumns / 16 : 4;
#pragma unroll(kAhead)
  for (int k = 0; k < A::kColumns; k += 16) {
    uint32_t left[4];
    load_a(left, a, row, k);
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
      uint32_t right[4];
      load_b(right, b, column + 8 * n, k);
      mma_pair<typename A::T>(s[n], s[n + 1], left, right);
    }
  }
}
// sums [16, 8 kTiles] += s [16, 8 kSteps], rounded, times rows of b from `row` on, its columns from
// `column` on.
template <class B, int kTiles, int kSteps>
__device__ __forceinline__ void add_products(float (&sums)[kTiles][4], const float (&s)[kSteps][4],
                                             const B& b, int row, int column) {
#pragma unroll
  for (int k = 0; k < kSteps; k += 2) {
    uint32_t left[4];
    a_of<typename B::T>(left, s[k], s[k + 1]);
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
      uint32_t right[4];
      load_b_transposed(right, b, row + 8 * k, column + 8 * n);
      mma_pair<typename B::T>(sums[n], sums[n + 1], left, right);
    }
  }
}

// The lane's part of a [16, 8 kTiles] times `factor` to rows `to` (null: not there) and `to_8`,
// from `column` on, of `columns`.
template <class T, int kTiles>
__device__ __forceinline__ void store_rows(T* to, T* to_8, const float (&sums)[kTiles][4],
                                           float factor, int column, int columns) {
  const bool pairs = (reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(to_8)) % 4 == 0;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    const int at = column + 8 * n + lane_of_warp() % 4 * 2;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      T* const row = h ? to_8 : to;
      if (!row || at >= columns) continue;
      const float low = sums[n][2 * h] * factor, high = sums[n][2 * h + 1] * factor;
      if (pairs && at + 1 < columns) {
        store(reinterpret_cast<uint32_t*>(row + at), pack(low, high, T{}));
      } else {
        store(row + at, from_float<T>(low));
        if (at + 1 < columns) store(row + at + 1, from_float<T>(high));
      }
    }
  }
}

// f(T{}, a constant, a constant) of the type, the head dim's tile and whether scores are modified.
template <class F>
void with_backward_form(const Attention& p, const F& f) {
  const int64_t dim = p.dim > p.dim_v ? p.dim : p.dim_v;
  const auto formed = [&](auto type, auto tile) {
    if (attention_bwd_modified(p)) {
      f(type, tile, Constant<1>{});
    } else {
      f(type, tile, Constant<0>{});
    }
  };
  const auto typed = [&](auto type) {
    if (dim <= 64) {
      formed(type, Constant<64>{});
    } else if (dim <= 96) {
      formed(type, Constant<96>{});
    } else if (dim <= 128) {
      formed(type, Constant<128>{});
    } else {
      formed(type, Constant<256>{});
    }
  };
  if (p.type == kBf16) {
    typed(__nv_bfloat16{});
  } else {
    typed(__half{});
  }
}

// A block for every Shape::kHeld of `held` rows in each of `planes`.
template <class Shape, class Kernel>
int launch_tiles(Kernel kernel, int64_t held, int64_t planes, const AttentionBackward& b,
                 void* stream) {
  const int64_t grid = (held + Shape::kHeld - 1) / Shape::kHeld * planes;
  if (grid == 0) return 0;
  if (grid > kMostBlocks) return static_cast<int>(cudaErrorInvalidValue);
  if (const int error = allow_shared(kernel, Shape::kBytes)) return error;
  LLMOPS_LAUNCH(kernel, static_cast<unsigned>(grid), Shape::kThreads, Shape::kBytes,
                static_cast<cudaStream_t>(stream), b);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace llmops::cuda
