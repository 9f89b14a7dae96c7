// Attention backward: one task is one (batch, kv head), or one part of its query blocks, so that dk
// and dv are summed by one thread in a fixed order. Formula: attention.h
//
// For each block of 64 queries and each block of 48 keys (by AMX 64, of fp32 32): S^T = K Q^T and
// dP^T = V dO^T with queries in lanes; P and dS element-wise from the saved log-sum-exp; dQ^T +=
// K^T dS^T with queries in lanes; dV += P dO and dK += dS Q with the head dimension in lanes, into
// fp32 sums over all keys; bf16 by tiles (AMX), in pairs or widened, as forward, and long fp32 by
// AMX in bf16 parts (attention_split.h), into which keys and values are split once for all queries.
// What the causal limit hides is skipped as in the forward. 10 * Tq * Tk * D flops per head.
#include "attention.h"

#include <type_traits>

#include "attention_amx.h"
#include "attention_bwd_rows.h"
#include "attention_bwd_split.h"
#include "attention_bwd_tiles.h"
#include "attention_dropout.h"
#include "attention_grad.h"
#include "attention_score.h"
#include "attention_split.h"
#include "attention_tile.h"
#include "simd.h"

namespace llmops::cpu::LLMOPS_ISA {
namespace {

template <bool kPairs, bool kNatural>
LLMOPS_OUTLINE void grad_block(const Scratch& s, int j, int visible, int keys, Vec factor) {
  grad_lanes<kNatural, true>(
      s.lanes, s.s, s.dp, j, visible, keys, factor,
      [&](int k, int count, Vec p0, Vec ds0, Vec p1, Vec ds1) __attribute__((always_inline)) {
        const int at = k * kLanes + j * W;
        if constexpr (kPairs) {
#ifdef LLMOPS_HAS_DOT_PAIRS
          // The row behind an odd last one is there, and overwritten or not read.
          store_halves(s.p16 + at, s.p16 + at + kLanes, narrow_pairs(p0, p1));
          const Vec both = narrow_pairs(ds0, ds1);
          store_halves(s.ds16 + at, s.ds16 + at + kLanes, both);
          store(s.ds_pairs + k / 2 * kLanes + j * W, merge_halves(both));
#endif
        } else {
          store(s.s + at, p0);
          store(s.dp + at, ds0);
          if (count == 2) {
            store(s.s + at + kLanes, p1);
            store(s.dp + at + kLanes, ds1);
          }
        }
      });
}

template <class T, Way kWay, bool kForm>
struct Backward {
  static constexpr bool kNatural = kForm, kPairs = kWay == Way::pairs || kWay == Way::tiles;
  static constexpr int64_t kKeys = kBlockKeys<kWay>;
  // Of scores.
  static constexpr LaneSteps kSteps = kWay == Way::tiles ? kTiledSteps : kSideBySide;
  const AttentionGradParams& g;
  const AttentionParams& p;
  const Scratch& s;
  QueryBlock& block;
  float *dk, *dv;  // [Tk][padded D], [Tk][padded Dv], fp32

  Vec factor() const { return set1(kNatural ? kLog2e : split_scale(p.scale).score * kLog2e); }

  // out [keys][64] = rows of k or v times packed queries; the rows as an operand.
  Cells products(const T* rows, int64_t stride, int keys, int64_t dim, float* copy, const float* b,
                 const int* visible, float* out) const {
    const Cells a = key_cells<T, kPairs>(rows, stride, keys, dim, copy);
    scores<kPairs>(a, b, kPairs ? (dim + 1) / 2 : dim, keys, block.vecs, visible, out, nullptr);
    return a;
  }

  // Scores of a block of keys, modified.
  Cells block_scores(int64_t key, int keys, int* visible) const {
    [[maybe_unused]] const T* k = key_run<T>(p, block, p.k, p.k_stride, key, keys).first;
    for (int j = 0; j < block.vecs; ++j) visible[j] = clamp_int(block.vec_limit[j] - key, 0, keys);
    Cells k_cells{};
    if constexpr (kWay == Way::split) {
#ifdef LLMOPS_HAS_TILES
      Cross of;
      Nothing nothing;
      const SplitBackward<kForm> all{p, &s, &block, 1, factor(), dk, dv};
      if (all.crosses(0, key, 0, of))
        all.products(s.split.k + all.strips_of(key), s.split.q, p.dim, of, s.s, nothing);
#endif
    } else if constexpr (kWay == Way::tiles) {
#ifdef LLMOPS_HAS_TILES
      const TileRows rows = tile_rows(k, p.k_stride[2], keys, p.dim, s.k);
      for (int j = 0; j < block.vecs; ++j)
        score_vector(rows, visible[j], s.q, p.dim, j, s.s + j * kSteps.vec);
#endif
    } else {
      k_cells = products(k, p.k_stride[2], keys, p.dim, s.k, s.q, visible, s.s);
    }
    if (kForm || block.cuts(key, keys))
      modify_scores<kForm>(p, block, key, keys, visible, s.s, s.bias, nullptr, s.lanes.slope,
                           kSteps);
    return k_cells;
  }

