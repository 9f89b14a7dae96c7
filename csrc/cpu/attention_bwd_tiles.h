// The backward of bf16 by AMX (amx.h), after the forward's form (attention_fwd_tiles.h).
//
// Up to four blocks of queries take 64 keys together. Two vectors of 16 queries after the other go
// through scores and gradients, whose S and dP stay in the first-level cache; then all go through
// dQ, and then, as one product of up to 256 queries, through dV and dK: sums of keys come from the
// second level, and reading and writing them for each 64 queries took as long as the products.
#pragma once
#include "attention_amx.h"
#include "attention_bwd_rows.h"
#include "attention_dropout.h"

namespace llmops::cpu::LLMOPS_ISA {
namespace {

constexpr LaneSteps kTiledSteps{W, kTiledKeys * W};  // of S and dP

#ifdef LLMOPS_HAS_TILES

constexpr int kPairVecs = 2;  // vectors of queries: the depth of a step
constexpr int kBlockPairs = kBlockVecs / kPairVecs;
// Of P and dS of two vectors, bf16, and of dS of one by pairs of keys.
constexpr int64_t kPairCells = kTiledKeys * kDepth, kPairsOfKeys = kTiledKeys / 2 * W;

// S^T [visible][16] = K Q^T, or dP^T = V dO^T, of vector j.
LLMOPS_INLINE void score_vector(TileRows keys, int visible, const float* lanes, int64_t dim, int j,
                                float* out) {
  if (visible == 0) return;
  const int64_t steps = padded(dim) / kDepth;
  column_products(keys, (visible + kSide - 1) / kSide, lanes + j * steps * kSide * W, steps, out, W,
                  false);
}

// A block of queries and one of keys: how many of those a vector sees, and either of two, and where
// P and dS of the first two vectors are to be.
struct TiledCross {
  int visible[kBlockVecs], seen[kBlockPairs];
  bf16 *p, *ds;     // of each two vectors [kTiledKeys][32]
  float* ds_pairs;  // of each vector [kTiledKeys / 2][16]
};

// P and dS of the vectors j and j + 1, up to the next 32nd key that one of them sees: by key, two
// vectors a row, and dS by pairs of keys, each vector by itself. What is not seen becomes 0. kVecs:
// 1 where the second sees nothing; kWhole: all seen by both.
template <bool kNatural, int kVecs, bool kWhole>
LLMOPS_OUTLINE void pair_gradients(const Scratch& s, const GradLanes& lanes, const TiledCross& of,
                                   int j, int keys, Vec factor) {
  Vec lse[kPairVecs], delta[kPairVecs], norm[kPairVecs];
  LLMOPS_UNROLL for (int v = 0; v < kPairVecs; ++v) {
    lse[v] = load(lanes.lse + (j + v) * W);
    delta[v] = load(lanes.delta + (j + v) * W);
    norm[v] = load(lanes.norm + (j + v) * W);
  }
  float* const p_rows = reinterpret_cast<float*>(of.p + j / kPairVecs * kPairCells);
  float* const ds_rows = reinterpret_cast<float*>(of.ds + j / kPairVecs * kPairCells);
  for (int k = 0; k < keys; k += 2) {
    Vec rows[2];
    LLMOPS_UNROLL for (int h = 0; h < 2; ++h) {
      Vec p[kPairVecs] = {zero(), zero()}, ds[kPairVecs] = {zero(), zero()};
      LLMOPS_UNROLL for (int v = 0; v < kVecs; ++v) {
        const int64_t from = v * kTiledSteps.vec + (k + h) * kTiledSteps.row;
        const int64_t at = (k + h) * kLanes + (j + v) * W;
        const Vec grad = load(s.dp + from);
        Vec x = probability<kNatural>(load(s.s + from), lse[v], factor), y;
        if (kNatural) x = x * norm[v];
        if (kNatural && lanes.keep) {
          const Vec keep = load(lanes.keep + at);
          y = x * fma(grad, keep, zero() - delta[v]);
          x = x * keep;
        } else {
          y = x * (grad - delta[v]);
        }
        if (kNatural && lanes.slope) y = y * load(lanes.slope + at);
        if constexpr (!kWhole) {
          const Mask seen = first_n(k + h < of.visible[j + v] ? W : 0);
          x = select(seen, x, zero()), y = select(seen, y, zero());
        }
        p[v] = x, ds[v] = y;
      }
      store(p_rows + (k + h) * W, narrow_pairs(p[0], p[1]));
      rows[h] = narrow_pairs(ds[0], ds[1]);
      store(ds_rows + (k + h) * W, rows[h]);
    }
    Vec pairs[kPairVecs];
    interleave_pairs(rows[0], rows[1], pairs);
    LLMOPS_UNROLL for (int v = 0; v < kPairVecs; ++v)
        store(of.ds_pairs + (j + v) * kPairsOfKeys + k / 2 * W, pairs[v]);
  }
}

template <bool kForm>
struct TiledBackward {
  const AttentionParams& p;
  const Scratch* rows;  // [count], as the blocks
  const QueryBlock* block;
  int count;
  Vec factor;
  float *dk, *dv;  // [Tk][padded D], [Tk][padded Dv], fp32

