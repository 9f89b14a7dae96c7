// A warp's share of attention: which keys its rows see, their scores and what modifies them, and
// the online softmax step from a tile of keys and one of values to the sums it holds in registers.
//
// A lane holds the scores of rows lane / 4 and lane / 4 + 8 of each 16 rows, of two neighbouring
// keys in eight: rows are reduced over four lanes. Plain scores are the raw q . k, with the scale
// in the exponent's factor; modified ones are natural logits, because an additive mask may hold
// the lowest finite number, which times log2 e would be -inf.
#pragma once

#include "attention_block.h"

namespace llmops::cuda {

// tanh, to 2 ulp: a polynomial near 0, where the other form would cancel. Cephes.
__device__ __forceinline__ float hyperbolic_tangent(float x) {
  const float z = x * x, size = fabsf(x);
  float near = fmaf(-5.70498872745e-3f, z, 2.06390887954e-2f);
  near = fmaf(fmaf(near, z, -5.37397155531e-2f), z, 1.33314422036e-1f);
  near = fmaf(fmaf(near, z, -3.33332819422e-1f) * z, x, x);
  const float far = 1.0f - 2.0f / (exp2_approx(2.0f * kLog2e * size) + 1.0f);
  return size < 0.625f ? near : (x < 0.0f ? -far : far);
}

// Philox-4x32-10 of (key / 4, query, batch * Hq + head, 0), the seed its key: word key % 4 belongs
// to the key, on every backend. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011.
__device__ __forceinline__ void philox(uint64_t seed, uint32_t (&c)[4]) {
  auto k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = static_cast<uint64_t>(c[0]) * 0xd2511f53u;
    const uint64_t b = static_cast<uint64_t>(c[2]) * 0xcd9e8d57u;
    c[0] = static_cast<uint32_t>(b >> 32) ^ c[1] ^ k0;
    c[1] = static_cast<uint32_t>(b);
    c[2] = static_cast<uint32_t>(a >> 32) ^ c[3] ^ k1;
    c[3] = static_cast<uint32_t>(a);
    k0 += 0x9e3779b9u;
    k1 += 0xbb67ae85u;
  }
}

// What the rows of a lane see and how they are modified.
template <int kTiles, bool kModified>
struct LaneRows {
  static constexpr int kNoRow = -(1 << 30), kNoBound = (1 << 30) - 1;
  int token[kTiles][2];  // kNoRow where there is none
  // Of the warp's rows: keys that any sees, keys that every one does. `stop`: the block's end.
  int begin, end, full_begin, full_end, stop;
  // Where modified:
  uint32_t plane[kTiles][2];  // batch * Hq + head
  float slope[kTiles][2];
  int64_t mask_at[kTiles][2];

  // `row`: the warp's first, of the block.
  __device__ __forceinline__ void set(const Attention& p, const QueryBlock& b, int row) {
    stop = b.end;
    begin = full_end = stop;
    end = full_begin = 0;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int own = b.first + row + 16 * t + lane_of_warp() / 4 + 8 * h;
        token[t][h] = kNoRow;
        if (kModified) plane[t][h] = 0, slope[t][h] = 0.0f, mask_at[t][h] = 0;
        if (own >= b.last) continue;
        const RowPlace at = row_place(p, b, own);
        token[t][h] = at.token;
        const int start = key_start(p, at.token), limit = key_limit(p, at.token);
        begin = min(begin, start);
        end = max(end, min(limit, stop));
        full_begin = max(full_begin, start);
        full_end = min(full_end, limit);
        if (!kModified) continue;
        plane[t][h] = static_cast<uint32_t>(b.batch * p.heads + at.head);
        if (p.slopes)
          slope[t][h] = load(p.slopes + b.batch * p.slope_stride[0] + at.head * p.slope_stride[1]);
        mask_at[t][h] =
            b.batch * p.mask_stride[0] + at.head * p.mask_stride[1] + at.token * p.mask_stride[2];
      }
    }
    for (int distance = 4; distance < 32; distance *= 2) {
      begin = min(begin, __shfl_xor_sync(kAllLanes, begin, distance));
      end = max(end, __shfl_xor_sync(kAllLanes, end, distance));
      full_begin = max(full_begin, __shfl_xor_sync(kAllLanes, full_begin, distance));
      full_end = min(full_end, __shfl_xor_sync(kAllLanes, full_end, distance));
    }
  }
  __device__ __forceinline__ bool sees(const Attention& p, int t, int h, int key) const {
    const int shift = static_cast<int>(p.keys - p.queries);
    const int least = p.left < 0 ? -kNoBound : shift - static_cast<int>(p.left);
    const int most = p.right < 0 ? kNoBound : shift + static_cast<int>(p.right);
    const int distance = key - token[t][h];
    return key < stop && distance >= least && distance <= most;
  }
};

