// Attention forward for few query rows (Tq * group <= 8) against many keys: one task is one
// (batch, kv head) and one part of the keys. Formula: attention.h
//
// Memory is what costs here, so each row of K and of V is read once, in long runs (AVX2: four of
// them at a time, attention_decode_streams.h): first the scores of up to 1024 keys, then their
// softmax, then V. The head dimension runs along the lanes. Scores: W dot products at once, W / R
// keys by R rows, summed up by one W x W reduction. Values: R x 4 accumulators over 64 keys at a
// time. bf16 multiplies in pairs (vdpbf16ps) where possible; where AMX is, one row does, and the
// scores of several are tiles. (D + Dv) * element size bytes per key.
#include "attention.h"

#include "attention_amx.h"
#include "attention_decode_runs.h"
#include "attention_decode_streams.h"
#include "attention_score.h"
#include "attention_tile.h"
#include "dot_tile.h"
#include "simd.h"

namespace llmops::cpu::LLMOPS_ISA {
namespace {

constexpr int kValueKeys = 64;  // keys of V that all rows and columns go over while in cache
constexpr int kTileKeys = 32;   // keys of a product by AMX
constexpr int kRows = static_cast<int>(kAttentionDecodeRows);
constexpr int kRowTile = W == 1 ? 1 : 4;

// How products are summed: in fp32, bf16 in pairs, or the scores of several rows by AMX and their
// values in fp32.
enum class Sums { widened, pairs, tiles };

struct Scratch {
  float* q;  // [kRows][padded D], or bf16
  // By AMX: the same as pairs [padded D / 2][16]; scores [kTileKeys][16]; keys that fill no tile.
  float *q_lanes, *tile, *k;
  float* s;  // [kRows][kRun]
  float* o;  // [kRows][padded Dv]
  float m[kRows], l[kRows];
};
LLMOPS_INLINE int64_t padded(int64_t dim) { return round_up(dim, 2 * W); }

LLMOPS_INLINE Scratch layout(const AttentionParams& p, Arena& arena) {
  Scratch s;
  s.q = arena.take<float>(kRows * padded(p.dim));
  s.s = arena.take<float>(kRows * kRun + W);
  s.o = arena.take<float>(kRows * padded(p.dim_v));
  if (kHasTiles) {
    s.q_lanes = arena.take<float>(padded(p.dim) / 2 * W);
    s.tile = arena.take<float>(kTileKeys * W);
    s.k = arena.take<float>(kTileKeys * padded(p.dim) / 2);
  }
  return s;
}

// s[r][i] = q[r] . k[i] for `keys` keys and R rows; W / R keys at a time.
template <class T, bool kPairs, int R>
LLMOPS_INLINE void score_keys(const T* const* key, int count, int64_t dim, const float* q,
                              int64_t ldq, float* s) {
  constexpr int K = W / R;
  Vec acc[W];
  dot_tile<T, kPairs, R>(key, dim, q, ldq, acc);
  if constexpr (R == 1) return store_some(s, reduce_each(acc), count);
  float sums[W];
  store(sums, reduce_each(acc));
  LLMOPS_UNROLL for (int r = 0; r < R; ++r) {
    for (int t = 0; t < K && t < count; ++t) s[r * kRun + t] = sums[r * K + t];
  }
}

template <class T, bool kPairs, int R>
LLMOPS_OUTLINE void score_run(const Run<T>& run, int64_t dim, int rows, const float* q, int64_t ldq,
                              float* s) {
  constexpr int K = W / R;
  const int keys = run.count;
  for (int i = 0; i < keys; i += K) {
    const T* key[K];  // past the end the last key again: computed and not kept
    LLMOPS_UNROLL for (int t = 0; t < K; ++t) key[t] =
        run.first + (i + t < keys ? i + t : keys - 1) * run.stride;
    if (i + K + kAheadKeys <= keys && (sizeof(T) == 2 || run.next)) {
      LLMOPS_UNROLL for (int t = 0; t < K; ++t)
          fetch(key[t] + kAheadKeys * run.stride, dim * sizeof(T));
    } else if (run.next) {
      for (int t = i; t < i + K && t < keys; ++t) fetch(row_ahead(run, t), dim * sizeof(T));
    }
    for (int r = 0; r < rows; r += R)
      score_keys<T, kPairs, R>(key, keys - i, dim, q + r * ldq, ldq, s + r * kRun + i);
  }
}

#ifdef LLMOPS_HAS_TILES
// The same by AMX, 16 keys by up to 16 rows to a tile of scores, which is then turned.
[[maybe_unused]] LLMOPS_OUTLINE void score_tiles(const Run<bf16>& run, int64_t dim, int rows,
                                                 const Scratch& s, float* out) {
  for (int i = 0; i < run.count; i += kTileKeys) {
    const int n = run.count - i < kTileKeys ? run.count - i : kTileKeys;
    const int inside = run.count - kAheadKeys - i;
    const int asked = inside > 0 ? (inside < n ? inside : n) : run.next ? n : 0;
    const bf16* const ahead = asked > 0 ? row_ahead(run, i) : nullptr;
    const TileRows a = tile_rows(run.first + i * run.stride, run.stride, n, dim, s.k);
    column_products(a, (n + kSide - 1) / kSide, s.q_lanes, padded(dim) / kDepth, s.tile, kSide,
                    false);
    for (int t = 0; t < n; t += W) {
      for (int j = t; j < t + W && j < asked; ++j) fetch(ahead + j * run.stride, dim * 2);
      Vec r[W];
      LLMOPS_UNROLL for (int j = 0; j < W; ++j) r[j] = load(s.tile + (t + j) * W);
      transpose(r);
      LLMOPS_UNROLL for (int j = 0; j < kRows; ++j) {
        if (j < rows) store_some(out + j * kRun + i + t, r[j], n - t);
      }
    }
  }
}
#endif

// o [R][ldo] += weights s [R][keys] times v [keys][NV vectors], the last one of `tail` lanes.
template <class T, int R, int NV, bool kTail>
LLMOPS_OUTLINE void value_tile(const T* v, int64_t stride, int keys, const float* s, float* o,
                               int64_t ldo, int tail, const T* ahead) {
  Vec acc[R][NV];
  LLMOPS_UNROLL for (int r = 0; r < R; ++r) {
    LLMOPS_UNROLL for (int j = 0; j < NV; ++j) acc[r][j] = load(o + r * ldo + j * W);
  }
  for (int i = 0; i < keys; ++i) {
    Vec x[NV];
    LLMOPS_UNROLL for (int j = 0; j < NV; ++j) x[j] =
        kTail && j == NV - 1 ? load_n(v + j * W, tail) : load(v + j * W);
    if (ahead) fetch(ahead + i * stride, NV * W * sizeof(T));
    LLMOPS_UNROLL for (int r = 0; r < R; ++r) {
      const Vec weight = set1(s[r * kRun + i]);
      LLMOPS_UNROLL for (int j = 0; j < NV; ++j) acc[r][j] = fma(weight, x[j], acc[r][j]);
    }
    v += stride;
  }
  LLMOPS_UNROLL for (int r = 0; r < R; ++r) {
    LLMOPS_UNROLL for (int j = 0; j < NV; ++j) store(o + r * ldo + j * W, acc[r][j]);
  }
}

#ifdef LLMOPS_HAS_DOT_PAIRS
// Weights [R][keys] as bf16 pairs of keys, [R][kValueKeys / 2]; 0 past the end.
template <int R>
LLMOPS_INLINE void pair_weights(const float* s, int keys, float* out) {
  for (int r = 0; r < R; ++r) {
    for (int i = 0; i < kValueKeys; i += 2 * W) {
      const Vec low = load_n(s + r * kRun + i, clamp_int(keys - i, 0, W));
      const Vec high = load_n(s + r * kRun + i + W, clamp_int(keys - i - W, 0, W));
      store(out + (r * kValueKeys + i) / 2, narrow_pairs(low, high));
    }
  }
}

// The same for bf16, two keys to a step (vdpbf16ps) and 2 * NV vectors of columns.
template <int R, int NV>
LLMOPS_OUTLINE void value_pairs(const bf16* v, int64_t stride, int keys, const float* s, float* o,
                                int64_t ldo, const bf16* ahead) {
  Vec acc[R][2 * NV];
  LLMOPS_UNROLL for (int r = 0; r < R; ++r) {
    LLMOPS_UNROLL for (int j = 0; j < 2 * NV; ++j) acc[r][j] = zero();
  }
  for (int i = 0; i < keys; i += 2) {
    const bf16* next = i + 1 < keys ? v + stride : v;  // its weight is 0 past the end
    Vec x[2 * NV];
    LLMOPS_UNROLL for (int j = 0; j < NV; ++j)
        unpack_pairs(load_pairs(v + 2 * j * W), load_pairs(next + 2 * j * W), x + 2 * j);
    if (ahead) {
      fetch(ahead + i * stride, 4 * NV * W);
      fetch(ahead + (i + 1) * stride, 4 * NV * W);
    }
    LLMOPS_UNROLL for (int r = 0; r < R; ++r) {
      const Vec weight = set1(s[(r * kValueKeys + i) / 2]);
      LLMOPS_UNROLL for (int j = 0; j < 2 * NV; ++j) acc[r][j] = dot_pairs(weight, x[j], acc[r][j]);
    }
    v += 2 * stride;
  }
  LLMOPS_UNROLL for (int r = 0; r < R; ++r) {
    LLMOPS_UNROLL for (int j = 0; j < NV; ++j) {
      repack_halves(acc[r] + 2 * j);
      LLMOPS_UNROLL for (int h = 0; h < 2; ++h) {
        float* out = o + r * ldo + (2 * j + h) * W;
        store(out, load(out) + acc[r][2 * j + h]);
      }
    }
  }
}
#endif

template <class T, bool kPairs>
LLMOPS_INLINE void value_run(const Run<T>& run, int64_t dim, int rows, const float* s, float* o,
                             int64_t ldo) {
  constexpr int NV = W == 16 ? 4 : 2;
  const int64_t stride = run.stride;
  for (int i = 0, n; i < run.count; i += n) {
    // Those whose rows ahead lie in one run.
    const int inside = run.count - kAheadKeys - i;
    n = clamp_int(run.next && inside > 0 ? inside : run.count - i, 1, kValueKeys);
    const T* const v = run.first + i * stride;
    const T* const next = run.next || (sizeof(T) == 2 && inside >= n) ? row_ahead(run, i) : nullptr;
    for (int r = 0; r < rows; r += kRowTile) {
      const int left = rows - r < kRowTile ? rows - r : kRowTile;
      with_constant<kRowTile>(left, [&](auto count) {
        constexpr int R = decltype(count)::value;
        const float* weights = s + r * kRun + i;
        // What the first rows fetch the others find.
        const T* const ahead = r == 0 ? next : nullptr;
        const auto there = [&](int64_t d) { return ahead ? ahead + d : nullptr; };
        int64_t d = 0;
#ifdef LLMOPS_HAS_DOT_PAIRS
        if constexpr (kPairs) {
          alignas(64) float pairs[kRowTile * kValueKeys / 2];
          pair_weights<R>(weights, n, pairs);
          for (; d + 4 * W <= dim; d += 4 * W)
            value_pairs<R, 2>(v + d, stride, n, pairs, o + r * ldo + d, ldo, there(d));
          for (; d + 2 * W <= dim; d += 2 * W)
            value_pairs<R, 1>(v + d, stride, n, pairs, o + r * ldo + d, ldo, there(d));
        }
#endif
        for (; d + NV * W <= dim; d += NV * W)
          value_tile<T, R, NV, false>(v + d, stride, n, weights, o + r * ldo + d, ldo, W, there(d));
        for (; d + W <= dim; d += W)
          value_tile<T, R, 1, false>(v + d, stride, n, weights, o + r * ldo + d, ldo, W, there(d));
        if (d < dim)
          value_tile<T, R, 1, true>(v + d, stride, n, weights, o + r * ldo + d, ldo,
                                    static_cast<int>(dim - d), there(d));
      });
    }
  }
}

// Row r's scores of keys [key, key + keys) become weights; m, l and o follow. Those from `hidden`
// to `visible` count, the rest become 0. Modifiers as in modify_scores, along a row.
template <bool kForm>
LLMOPS_OUTLINE void softmax_row(const AttentionParams& p, const QueryBlock& block, Scratch& s,
                                int r, int64_t key, int keys) {
  constexpr bool kNatural = kForm;
  const float scale = split_scale(p.scale).score;
  const Vec factor = set1(kNatural ? kLog2e : scale * kLog2e);
  const int visible = clamp_int(block.limit[r] - key, 0, keys);
  const int hidden = clamp_int(block.start[r] - key, 0, visible);
  float* row = s.s + r * kRun;
  float slope = 0.0f, lanes[W];
  if (kForm && p.slopes)
    slope = p.slopes[block.batch * p.slope_stride[0] + block.head[r] * p.slope_stride[1]];
  for (int i = 0; i < W; ++i) lanes[i] = static_cast<float>(i);
  const int64_t offset = key - (block.token[r] + block.shift);
  const int64_t step = p.mask_stride[3];
  const int64_t at = block.batch * p.mask_stride[0] + block.head[r] * p.mask_stride[1] +
                     block.token[r] * p.mask_stride[2] + key * step;
  Vec top = set1(-kInf);
  for (int i = 0; i < visible; i += W) {
    const int n = visible - i < W ? visible - i : W;
    Vec x = n == W ? load(row + i) : load_n(row + i, n, -kInf);
    if constexpr (kForm) {
      x = p.softcap == 0.0f ? x * set1(scale) : set1(p.softcap) * tanh(x * set1(scale / p.softcap));
      if (p.slopes)
        x = fnma(set1(slope), abs(load(lanes) + set1(static_cast<float>(offset + i))), x);
      if (p.mask_kind == ScoreMask::boolean) {
        const Vec bias = mask_values(static_cast<const uint8_t*>(p.mask) + at + i * step, step, n);
        x = select(equal(bias, zero()), x, bias);
      } else if (p.mask_kind == ScoreMask::additive) {
        LLMOPS_DISPATCH(p.mask_type, M, {
          const Vec bias = mask_values(static_cast<const M*>(p.mask) + at + i * step, step, n);
          x = select(equal(bias, set1(-kInf)), bias, x + bias);
        });
      }
      x = select(first_n(n), x, set1(-kInf));
    }
    if (i < hidden) x = select(lanes_ge(hidden - i), x, set1(-kInf));
    if (kForm || i < hidden) store_some(row + i, x, n);
    top = max(x, top);
  }
  const float best = reduce_max(top) * (kNatural ? 1.0f : first_lane(factor));
  const float before = s.m[r], m = best > before ? best : before;
  // Nothing seen yet: -inf - -inf would be NaN.
  const float shift = m == -kInf ? 0.0f : m;
  const float alpha = first_lane(exp2_softmax(set1((before - shift) * (kNatural ? kLog2e : 1.0f))));
  Vec sum = zero();
  for (int i = 0; i < visible; i += W) {
    const int n = visible - i < W ? visible - i : W;
    const Vec x = n == W ? load(row + i) : load_n(row + i, n, -kInf);
    const Vec weight =
        exp2_softmax(kNatural ? (x - set1(shift)) * factor : fma(x, factor, set1(-shift)));
    store_some(row + i, weight, n);
    sum = sum + weight;
  }
  for (int i = visible; i < keys; ++i) row[i] = 0.0f;
  s.m[r] = m;
  s.l[r] = s.l[r] * alpha + reduce_add(sum);
  if (alpha == 1.0f) return;
  float* o = s.o + r * padded(p.dim_v);
  for (int64_t d = 0; d < p.dim_v; d += W) store(o + d, load(o + d) * set1(alpha));
}

// Whether it could: false, and nothing written, where the plain form does not resolve a row.
template <class T, Sums kSums, bool kForm>
LLMOPS_OUTLINE bool run(const AttentionParams& p, int64_t task, void* scratch) {
  constexpr bool kPairs = kSums != Sums::widened;  // as which q is held
  Arena arena{static_cast<char*>(scratch)};
  Scratch s = layout(p, arena);
  const auto [group, index, split] = task_of(p, task);
  const int64_t dim = padded(p.dim), dim_v = padded(p.dim_v);
  QueryBlock block;
  begin_block(p, group, index, block);
  const AttentionPlan& plan = block.sequence.plan;

  // Rows of queries, dense, zero past D and past the last row.
  const Scale scale = split_scale(p.scale);
  const int64_t ldq = kPairs ? dim / 2 : dim;
  const T* row[kLanes];
  block_rows(block, static_cast<const T*>(p.q), p.q_stride, row);
  __builtin_memset(s.q, 0, kRows * ldq * sizeof(float));
  __builtin_memset(s.o, 0, kRows * dim_v * sizeof(float));
  for (int r = 0; r < kRows; ++r) {
    s.m[r] = -kInf;
    s.l[r] = 0.0f;
    if (r >= block.count) continue;
    const auto query = [&](int64_t d) __attribute__((always_inline)) {
      return d < p.dim ? load_some(row[r] + d, p.dim - d) * set1(scale.query) : zero();
    };
    for (int64_t d = 0; d < p.dim; d += 2 * W) {
      if constexpr (kPairs) {
        bf16* const to = reinterpret_cast<bf16*>(s.q + r * ldq) + d;
        store_n(to, query(d), clamp_int(p.dim - d, 0, W));
        store_n(to + W, query(d + W), clamp_int(p.dim - d - W, 0, W));
      } else {
        store_row<T>(s.q + r * ldq + d, block.count, query(d), query(d + W));
      }
    }
  }

#ifdef LLMOPS_HAS_TILES
  if constexpr (kSums == Sums::tiles) {
    const bf16* q[kRows];
    for (int r = 0; r < kRows; ++r) q[r] = reinterpret_cast<const bf16*>(s.q + r * ldq);
    pack_lane_pairs(q, kRows, dim, false, {W, 0}, s.q_lanes);
    begin_tiles();
  }
#endif
  if (kForm && p.sinks && split == 0) {  // a key of weight exp(sink) and value 0, seen first
    for (int r = 0; r < block.count; ++r) {
      s.m[r] = p.sinks[block.head[r]];
      s.l[r] = s.m[r] == -kInf ? 0.0f : 1.0f;
    }
  }

  const int64_t part = plan.first_key + split * plan.split_keys;
  const int64_t begin = max64(block.begin, part);
  const int64_t end = min64(block.end, part + plan.split_keys);
  for (int64_t key = begin; key < end; key += kRun) {
    const int keys = static_cast<int>(min64(kRun, end - key));
    if constexpr (kStreams > 1) {
      for_streams<T>(p, block, p.k, p.k_stride, key, keys, [&](const Streams<T>& runs, auto) {
        score_streams(runs, p.dim, block.count, s.q, ldq, s.s);
      });
    } else {
      for_runs<T>(p, block, p.k, p.k_stride, key, keys, [&](const Run<T>& run, int i) {
#ifdef LLMOPS_HAS_TILES
        if constexpr (kSums == Sums::tiles) return score_tiles(run, p.dim, block.count, s, s.s + i);
#endif
        if (block.count == 1 || W == 1) {
          score_run<T, kPairs, 1>(run, p.dim, block.count, s.q, ldq, s.s + i);
        } else if (block.count == 2) {
          score_run<T, kPairs, W == 1 ? 1 : 2>(run, p.dim, 2, s.q, ldq, s.s + i);
        } else {
          score_run<T, kPairs, kRowTile>(run, p.dim, block.count, s.q, ldq, s.s + i);
        }
      });
    }
    for (int r = 0; r < block.count; ++r) softmax_row<kForm>(p, block, s, r, key, keys);
    if constexpr (kStreams > 1) {
      for_streams<T>(p, block, p.v, p.v_stride, key, keys, [&](const Streams<T>& runs, auto known) {
        value_streams<T, known.value>(runs, p.dim_v, block.count, s.s, s.o, dim_v);
      });
    } else {
      for_runs<T>(p, block, p.v, p.v_stride, key, keys, [&](const Run<T>& run, int i) {
        value_run<T, kSums == Sums::pairs>(run, p.dim_v, block.count, s.s + i, s.o, dim_v);
      });
    }
  }

#ifdef LLMOPS_HAS_TILES
  if (kSums == Sums::tiles) end_tiles();
#endif
  const int64_t rows = block.count, width = p.dim_v + 1;
  if constexpr (!kForm) {
    for (int r = 0; r < rows; ++r)
      if (!is_resolved(s.m[r], s.l[r])) return false;
  }
  for (int r = 0; r < rows; ++r) {
    const float l = s.l[r];
    const float lse = l == 0.0f ? -kInf : s.m[r] * (kForm ? 1.0f : kLn2) + __builtin_logf(l);
    const float* o = s.o + r * dim_v;
    const Vec norm = set1(1.0f / l);
    if (plan.splits == 1) {
      T* out = block_row(block, static_cast<T*>(p.out), p.out_stride, r);
      for (int64_t d = 0; d < p.dim_v; d += W)
        store_some(out + d, l == 0.0f ? zero() : load(o + d) * norm, p.dim_v - d);
      p.lse[lse_at(p, block, r)] = lse;
    } else {
      const int64_t start = partial_start(p, block.sequence, group, plan.splits * rows);
      float* out = p.partial + (start + split * rows + r) * width;
      for (int64_t d = 0; d < p.dim_v; d += W)
        store_some(out + d, l == 0.0f ? zero() : load(o + d) * norm, p.dim_v - d);
      out[p.dim_v] = lse;
    }
  }
  return true;
}

template <class T, Sums kSums>
LLMOPS_INLINE void dispatch(const AttentionParams& p, int64_t task, void* scratch) {
  if (is_modified(p) || !run<T, kSums, kPlain>(p, task, scratch))
    run<T, kSums, kModified>(p, task, scratch);
}

}  // namespace

int64_t attention_decode_scratch(const AttentionParams& p) {
  Arena arena{nullptr};
  layout(p, arena);
  return arena.next - static_cast<char*>(nullptr);
}

void attention_decode(const AttentionParams& p, int64_t task, void* scratch) {
  if constexpr (kHasPairs) {
    if (p.type == DType::bf16) {
      if (kHasTiles && active_isa() == Isa::amx && p.heads / p.kv_heads * p.queries > 1)
        return dispatch<bf16, kHasTiles ? Sums::tiles : Sums::pairs>(p, task, scratch);
      return dispatch<bf16, Sums::pairs>(p, task, scratch);
    }
  }
  LLMOPS_DISPATCH(p.type, T, (dispatch<T, Sums::widened>(p, task, scratch)));
}

}  // namespace llmops::cpu::LLMOPS_ISA