  void run() const {
    int64_t begin = INT64_MAX, end = 0;
    for (int i = 0; i < count; ++i)
      begin = min64(begin, block[i].begin), end = max64(end, block[i].end);
    const int64_t all = block[0].sequence.keys;
    for (int64_t key = begin / kTiledKeys * kTiledKeys; key < end; key += kTiledKeys)
      add_keys(key, static_cast<int>(min64(kTiledKeys, all - key)));
  }

  void add_keys(int64_t key, int keys) const {
    const Scratch& s = rows[0];
    const bf16* k = key_run<bf16>(p, block[0], p.k, p.k_stride, key, keys).first;
    const bf16* v = key_run<bf16>(p, block[0], p.v, p.v_stride, key, keys).first;
    const int64_t dim = padded(p.dim), dim_v = padded(p.dim_v);
    const int64_t k_row = p.k_stride[2], v_row = p.v_stride[2];
    // Rows of tokens far apart would fall on few sets of the first-level cache.
    const TileRows k_rows = tile_rows(k, k_row, keys, p.dim, s.k, k_row == p.dim);
    const TileRows v_rows = tile_rows(v, v_row, keys, p.dim_v, s.v, v_row == p.dim_v);
    TiledCross cross[kGradShared];
    for (int i = 0; i < count; ++i) {
      TiledCross& of = cross[i];
      of = {{},
            {},
            s.p16 + i * kBlockPairs * kPairCells,
            s.ds16 + i * kBlockPairs * kPairCells,
            s.ds_pairs + i * kBlockVecs * kPairsOfKeys};
      if (key >= block[i].end || key + keys <= block[i].begin) continue;
      for (int j = 0; j < block[i].vecs; ++j) {
        of.visible[j] = clamp_int(block[i].vec_limit[j] - key, 0, keys);
        int& seen = of.seen[j / kPairVecs];
        if (of.visible[j] > seen) seen = of.visible[j];
      }
      make_gradients(block[i], rows[i], of, k_rows, v_rows, key, keys);
    }
    transpose_rows(k, k_row, keys, p.dim, s.k_pairs, kTiledKeys / 2);
    for (int i = 0; i < count; ++i) {
      for (int j = 0; j < block[i].vecs; ++j) {
        const int seen = cross[i].visible[j];
        if (seen == 0) continue;
        column_products({reinterpret_cast<const char*>(s.k_pairs), 2 * kTiledKeys},
                        (p.dim + kSide - 1) / kSide, cross[i].ds_pairs + j * kPairsOfKeys,
                        (seen + kDepth - 1) / kDepth, rows[i].dq + j * dim * W, W, true);
      }
    }
    add_to_keys(s.p16, s.g_rows, dim_v, cross, keys, dv + key * dim_v);
    add_to_keys(s.ds16, s.q_rows, dim, cross, keys, dk + key * dim);
  }

