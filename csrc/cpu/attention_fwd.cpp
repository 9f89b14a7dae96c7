// Attention forward: one task is a block of 64 query rows against all keys they see (or one part
// of them). Formula: attention.h
//
// Keys come in blocks of up to 96: S^T = K Q^T, the block's maximum per query, P = 2^(S - m) with
// scale * log2 e folded in, O^T = O^T * alpha + V^T P. Key groups that the causal limit hides from
// a whole vector of queries are skipped in all three. fp32 accumulation throughout; bf16 multiplies
// by AMX (attention_fwd_tiles.h) or in pairs (vdpbf16ps) where the processor can and is widened
// elsewhere, as fp16 always is. Long fp32 goes through AMX in three bf16 parts
// (attention_fwd_split.h).
// 4 * Tq * Tk * D flops per head; K and V are read once per 64 queries.
#include "attention.h"

#include "attention_dropout.h"
#include "attention_fwd_rows.h"
#include "attention_fwd_split.h"
#include "attention_fwd_tiles.h"
#include "attention_score.h"
#include "attention_tile.h"
#include "simd.h"

namespace llmops::cpu::LLMOPS_ISA {
namespace {

// Keys [key, key + keys) for the block's rows.
template <class T, Way kWay, bool kForm>
LLMOPS_INLINE void add_keys(const AttentionParams& p, const QueryBlock& block, const Scratch& s,
                            int64_t key, int keys) {
  constexpr bool kNatural = kForm, kPairs = kWay == Way::pairs;
  const KeyRows<T> k =
      key_rows(p, block, p.k, p.k_stride, key, keys, p.dim, static_cast<T*>(s.k_page));
  const KeyRows<T> v =
      key_rows(p, block, p.v, p.v_stride, key, keys, p.dim_v, static_cast<T*>(s.v_page));
  const int64_t dim = round_up(p.dim, 2 * W), dim_v = round_up(p.dim_v, 2 * W);
  constexpr int64_t kSize = sizeof(T);
  int visible[kBlockVecs];
  for (int j = 0; j < block.vecs; ++j) {
    visible[j] = clamp_int(block.vec_limit[j] - key, 0, keys);
    store(s.top + j * W, set1(-kInf));
  }

  Cells k_cells = cells(k.first, k.stride * kSize, 4);
  int64_t k_steps = p.dim;
  if constexpr (kPairs) {
#ifdef LLMOPS_HAS_DOT_PAIRS
    k_steps = (p.dim + 1) / 2;
    if (p.dim % 2) {
      copy_rows(k.first, k.stride, keys, p.dim, reinterpret_cast<bf16*>(s.k), dim);
      k_cells = cells(s.k, dim * 2, 4);
    }
#endif
  } else if constexpr (sizeof(T) == 2) {
    widen_rows(k.first, k.stride, keys, p.dim, s.k, dim);
    k_cells = cells(s.k, dim * 4, 4);
  }
  scores<kPairs>(k_cells, s.q, k_steps, keys, block.vecs, visible, s.s, s.top);

  if (kForm || block.cuts(key, keys))
    modify_scores<kForm>(p, block, key, keys, visible, s.s, s.bias, s.top, nullptr);
  if (kForm && s.keep) dropout_weights(p, block, key, visible, s.keep);
  const Vec factor = set1(kNatural ? kLog2e : split_scale(p.scale).score * kLog2e);
  for (int j = 0; j < block.vecs; ++j) {
    if (visible[j] == 0) continue;
    const Vec alpha = softmax_lanes<kPairs, kNatural, kLanes>(
        s, j, visible[j], factor, load(s.top + j * W), s.s + j * W, s.pairs + j * W);
    store(s.alpha + j * W, alpha);
  }

  Cells v_cells = cells(v.first, 4, v.stride * 4);
  if constexpr (kPairs) {
#ifdef LLMOPS_HAS_DOT_PAIRS
    for (int j = 0; j < block.vecs; ++j) visible[j] = (visible[j] + 1) / 2;
    pack_row_pairs([&](int64_t i) { return v.first + i * v.stride; }, keys, p.dim_v, s.v,
                   {dim_v, W});
    v_cells = cells(s.v, 4, dim_v * 4);
#endif
  } else if constexpr (sizeof(T) == 2) {
    widen_rows(v.first, v.stride, keys, p.dim_v, s.v, dim_v);
    v_cells = cells(s.v, 4, dim_v * 4);
  }
  update_lanes<kPairs>(v_cells, p.dim_v, kPairs ? s.pairs : s.s, block.vecs, visible, s.o, s.alpha);
}

// Whether it could: false, and nothing written, where the plain form does not resolve a row.
template <class T, Way kWay, bool kForm>
bool run(const AttentionParams& p, int64_t task, void* scratch) {
  Arena arena{static_cast<char*>(scratch)};
  const Scratch s = layout<T, kWay, kForm>(p, arena);
  const auto [group, index, split] = task_of(p, task);
  QueryBlock block;
  begin_block(p, group, index, block);
  begin_rows<T, kWay, kForm>(p, block, s, split);
  for_keys<kWay>(block.sequence.plan, split, block.begin, block.end,
                 [&](int64_t key, int keys) { add_keys<T, kWay, kForm>(p, block, s, key, keys); });
  return finish_rows<T, kWay, kForm>(p, block, s, group, split);
}

template <class T, Way kWay>
LLMOPS_INLINE void dispatch(const AttentionParams& p, int64_t task, void* scratch) {
  if (is_modified(p) || !run<T, kWay, kPlain>(p, task, scratch))
    run<T, kWay, kModified>(p, task, scratch);
}

}  // namespace

int64_t attention_fwd_scratch(const AttentionParams& p) {
  Arena widened{nullptr}, paired{nullptr}, tiled{nullptr};
  const bool single = p.type == DType::f32;
  if (single) {
    layout<float, Way::widened, kModified>(p, widened);
  } else {
    layout<bf16, Way::widened, kModified>(p, widened);
    layout<bf16, Way::pairs, kModified>(p, paired);
  }
#ifdef LLMOPS_HAS_TILES
  Scratch other{};
  if (single) {
    layout<float, Way::split, kModified>(p, tiled);
    for (int i = 1; i < kShared; ++i) layout_rows<Way::split>(p, tiled, other);
  } else {
    layout<bf16, Way::tiles, kModified>(p, tiled);
    for (int i = 1; i < kShared; ++i) layout_rows<Way::tiles>(p, tiled, other);
  }
#endif
  const auto bytes = [](const Arena& arena) { return arena.next - static_cast<char*>(nullptr); };
  return max64(bytes(widened), max64(bytes(paired), bytes(tiled)));
}

void attention_fwd(const AttentionParams& p, int64_t task, void* scratch) {
  if constexpr (kHasPairs) {
    switch (way_of(p)) {
      case Way::pairs:
        return dispatch<bf16, Way::pairs>(p, task, scratch);
      case Way::tiles:
#ifdef LLMOPS_HAS_TILES
        if (is_modified(p) || !run_tiled<kPlain>(p, task, scratch))
          run_tiled<kModified>(p, task, scratch);
        return;
#endif
      case Way::split:
      case Way::widened:
        break;
    }
  }
#ifdef LLMOPS_HAS_TILES
  if (takes_split(p, sequence_of(p, task_of(p, task).group / p.kv_heads))) {
    if (is_modified(p) || !run_split<kPlain>(p, task, scratch))
      run_split<kModified>(p, task, scratch);
    return;
  }
#endif
  LLMOPS_DISPATCH(p.type, T, (dispatch<T, Way::widened>(p, task, scratch)));
}

}  // namespace llmops::cpu::LLMOPS_ISA
