// The forward of bf16 by AMX (amx.h).
//
// A vector of 16 queries goes through scores, softmax and update of 64 keys before the next one
// does, so that what is written between them stays in the first-level cache. Up to four blocks of
// queries share a block of keys, whose values are transposed once for them. Tiles and vectors take
// turns: for a hundred clocks after a tile instruction one of the two ports of vectors stands still
// (benchmarks/NOTES.md).
#pragma once
#include "attention_amx.h"
#include "attention_dropout.h"
#include "attention_fwd_rows.h"

#ifdef LLMOPS_HAS_TILES

namespace llmops::cpu::LLMOPS_ISA {
namespace {

// The lanes' maximum over rows [keys][16].
LLMOPS_INLINE Vec max_of_rows(const float* s, int keys) {
  // Four at a time, side by side: one after the other each waits for the one before.
  Vec m[4];
  LLMOPS_UNROLL for (int k = 0; k < 4; ++k) m[k] = set1(-kInf);
  int r = 0;
  for (; r + 4 <= keys; r += 4) {
    LLMOPS_UNROLL for (int k = 0; k < 4; ++k) m[k] = max(load(s + (r + k) * W), m[k]);
  }
  for (; r < keys; ++r) m[0] = max(load(s + r * W), m[0]);
  return max(max(m[0], m[1]), max(m[2], m[3]));
}

template <bool kForm>
struct TiledForward {
  const AttentionParams& p;
  Scratch rows[kShared];
  QueryBlock block[kShared];
  int count;

  void add_keys(int64_t key, int keys) {
    const Scratch& s = rows[0];
    const KeyRows<bf16> k =
        key_rows(p, block[0], p.k, p.k_stride, key, keys, p.dim, static_cast<bf16*>(s.k_page));
    const KeyRows<bf16> v =
        key_rows(p, block[0], p.v, p.v_stride, key, keys, p.dim_v, static_cast<bf16*>(s.v_page));
    // Rows of tokens far apart would fall on few sets of the first-level cache.
    const TileRows a = tile_rows(k.first, k.stride, keys, p.dim, s.k, k.stride == p.dim);
    transpose_rows(v.first, v.stride, keys, p.dim_v, s.v, kKeys<Way::tiles> / 2);
    for (int i = 0; i < count; ++i) {
      if (key < block[i].end && key + keys > block[i].begin)
        add_to_block(block[i], rows[i], a, key, keys);
    }
  }

  void add_to_block(const QueryBlock& of, const Scratch& s, TileRows k, int64_t key, int keys) {
    const int64_t dim = round_up(p.dim, kDepth), dim_v = round_up(p.dim_v, kDepth);
    int visible[kBlockVecs];
    for (int j = 0; j < of.vecs; ++j) visible[j] = clamp_int(of.vec_limit[j] - key, 0, keys);
    const bool cut = kForm || of.cuts(key, keys);
    const Modifiers modifiers = begin_modifiers<kForm>(p, of, key, keys, visible, s.bias);
    if (kForm && s.keep) dropout_weights(p, of, key, visible, s.keep);
    const Vec factor = set1(kForm ? kLog2e : split_scale(p.scale).score * kLog2e);
    for (int j = 0; j < of.vecs; ++j) {
      const int seen = visible[j];
      if (seen == 0) continue;
      column_products(k, (seen + kSide - 1) / kSide, s.q + j * (dim / 2 * W), dim / kDepth, s.s,
                      kSide, false);
      const Vec top =
          cut ? modify_vector<kForm>(p, of, key, modifiers, seen, j, s.s, W, s.bias, nullptr)
              : max_of_rows(s.s, seen);
      float* const o = s.o + j * (dim_v * W);  // from the second level
      const Vec alpha = softmax_lanes<true, kForm, W>(s, j, seen, factor, top, s.s, s.pairs, o,
                                                      static_cast<int>(dim_v / kDepth));
      for (int i = (seen + 1) / 2; i < round_up(seen, kDepth) / 2; ++i)
        store(s.pairs + i * W, zero());
      rescale(o, alpha);
      column_products({reinterpret_cast<const char*>(s.v), kKeys<Way::tiles> * 2},
                      (p.dim_v + kSide - 1) / kSide, s.pairs, (seen + kDepth - 1) / kDepth, o,
                      kSide, true);
    }
  }
  void finish() const {}
  void rescale(float* o, Vec alpha) const {
    if (mask_bits(equal(alpha, set1(1.0f))) == kAllLanes) return;
    for (int64_t d = 0; d < p.dim_v; ++d) store(o + d * W, load(o + d * W) * alpha);
  }
};

// How many blocks of queries share keys. Each has its own task where threads might lack any.
LLMOPS_INLINE int blocks_that_share(const AttentionParams& p) {
  constexpr int64_t kTasks = 16;
  const int64_t rows = p.heads / p.kv_heads * p.queries;
  const int64_t blocks = p.batch * p.kv_heads * ((rows + kLanes - 1) / kLanes);
  return clamp_int(blocks / kTasks, 1, kShared);
}

template <bool kForm>
bool run_tiled(const AttentionParams& p, int64_t task, void* scratch) {
  TiledForward<kForm> forward{p, {}, {}, 0};
  return run_shared<bf16, Way::tiles, kForm>(p, task, scratch, blocks_that_share(p), forward);
}

}  // namespace
}  // namespace llmops::cpu::LLMOPS_ISA
#endif