  void make_gradients(const QueryBlock& queries, const Scratch& own, const TiledCross& of,
                      TileRows k, TileRows v, int64_t key, int keys) const {
    const Scratch& s = rows[0];
    const GradLanes& lanes = own.lanes;
    const bool cut = kForm || queries.cuts(key, keys);
    const Modifiers modifiers = begin_modifiers<kForm>(p, queries, key, keys, of.visible, s.bias);
    if (kForm && lanes.keep) dropout_weights(p, queries, key, of.visible, lanes.keep);
    for (int j = 0; j < queries.vecs; j += kPairVecs) {
      if (of.seen[j / kPairVecs] == 0) continue;
      for (int h = 0; h < kPairVecs; ++h) {
        const int seen = of.visible[j + h];
        float* const score = s.s + h * kTiledSteps.vec;
        score_vector(k, seen, own.q, p.dim, j + h, score);
        score_vector(v, seen, own.g, p.dim_v, j + h, s.dp + h * kTiledSteps.vec);
        if (cut && seen > 0)
          modify_vector<kForm>(p, queries, key, modifiers, seen, j + h, score, W, s.bias,
                               lanes.slope);
      }
      const int whole = static_cast<int>(round_up(of.seen[j / kPairVecs], kDepth));
      if (of.visible[j + 1] == 0) {
        pair_gradients<kForm, 1, false>(s, lanes, of, j, whole, factor);
      } else if (of.visible[j] == whole && of.visible[j + 1] == whole) {
        pair_gradients<kForm, 2, true>(s, lanes, of, j, whole, factor);
      } else {
        pair_gradients<kForm, 2, false>(s, lanes, of, j, whole, factor);
      }
    }
  }

  // sums [keys][ld] += A B: P or dS by key, and rows of dO or Q in pairs, of all blocks; 32 keys at
  // a time where not all that see any see the last 32.
  void add_to_keys(const bf16* a, const float* b, int64_t ld, const TiledCross* cross, int keys,
                   float* sums) const {
    const auto seen = [&](int pair) { return cross[pair / kBlockPairs].seen[pair % kBlockPairs]; };
    const int pairs = count * kBlockPairs;
    int together = keys;
    for (int i = 0; i < pairs; ++i)
      if (seen(i) > 0 && round_up(seen(i), kDepth) < keys) together = kDepth;
    for (int i = 0, n; i < keys; i += n) {
      n = keys - i < together ? keys - i : together;
      for (int first = 0, last; first < pairs; first = last + 1) {
        for (last = first; last < pairs && seen(last) > i; ++last) {
        }
        if (last > first)
          add_pairs({reinterpret_cast<const char*>(a + first * kPairCells + i * kDepth), 2 * kDepth,
                     2 * kPairCells},
                    b + first * (kSide * kSide), last - first, ld, n, sums + i * ld);
      }
    }
  }
  void add_pairs(TileRows a, const float* b, int steps, int64_t ld, int keys, float* sums) const {
    float* const copy = rows[0].sums;  // for keys that fill no tile
    float* const out = keys % kSide == 0 ? sums : copy;
    for (int64_t c = 0; c < ld; c += kSide) {
      column_products(a, (keys + kSide - 1) / kSide, b + c / kSide * kTiledRows.vec, steps, out + c,
                      ld, out != copy);
    }
    for (int64_t d = 0; out == copy && d < keys * ld; d += W)
      store(sums + d, load(sums + d) + load(copy + d));
  }
};
#endif

}  // namespace
}  // namespace llmops::cpu::LLMOPS_ISA