  float sink_weight(int i) const { return exp_scalar(p.sinks[block.head[i]] - s.lanes.lse[i]); }

  // Where lse does not resolve P: the maximum of these scores takes its place, which the forward
  // may have summed up in another order, and what P is then to be divided by goes to `norm`.
  void normalize() const {
    for (int i = 0; i < block.count; ++i) {
      if (s.lanes.lse[i] == kInf) continue;  // saw nothing
      s.lanes.lse[i] = p.sinks ? p.sinks[block.head[i]] : -kInf;
      s.lanes.norm[i] = s.lanes.lse[i] == -kInf ? 0.0f : 1.0f;
    }
    int visible[kBlockVecs];
    // Strips hold whole blocks of keys.
    const int64_t begin = kWay == Way::split ? block.begin / kKeys * kKeys : block.begin;
    for (int64_t key = begin; key < block.end; key += kKeys) {
      block_scores(key, static_cast<int>(min64(kKeys, block.end - key)), visible);
      for (int j = 0; j < block.vecs; ++j) {
        const float* score = s.s + j * kSteps.vec;
        const Vec before = load(s.lanes.lse + j * W);
        Vec top = before;
        for (int k = 0; k < visible[j]; ++k) top = max(load(score + k * kSteps.row), top);
        // Not inf - inf, of either sign.
        const Vec shift = select(equal(top, set1(-kInf)), zero(), top);
        const Vec fade = select(equal(before, top), zero(), before - shift);
        Vec sum = load(s.lanes.norm + j * W) * exp2_softmax(fade * factor());
        for (int k = 0; k < visible[j]; ++k)
          sum = sum + probability<kNatural>(load(score + k * kSteps.row), shift, factor());
        store(s.lanes.lse + j * W, top);
        store(s.lanes.norm + j * W, sum);
      }
    }
    for (int j = 0; j < block.vecs; ++j) {
      const Vec sum = load(s.lanes.norm + j * W);
      store(s.lanes.norm + j * W, select(equal(sum, zero()), zero(), set1(1.0f) / sum));
    }
  }

  void add_keys(int64_t key, int keys) const {
    [[maybe_unused]] const T* k = key_run<T>(p, block, p.k, p.k_stride, key, keys).first;
    [[maybe_unused]] const T* v = key_run<T>(p, block, p.v, p.v_stride, key, keys).first;
    const int64_t dim = padded(p.dim), dim_v = padded(p.dim_v);
    int visible[kBlockVecs];
    Cells k_cells = block_scores(key, keys, visible);
    products(v, p.v_stride[2], keys, p.dim_v, s.v, s.g, visible, s.dp);
    if (kForm && s.lanes.keep) dropout_weights(p, block, key, visible, s.lanes.keep);
    for (int j = 0; j < block.vecs; ++j)
      if (visible[j] > 0) grad_block<kPairs, kNatural>(s, j, visible[j], keys, factor());

    const Cells p_cells = kPairs ? cells(s.p16, kLanes * 2, 4) : cells(s.s, kLanes * 4, 4);
    const Cells ds_cells = kPairs ? cells(s.ds16, kLanes * 2, 4) : cells(s.dp, kLanes * 4, 4);
    add_to_keys<kPairs>(p_cells, s.g_rows, dim_v, block, visible, keys, dv + key * dim_v);
    add_to_keys<kPairs>(ds_cells, s.q_rows, dim, block, visible, keys, dk + key * dim);
    if constexpr (kPairs) {
#ifdef LLMOPS_HAS_DOT_PAIRS
      pack_row_pairs([&](int64_t i) { return k + i * p.k_stride[2]; }, keys, p.dim, s.k_pairs,
                     {dim, W});
      k_cells = cells(s.k_pairs, dim * 4, 4);
      for (int j = 0; j < block.vecs; ++j) visible[j] = (visible[j] + 1) / 2;
#endif
    }
    // dQ^T[d] sums over keys: the same cells, rows and steps exchanged.
    update_lanes<kPairs>(cells(k_cells.base, 4, k_cells.row), p.dim, kPairs ? s.ds_pairs : s.dp,
                         block.vecs, visible, s.dq, nullptr);
  }

