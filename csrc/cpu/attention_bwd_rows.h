// What attention's backward holds for a block of query rows, and the keys and values that it
// splits.
#pragma once
#include "attention_grad.h"
#include "attention_split.h"
#include "attention_tile.h"

namespace llmops::cpu::LLMOPS_ISA {
namespace {

constexpr int64_t kGradTiled = 32;  // keys of a block in strips; at most kGradKeys
constexpr int kGradShared = 4;      // most blocks of queries that share keys by AMX
template <Way kWay>
constexpr int64_t kBlockKeys = kWay == Way::tiles   ? kTiledKeys
                               : kWay == Way::split ? kGradTiled
                                                    : kGradKeys;

// Strips of fp32 by AMX (attention_split.h).
struct GradStrips {
  float *q, *g;             // of lanes, by dimensions
  float *q_rows, *g_rows;   // of dimensions, by queries
  float *p, *ds;            // of a block of keys, by queries; two of each
  float* turned;            // of lanes, by a block of keys: dS; two
  float *k, *v, *k_turned;  // of the first block of keys; the next one's are `next` floats on
  int64_t next;
};

struct Scratch {
  // [padded D][64], [padded Dv][64]; half as many rows in pairs; lane_steps
  float *q, *g;
  // [64][padded D], [64][padded Dv]; pairs: [32][...], two queries a cell; kTiledRows
  float *q_rows, *g_rows;
  float *s, *dp;   // [kGradKeys][64]; of strips two of them; tiles: of each vector [kTiledKeys][16]
  float* dq;       // [padded D][64]; lane_steps
  float *k, *v;    // a block of keys and values, widened
  float* k_pairs;  // [kGradKeys / 2][padded D]; tiles: [padded D][kTiledKeys / 2]
  float* sums;     // by AMX: [kBlockKeys][the wider padded dimension]
  GradStrips split;
  bf16 *p16, *ds16;  // [kGradKeys][64]; TiledCross
  float* ds_pairs;   // [kGradKeys / 2][64]; TiledCross
  float *bias, *factor;
  void* zeros;
  GradLanes lanes;
};

LLMOPS_INLINE int64_t padded(int64_t dim) { return round_up(dim, 2 * W); }

// Of q_rows and g_rows by tiles: a vector's columns of all blocks of queries follow each other.
constexpr int64_t kBlockRowPairs = kLanes / 2 * W;  // floats of one block's
constexpr LaneSteps kTiledRows{W, kGradShared * kBlockRowPairs};

// What each block of rows has of its own; by tiles q_rows and g_rows are parts of one array.
template <Way kWay>
LLMOPS_INLINE void layout_rows(const AttentionParams& p, Arena& arena, Scratch& s) {
  const int64_t dim = padded(p.dim), dim_v = padded(p.dim_v);
  s.q = arena.take<float>(dim * kLanes);
  s.g = arena.take<float>(dim_v * kLanes);
  if (kWay != Way::tiles) {
    s.q_rows = arena.take<float>(dim * kLanes);
    s.g_rows = arena.take<float>(dim_v * kLanes);
  }
  s.dq = arena.take<float>(dim * kLanes);
#ifdef LLMOPS_HAS_TILES
  if (kWay == Way::split) {
    s.split.q = arena.take<float>(strips_size(kLanes, p.dim));
    s.split.g = arena.take<float>(strips_size(kLanes, p.dim_v));
    s.split.q_rows = arena.take<float>(strips_size(p.dim, kLanes));
    s.split.g_rows = arena.take<float>(strips_size(p.dim_v, kLanes));
  }
#endif
  s.factor = arena.take<float>(kLanes);
  s.lanes = take_grad_lanes(p, arena);
}

template <class T, Way kWay, bool kForm>
LLMOPS_INLINE Scratch layout(const AttentionParams& p, Arena& arena) {
  const int64_t dim = padded(p.dim), dim_v = padded(p.dim_v);
  Scratch s{};
  layout_rows<kWay>(p, arena, s);
  constexpr int64_t keys = kWay == Way::tiles ? kTiledKeys : kGradKeys;
  s.s = arena.take<float>((kWay == Way::split ? 2 : 1) * keys * kLanes);
  s.dp = arena.take<float>((kWay == Way::split ? 2 : 1) * keys * kLanes);
  if (kWay == Way::split) {
#ifdef LLMOPS_HAS_TILES
    s.sums = arena.take<float>(kGradTiled * max64(dim, dim_v));
    s.split.p = arena.take<float>(2 * strips_size(kGradTiled, kLanes));
    s.split.ds = arena.take<float>(2 * strips_size(kGradTiled, kLanes));
    s.split.turned = arena.take<float>(2 * strips_size(kLanes, kGradTiled));
    s.split.next = 2 * strips_size(kGradTiled, p.dim) + strips_size(kGradTiled, p.dim_v);
    s.split.k = arena.take<float>(round_up(p.keys, kGradTiled) / kGradTiled * s.split.next);
    s.split.k_turned = s.split.k + strips_size(kGradTiled, p.dim);
    s.split.v = s.split.k_turned + strips_size(p.dim, kGradTiled);
#endif
  } else if (kWay != Way::widened) {
    const bool tiles = kWay == Way::tiles;
    s.k = arena.take<float>(tiles || p.dim % 2 ? keys * dim / 2 : 0);
    s.v = arena.take<float>(tiles || p.dim_v % 2 ? keys * dim_v / 2 : 0);
    s.sums = arena.take<float>(tiles ? keys * max64(dim, dim_v) : 0);
    s.k_pairs = arena.take<float>(keys / 2 * dim);
    const int64_t blocks = tiles ? kGradShared : 1;
    s.p16 = arena.take<bf16>(blocks * keys * kLanes);
    s.ds16 = arena.take<bf16>(blocks * keys * kLanes);
    s.ds_pairs = arena.take<float>(blocks * keys / 2 * kLanes);
    if (tiles) {
      s.q_rows = arena.take<float>(dim / W * kTiledRows.vec);
      s.g_rows = arena.take<float>(dim_v / W * kTiledRows.vec);
    }
  } else if (sizeof(T) == 2) {
    s.k = arena.take<float>(kGradKeys * dim);
    s.v = arena.take<float>(kGradKeys * dim_v);
  }
  if (kForm && p.mask_kind != ScoreMask::none) s.bias = arena.take<float>(mask_scratch(keys));
  s.zeros = arena.take<float>(dim > dim_v ? dim : dim_v);
  return s;
}

#ifdef LLMOPS_HAS_TILES
// How many blocks do: what each holds is read again for every key, and what all keys hold once.
// Whichever of the two is larger should be read the less often.
template <Way kWay>
LLMOPS_INLINE int shared_blocks(const AttentionParams& p) {
  if (kWay == Way::tiles) return kGradShared;
  constexpr int64_t kMuch = 2 << 20;  // of the second-level cache
  const int64_t next = 2 * strips_size(kGradTiled, p.dim) + strips_size(kGradTiled, p.dim_v);
  const bool wide = p.dim + p.dim_v > 256;
  return !wide && p.keys / kGradTiled * next * 4 > kMuch ? kGradShared : 2;
}

// A group's keys and values, all blocks of them.
template <class T>
LLMOPS_INLINE void split_keys(const AttentionParams& p, const AttentionSequence& sequence,
                              int64_t group, const GradStrips& out) {
  const int64_t batch = group / p.kv_heads, head = group % p.kv_heads;
  for (int64_t key = 0; key < sequence.keys; key += kGradTiled) {
    const int64_t row = sequence.key_start + key, to = key / kGradTiled * out.next;
    const int64_t keys = min64(kGradTiled, sequence.keys - key);
    const T* k = row_at(static_cast<const T*>(p.k), p.k_stride, batch, head, row);
    const T* v = row_at(static_cast<const T*>(p.v), p.v_stride, batch, head, row);
    split_strips<true>({k, p.k_stride[2], 1, keys, p.dim}, out.k + to);
    split_strips<true>({k, 1, p.k_stride[2], p.dim, keys}, out.k_turned + to);
    split_strips<true>({v, p.v_stride[2], 1, keys, p.dim_v}, out.v + to);
  }
}
#endif

}  // namespace
}  // namespace llmops::cpu::LLMOPS_ISA