// A warp's 16 kTiles rows over tiles of keys, of which it takes kKeys at a time.
template <class T, int kDim, int kTiles, int kKeys, bool kModified>
struct Attend {
  using Lane = LaneRows<kTiles, kModified>;
  float out[kTiles][kDim / 8][4];
  // Of what was seen: the largest score, and the sum of exponentials over this lane's keys.
  float top[kTiles][2], total[kTiles][2];

  __device__ static __forceinline__ float factor(const Attention& p) {
    return kModified ? kLog2e : p.scale * kLog2e;
  }

  // `with_sink`: this is the warp that counts the sink, as a key of value 0.
  __device__ __forceinline__ void clear(const Attention& p, const QueryBlock& b, int row,
                                        bool with_sink) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) out[t][n][i] = 0.0f;
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        top[t][h] = -INFINITY, total[t][h] = 0.0f;
        if (!kModified || !with_sink || !p.sinks) continue;
        const int own = b.first + row + 16 * t + lane_of_warp() / 4 + 8 * h;
        if (own < b.last) top[t][h] = load(p.sinks + row_place(p, b, own).head);
        // One lane of the four that share the row has it in its sum.
        if (top[t][h] != -INFINITY && lane_of_warp() % 4 == 0) total[t][h] = 1.0f;
      }
    }
  }

  // The keys from `key` on, which lie at row `at` of the tiles and on; q at row `q_row`.
  template <class QTile, class KTile, class VTile>
  __device__ __forceinline__ void step(const Attention& p, const Lane& rows, const QTile& q,
                                       int q_row, const KTile& k, const VTile& v, int at, int key) {
    if (key >= rows.end || key + kKeys <= rows.begin) return;
    float s[kTiles][kKeys / 8][4] = {};
    // Of wide tiles not all at once: ptxas would read ahead as far as it sees, and spill.
    constexpr int kAhead = kDim <= 96 ? kDim / 16 : 4;
#pragma unroll(kAhead)
    for (int d = 0; d < kDim; d += 16) {
      uint32_t a[kTiles][4];
#pragma unroll
      for (int t = 0; t < kTiles; ++t) load_a(a[t], q, q_row + 16 * t, d);
#pragma unroll
      for (int n = 0; n < kKeys; n += 16) {
        uint32_t b[4];
        load_b(b, k, at + n, d);
#pragma unroll
        for (int t = 0; t < kTiles; ++t) mma_pair<T>(s[t][n / 8], s[t][n / 8 + 1], a[t], b);
      }
    }
    if constexpr (kModified) modify(p, rows, key, s);
    if (key < rows.full_begin || key + kKeys > rows.full_end) cut(p, rows, key, s);
    weigh(factor(p), s);
    if constexpr (kModified) {
      if (p.dropout.active) drop(p, rows, key, s);
    }
#pragma unroll
    for (int n = 0; n < kKeys; n += 16) {
      uint32_t a[kTiles][4];
#pragma unroll
      for (int t = 0; t < kTiles; ++t) a_of<T>(a[t], s[t][n / 8], s[t][n / 8 + 1]);
#pragma unroll
      for (int d = 0; d < kDim; d += 16) {
        uint32_t b[4];
        load_b_transposed(b, v, at + n, d);
#pragma unroll
        for (int t = 0; t < kTiles; ++t) mma_pair<T>(out[t][d / 8], out[t][d / 8 + 1], a[t], b);
      }
    }
  }

  // f(t, h, n, i, key) of each score that the lane holds: rows (t, h), element i of fragment n.
  template <class F>
  __device__ static __forceinline__ void for_scores(int key, const F& f) {
    const int first = key + lane_of_warp() % 4 * 2;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) f(t, i / 2, n, i, first + 8 * n + i % 2);
      }
    }
  }

  // -inf where a row does not see the key.
  __device__ static __forceinline__ void cut(const Attention& p, const Lane& rows, int key,
                                             float (&s)[kTiles][kKeys / 8][4]) {
    for_scores(key, [&](int t, int h, int n, int i, int own) {
      if (!rows.sees(p, t, h, own)) s[t][n][i] = -INFINITY;
    });
  }

  // Products to natural logits. The modifiers are uniform branches: a kernel for each set of them
  // would be compiled 64 times.
  __device__ static __forceinline__ void modify(const Attention& p, const Lane& rows, int key,
                                                float (&s)[kTiles][kKeys / 8][4]) {
    const float scale = p.scale;
    for_scores(key, [&](int t, int, int n, int i, int) { s[t][n][i] *= scale; });
    if (p.softcap != 0.0f) {
      const float cap = p.softcap, reciprocal = 1.0f / cap;
      for_scores(key, [&](int t, int, int n, int i, int) {
        s[t][n][i] = cap * hyperbolic_tangent(s[t][n][i] * reciprocal);
      });
    }
    if (p.slopes) {
      const int shift = static_cast<int>(p.keys - p.queries);
      for_scores(key, [&](int t, int h, int n, int i, int own) {
        const int distance = own - rows.token[t][h] - shift;
        s[t][n][i] -= rows.slope[t][h] * static_cast<float>(distance < 0 ? -distance : distance);
      });
    }
    if (p.mask.data) {
      for_scores(key, [&](int t, int h, int n, int i, int own) {
        if (!rows.sees(p, t, h, own)) return;
        const float m = element(p.mask, rows.mask_at[t][h] + own * p.mask_stride[3]);
        // Compared, not only added: a dropped key stays dropped where its score is inf or NaN.
        if (p.mask.type == kBool ? m == 0.0f : m == -INFINITY) {
          s[t][n][i] = -INFINITY;
        } else if (p.mask.type != kBool) {
          s[t][n][i] += m;
        }
      });
    }
  }

  // Scores to weights relative to the largest so far; what was summed before is scaled to it.
  __device__ __forceinline__ void weigh(float factor, float (&s)[kTiles][kKeys / 8][4]) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float next = s[t][0][2 * h];
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n)
          next = fmaxf(next, fmaxf(s[t][n][2 * h], s[t][n][2 * h + 1]));
        next = fmaxf(top[t][h], quad_max(next));
        // Nothing seen yet: not -inf - -inf.
        const float shift = next == -INFINITY ? 0.0f : next;
        const float before = exponential(top[t][h], shift, factor);
        top[t][h] = next;
        total[t][h] *= before;