  void begin_rows(int64_t group, int64_t index) const {
    begin_block(p, group, index, block);
    const T *q[kLanes], *grad[kLanes];
    begin_grad_block<T, kNatural>(g, block, static_cast<const T*>(s.zeros), s.lanes, q, grad);
    const float sign = split_scale(p.scale).query;
    const int64_t dim = padded(p.dim), dim_v = padded(p.dim_v);
    if constexpr (kPairs) {
#ifdef LLMOPS_HAS_DOT_PAIRS
      pack_lane_pairs(q, block.count, p.dim, sign < 0.0f, lane_steps<kWay>(dim / 2), s.q);
      pack_lane_pairs(grad, block.count, p.dim_v, false, lane_steps<kWay>(dim_v / 2), s.g);
      const int64_t rows = kWay == Way::tiles ? round_up(block.count, 32) : block.count;
      for (int64_t i = block.count; i < rows; ++i) q[i] = grad[i] = static_cast<const T*>(s.zeros);
      const auto steps = [](int64_t dim) {
        return kWay == Way::tiles ? kTiledRows : LaneSteps{dim, W};
      };
      pack_row_pairs([&](int64_t i) { return q[i]; }, rows, p.dim, s.q_rows, steps(dim));
      pack_row_pairs([&](int64_t i) { return grad[i]; }, rows, p.dim_v, s.g_rows, steps(dim_v));
#endif
    } else {
      pack_lanes(q, block.count, p.dim, sign, s.q);
      pack_lanes(grad, block.count, p.dim_v, 1.0f, s.g);
      for (int i = 0; i < block.count; ++i) {
        widen_rows(q[i], 0, 1, p.dim, s.q_rows + i * dim, dim);
        widen_rows(grad[i], 0, 1, p.dim_v, s.g_rows + i * dim_v, dim_v);
      }
#ifdef LLMOPS_HAS_TILES
      if constexpr (kWay == Way::split) {
        split_strips<false>({s.q, 1, kLanes, block.vecs * W, p.dim}, s.split.q);
        split_strips<false>({s.g, 1, kLanes, block.vecs * W, p.dim_v}, s.split.g);
        split_strips<false>({s.q_rows, 1, dim, dim, block.count}, s.split.q_rows);
        split_strips<false>({s.g_rows, 1, dim_v, dim_v, block.count}, s.split.g_rows);
      }
#endif
    }
    const LaneSteps steps = lane_steps<kWay>(dim);
    // Two vectors share a strip, though the second may hold no row.
    for (int j = 0; j < (kWay == Way::split ? kBlockVecs : block.vecs); ++j) {
      const int64_t rows = round_up(p.dim, kWholeRows<kWay>);
      for (int64_t d = 0; d < rows; ++d) store(s.dq + d * steps.row + j * steps.vec, zero());
      store(s.factor + j * W, set1(p.scale));
    }
    if (kNatural && needs_norm(block, s.lanes)) normalize();
    if (kForm && g.dsink) {
      for (int i = 0; i < block.count; ++i)
        g.dsink[lse_at(p, block, i)] = -sink_weight(i) * s.lanes.norm[i] * s.lanes.delta[i];
    }
  }

  void finish_rows() const {
    T* dq[kLanes];
    block_rows(block, static_cast<T*>(g.dq), g.dq_stride, dq);
    unpack_lanes(s.dq, lane_steps<kWay>(padded(p.dim)), block.count, p.dim, s.factor, dq);
  }