#pragma unroll
        for (int n = 0; n < kDim / 8; ++n)
          out[t][n][2 * h] *= before, out[t][n][2 * h + 1] *= before;
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
          for (int i = 2 * h; i < 2 * h + 2; ++i) {
            s[t][n][i] = exponential(s[t][n][i], shift, factor);
            total[t][h] += s[t][n][i];
          }
        }
      }
    }
  }
  // A logit of the lowest finite number is subtracted before it is multiplied.
  __device__ static __forceinline__ float exponential(float s, float top, float factor) {
    return exp2_approx(kModified ? (s - top) * factor : fmaf(s, factor, -top * factor));
  }

  // Dropped weights are zeros in the product with v; the sum has all of them.
  __device__ static __forceinline__ void drop(const Attention& p, const Lane& rows, int key,
                                              float (&s)[kTiles][kKeys / 8][4]) {
    const uint64_t seed = load(p.dropout.seed);
    uint32_t words[4] = {};
    for_scores(key, [&](int t, int h, int n, int i, int own) {
      if (i % 2 == 0 || own % 4 == 0) {  // else the words are those of the key before
        words[0] = static_cast<uint32_t>(own) / 4;
        words[1] = static_cast<uint32_t>(rows.token[t][h]);
        words[2] = rows.plane[t][h];
        words[3] = 0;
        philox(seed, words);
      }
      const uint32_t low = own & 1 ? words[1] : words[0], high = own & 1 ? words[3] : words[2];
      if ((own & 2 ? high : low) < p.dropout.below) s[t][n][i] = 0.0f;
    });
  }

  // The largest logit of a row, natural.
  __device__ __forceinline__ float top_logit(const Attention& p, int t, int h) const {
    return kModified ? top[t][h] : top[t][h] * p.scale;
  }
  // A row's log-sum-exp, and what its values are multiplied by.
  __device__ __forceinline__ void finish(const Attention& p, int t, int h, float& lse,
                                         float& weight) const {
    const float sum = quad_sum(total[t][h]);
    weight = sum == 0.0f ? 0.0f : 1.0f / sum;
    if (kModified && p.dropout.active) weight *= p.dropout.scale;
    lse = sum == 0.0f ? -INFINITY : top_logit(p, t, h) + logf(sum);
  }
};

}  // namespace llmops::cuda