  void run_block(int64_t group, int64_t index) const {
    begin_rows(group, index);
    for (int64_t key = block.begin; key < block.end; key += kKeys)
      add_keys(key, static_cast<int>(min64(kKeys, block.end - key)));
    finish_rows();
  }
};

LLMOPS_INLINE void fill_zero(float* p, int64_t n) { __builtin_memset(p, 0, n * sizeof(float)); }

// Row `key` of dk and dv from its fp32 sums.
template <class T>
LLMOPS_INLINE void write_row(const AttentionGradParams& g, const AttentionSequence& sequence,
                             int64_t group, int64_t key, const float* dk, const float* dv) {
  const AttentionParams& p = g.fwd;
  const int64_t batch = group / p.kv_heads, head = group % p.kv_heads;
  key += sequence.key_start;
  T* dk_row = row_at(static_cast<T*>(g.dk), g.dk_stride, batch, head, key);
  T* dv_row = row_at(static_cast<T*>(g.dv), g.dv_stride, batch, head, key);
  for (int64_t d = 0; d < p.dim; d += W)
    store_some(dk_row + d, load(dk + d) * set1(p.scale), p.dim - d);
  for (int64_t d = 0; d < p.dim_v; d += W) store_some(dv_row + d, load(dv + d), p.dim_v - d);
}

LLMOPS_INLINE AttentionTask task_of_grad(const AttentionParams& p, int64_t task) {
  return p.tasks ? p.tasks[task] : AttentionTask{task / p.plan.parts, task % p.plan.parts, 0};
}

#ifdef LLMOPS_HAS_TILES
// A group's blocks of queries from `index` on, `step` apart. rows: scratch of as many as share
// keys.
template <class T, Way kWay, bool kForm>
void run_shared(const AttentionGradParams& g, const AttentionSequence& sequence, int64_t group,
                int64_t index, int64_t step, const Scratch* rows, float* dk, float* dv) {
  using Block = Backward<T, kWay, kForm>;
  using Shared = std::conditional_t<kWay == Way::split, SplitBackward<kForm>, TiledBackward<kForm>>;
  const int shared = shared_blocks<kWay>(g.fwd);
  QueryBlock block[kGradShared];
  begin_tiles();
  if constexpr (kWay == Way::split) split_keys<T>(g.fwd, sequence, group, rows[0].split);
  while (index < sequence.plan.blocks) {
    int count = 0;
    for (; count < shared && index < sequence.plan.blocks; ++count, index += step)
      Block{g, g.fwd, rows[count], block[count], dk, dv}.begin_rows(group, index);
    const Vec factor = Block{g, g.fwd, rows[0], block[0], dk, dv}.factor();
    Shared{g.fwd, rows, block, count, factor, dk, dv}.run();
    for (int i = 0; i < count; ++i) Block{g, g.fwd, rows[i], block[i], dk, dv}.finish_rows();
  }
  end_tiles();
}
#endif

template <class T, Way kWay, bool kForm>
LLMOPS_OUTLINE void run(const AttentionGradParams& g, int64_t task, void* scratch) {
  const AttentionParams& p = g.fwd;
  Arena arena{static_cast<char*>(scratch)};
  const Scratch s = layout<T, kWay, kForm>(p, arena);
  const int64_t dim = padded(p.dim), dim_v = padded(p.dim_v);
  const AttentionTask of = task_of_grad(p, task);
  const AttentionSequence sequence = sequence_of(p, of.group / p.kv_heads);
  const int64_t keys = sequence.keys, parts = sequence.plan.parts;
  const int64_t start = partial_start(p, sequence, of.group, parts * keys) + of.index * keys;
  float *dk, *dv;
  if (parts > 1) {
    dk = g.partial + start * (dim + dim_v);
    dv = dk + keys * dim;
  } else {
    dk = arena.take<float>(keys * dim);
    dv = arena.take<float>(keys * dim_v);
  }
  fill_zero(dk, keys * dim);
  fill_zero(dv, keys * dim_v);
  fill_zero(static_cast<float*>(s.zeros), dim > dim_v ? dim : dim_v);
  if constexpr (kWay == Way::split || kWay == Way::tiles) {
#ifdef LLMOPS_HAS_TILES
    Scratch rows[kGradShared] = {s};
    for (int i = 1; i < shared_blocks<kWay>(p); ++i) {
      rows[i] = s;
      layout_rows<kWay>(p, arena, rows[i]);
      if (kWay == Way::tiles) {
        rows[i].q_rows = s.q_rows + i * kBlockRowPairs;
        rows[i].g_rows = s.g_rows + i * kBlockRowPairs;
      }
    }
    run_shared<T, kWay, kForm>(g, sequence, of.group, of.index, parts, rows, dk, dv);
#endif
  } else {
    QueryBlock block;
    const Backward<T, kWay, kForm> backward{g, p, s, block, dk, dv};
    for (int64_t index = of.index; index < sequence.plan.blocks; index += parts)
      backward.run_block(of.group, index);
  }
  if (parts > 1) return;
  for (int64_t key = 0; key < keys; ++key)
    write_row<T>(g, sequence, of.group, key, dk + key * dim, dv + key * dim_v);
}

// Whether the plain form can take P from the group's log-sum-exps: the modified one normalizes.
LLMOPS_OUTLINE bool is_resolved(const AttentionParams& p, int64_t task) {
  const int64_t group = task_of_grad(p, task).group, batch = group / p.kv_heads;
  const int64_t heads = p.heads / p.kv_heads, first = group % p.kv_heads * heads;
  const AttentionSequence sequence = sequence_of(p, batch);
  bool resolved = true;
  for (int64_t head = first; head < first + heads; ++head) {
    const float* lse = p.lse + lse_at(p, sequence, batch, head, 0);
    for (int64_t t = 0; t < sequence.queries; ++t)
      resolved = resolved && (lse[t] == -kInf || __builtin_fabsf(lse[t]) <= kLseResolves);
  }
  return resolved;
}

template <class T, Way kWay>
LLMOPS_INLINE void dispatch(const AttentionGradParams& g, int64_t task, void* scratch) {
  if (is_modified(g.fwd) || !is_resolved(g.fwd, task)) {
    run<T, kWay, kModified>(g, task, scratch);
  } else {
    run<T, kWay, kPlain>(g, task, scratch);
  }
}

}  // namespace

int64_t attention_bwd_width(const AttentionParams& p) { return padded(p.dim) + padded(p.dim_v); }

int64_t attention_bwd_scratch(const AttentionGradParams& g) {
  Arena arena{nullptr}, pairs{nullptr};
  layout<bf16, Way::widened, kModified>(g.fwd, arena);
  if (g.fwd.type != DType::f32)
    layout<bf16, kHasTiles ? Way::tiles : Way::pairs, kModified>(g.fwd, pairs);
#ifdef LLMOPS_HAS_TILES
  Scratch other{};
  for (int i = 1; g.fwd.type == DType::bf16 && i < shared_blocks<Way::tiles>(g.fwd); ++i)
    layout_rows<Way::tiles>(g.fwd, pairs, other);
  // Strips of all keys are large: not for sequences none of which takes them.
  if (takes_split(g.fwd, {0, g.fwd.queries, 0, g.fwd.keys, nullptr, g.fwd.plan, 0})) {
    layout<float, Way::split, kModified>(g.fwd, pairs);
    for (int i = 1; i < shared_blocks<Way::split>(g.fwd); ++i)
      layout_rows<Way::split>(g.fwd, pairs, other);
  }
#endif
  if (pairs.next > arena.next) arena.next = pairs.next;
  const bool all_in_parts = !g.fwd.sequences && g.fwd.plan.parts > 1;
  if (!all_in_parts) {
    arena.take<float>(g.fwd.keys * padded(g.fwd.dim));
    arena.take<float>(g.fwd.keys * padded(g.fwd.dim_v));
  }
  return arena.next - static_cast<char*>(nullptr);
}

void attention_bwd(const AttentionGradParams& g, int64_t task, void* scratch) {
  if constexpr (kHasPairs) {
    switch (way_of(g.fwd)) {
      case Way::pairs:
        return dispatch<bf16, Way::pairs>(g, task, scratch);
      case Way::tiles:
        return dispatch<bf16, kHasTiles ? Way::tiles : Way::pairs>(g, task, scratch);
      case Way::split:
      case Way::widened:
        break;
    }
  }
#ifdef LLMOPS_HAS_TILES
  const int64_t group = task_of_grad(g.fwd, task).group;
  if (takes_split(g.fwd, sequence_of(g.fwd, group / g.fwd.kv_heads)))
    return dispatch<float, Way::split>(g, task, scratch);
#endif
  LLMOPS_DISPATCH(g.fwd.type, T, (dispatch<T, Way::widened>(g, task, scratch)));
}

void attention_bwd_combine(const AttentionGradParams& g, int64_t begin, int64_t end) {
  const AttentionParams& p = g.fwd;
  const int64_t dim = padded(p.dim), dim_v = padded(p.dim_v);
  for (int64_t r = begin; r < end; ++r) {
    const int64_t group = r / p.keys, key = r % p.keys;
    const AttentionSequence sequence = sequence_of(p, group / p.kv_heads);
    const int64_t keys = sequence.keys, parts = sequence.plan.parts, stride = keys * (dim + dim_v);
    if (key >= keys || parts == 1) continue;
    float* first = g.partial + partial_start(p, sequence, group, parts * keys) * (dim + dim_v);
    float *dk = first + key * dim, *dv = first + keys * dim + key * dim_v;
    for (int64_t part = 1; part < parts; ++part) {
      for (int64_t d = 0; d < dim; d += W)
        store(dk + d, load(dk + d) + load(dk + part * stride + d));
      for (int64_t d = 0; d < dim_v; d += W)
        store(dv + d, load(dv + d) + load(dv + part * stride + d));
    }
    LLMOPS_DISPATCH(p.type, T, (write_row<T>(g, sequence, group, key, dk, dv)));
  }
}

}  // namespace llmops::cpu::LLMOPS_ISA
