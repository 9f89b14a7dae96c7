// Attention forward: one task is a block of 64 query rows against all keys they see (or one part
// of them). Formula: attention.h
//
// Keys come in blocks of up to 96: S^T = K Q^T, the block's maximum per query, P = 2^(S - m) with
// scale * log2 e folded in, O^T = O^T * alpha + V^T P. Key groups that the causal limit hides from
// a whole vector of queries are skipped in all three. fp32 accumulation throughout; bf16 multiplies
// by tiles (AMX) or in pairs (vdpbf16ps) where the processor can and is widened elsewhere, as fp16
// always is.
// 4 * Tq * Tk * D flops per head; K and V are read once per 64 queries.
#include "attention.h"

#include "attention_amx.h"
#include "attention_dropout.h"
#include "attention_score.h"
#include "attention_tile.h"
#include "simd.h"

namespace llmops::cpu::LLMOPS_ISA {
namespace {

constexpr int64_t kKeys = 96;  // of one block: S and V stay in the first-level cache

struct Scratch {
  float* q;                    // [padded D][64], or pairs [padded D / 2][64]
  float* s;                    // [kKeys][64]: scores, then probabilities
  float* pairs;                // [kKeys / 2][64]: probabilities as bf16 pairs
  float* o;                    // [padded Dv][64]
  float *k, *v;                // a block of keys and values, widened or paired
  void *k_page, *v_page;       // the same as they come, from several pages
  float* bias;                 // the mask of a block
  float* keep;                 // [kKeys][64], or null without dropout
  float *m, *l, *alpha, *top;  // [64]
};

template <class T, Way kWay, bool kForm>
LLMOPS_INLINE Scratch layout(const AttentionParams& p, Arena& arena) {
  const int64_t dim = round_up(p.dim, 2 * W), dim_v = round_up(p.dim_v, 2 * W);
  Scratch s{};
  s.q = arena.take<float>(dim * kLanes);
  s.s = arena.take<float>(kKeys * kLanes);
  s.o = arena.take<float>(dim_v * kLanes);
  if (kWay != Way::widened) {
    s.pairs = arena.take<float>(kKeys / 2 * kLanes);
    s.k = arena.take<float>(p.dim % 2 || kWay == Way::tiles ? kKeys * dim / 2 : 0);
    s.v = arena.take<float>(kKeys / 2 * dim_v);
  } else if (sizeof(T) == 2) {
    s.k = arena.take<float>(kKeys * dim);
    s.v = arena.take<float>(kKeys * dim_v);
  }
  if (p.page > 0) {
    s.k_page = arena.take<T>(kKeys * p.dim);
    s.v_page = arena.take<T>(kKeys * p.dim_v);
  }
  if (kForm && p.mask_kind != ScoreMask::none) s.bias = arena.take<float>(mask_scratch(kKeys));
  if (kForm && p.dropout.active) s.keep = arena.take<float>(kKeys * kLanes);
  s.m = arena.take<float>(kLanes);
  s.l = arena.take<float>(kLanes);
  s.alpha = arena.take<float>(kLanes);
  s.top = arena.take<float>(kLanes);
  return s;
}

// Probabilities of vector j's first `keys` keys, in place or as pairs; m, l and alpha follow.
template <bool kPairs, bool kNatural>
LLMOPS_OUTLINE void softmax_lanes(const Scratch& s, int j, int keys, Vec factor) {
  const Vec before = load(s.m + j * W), top = load(s.top + j * W);
  // Plain blocks keep m in units of log2 (factor applied), modified ones in natural units: an
  // additive mask may hold the lowest finite number, which times log2 e would be -inf.
  const Vec m = max(kNatural ? top : top * factor, before);
  // Nothing seen yet: -inf - -inf would be NaN.
  const Vec shift = select(equal(m, set1(-kInf)), zero(), m);
  const Vec alpha = exp2_softmax(kNatural ? (before - shift) * factor : before - shift);
  store(s.m + j * W, m);
  store(s.alpha + j * W, alpha);
  const Vec minus = zero() - shift;
  const auto probability = [&](int k) __attribute__((always_inline)) {
    const Vec x = load(s.s + k * kLanes + j * W);
    return exp2_softmax(kNatural ? (x - shift) * factor : fma(x, factor, minus));
  };
  // Dropout spares the normalizer: what is summed is not what multiplies V.
  const auto kept = [&](int k, Vec x) __attribute__((always_inline)) {
    if constexpr (!kNatural) return x;
    return s.keep ? x * load(s.keep + k * kLanes + j * W) : x;
  };
  Vec sum0 = load(s.l + j * W) * alpha, sum1 = zero();
  int k = 0;
  _Pragma("GCC unroll 4") for (; k + 2 <= keys; k += 2) {
    Vec a = probability(k), b = probability(k + 1);
    sum0 = sum0 + a;
    sum1 = sum1 + b;
    a = kept(k, a), b = kept(k + 1, b);
    if constexpr (kPairs) {
#ifdef LLMOPS_HAS_DOT_PAIRS
      store(s.pairs + k / 2 * kLanes + j * W, make_pairs(a, b));
#endif
    } else {
      store(s.s + k * kLanes + j * W, a);
      store(s.s + (k + 1) * kLanes + j * W, b);
    }
  }
  if (k < keys) {
    Vec a = probability(k);
    sum0 = sum0 + a;
    a = kept(k, a);
    if constexpr (kPairs) {
#ifdef LLMOPS_HAS_DOT_PAIRS
      store(s.pairs + k / 2 * kLanes + j * W, make_pairs(a, zero()));
#endif
    } else {
      store(s.s + k * kLanes + j * W, a);
    }
  }
  store(s.l + j * W, sum0 + sum1);
}

// Keys [key, key + keys) for the block's rows.
template <class T, Way kWay, bool kForm>
LLMOPS_INLINE void add_keys(const AttentionParams& p, const QueryBlock& block, const Scratch& s,
                            int64_t key, int keys) {
  constexpr bool kNatural = kForm, kPairs = kWay != Way::widened;
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

  const bool cut = kForm || block.cuts(key, keys);
  Cells k_cells = cells(k.first, k.stride * kSize, 4);
  int64_t k_steps = p.dim;
  if constexpr (kWay == Way::tiles) {
#ifdef LLMOPS_HAS_TILES
    k_cells = tile_rows(k.first, k.stride, keys, p.dim, s.k);
    scores_by_tiles(k_cells.base, k_cells.row, s.q, dim / kDepth, keys, block.vecs, visible, s.s,
                    cut ? nullptr : s.top);
#endif
  } else if constexpr (kPairs) {
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
  if constexpr (kWay != Way::tiles)
    scores<kPairs>(k_cells, s.q, k_steps, keys, block.vecs, visible, s.s, s.top);

  if (cut) modify_scores<kForm>(p, block, key, keys, visible, s.s, s.bias, s.top, nullptr);
  if (kForm && s.keep) dropout_weights(p, block, key, visible, s.keep);
  const Vec factor = set1(kNatural ? kLog2e : split_scale(p.scale).score * kLog2e);
  for (int j = 0; j < block.vecs; ++j) {
    if (visible[j] > 0) softmax_lanes<kPairs, kNatural>(s, j, visible[j], factor);
  }

#ifdef LLMOPS_HAS_TILES
  if constexpr (kWay == Way::tiles) {
    transpose_rows(v.first, v.stride, keys, p.dim_v, s.v, kKeys / 2);
    update_by_tiles(s.v, kKeys / 2, p.dim_v, s.pairs, block.vecs, visible, s.o, s.alpha);
    return;
  }
#endif
  Cells v_cells = cells(v.first, 4, v.stride * 4);
  if constexpr (kPairs) {
#ifdef LLMOPS_HAS_DOT_PAIRS
    for (int j = 0; j < block.vecs; ++j) visible[j] = (visible[j] + 1) / 2;
    pack_row_pairs([&](int64_t i) { return v.first + i * v.stride; }, keys, p.dim_v, s.v, dim_v);
    v_cells = cells(s.v, 4, dim_v * 4);
#endif
  } else if constexpr (sizeof(T) == 2) {
    widen_rows(v.first, v.stride, keys, p.dim_v, s.v, dim_v);
    v_cells = cells(s.v, 4, dim_v * 4);
  }
  update_lanes<kPairs>(v_cells, p.dim_v, kPairs ? s.pairs : s.s, block.vecs, visible, s.o, s.alpha);
}

template <class T, Way kWay, bool kForm>
void run(const AttentionParams& p, int64_t task, void* scratch) {
  Arena arena{static_cast<char*>(scratch)};
  const Scratch s = layout<T, kWay, kForm>(p, arena);
  const auto [group, index, split] = task_of(p, task);
  QueryBlock block;
  begin_block(p, group, index, block);
  const AttentionPlan& plan = block.sequence.plan;

  const T* row[kLanes];
  block_rows(block, static_cast<const T*>(p.q), p.q_stride, row);
  const float sign = split_scale(p.scale).query;
  if constexpr (kWay != Way::widened) {
#ifdef LLMOPS_HAS_DOT_PAIRS
    pack_lane_pairs(row, block.count, p.dim, sign < 0.0f, s.q);
#endif
  } else {
    pack_lanes(row, block.count, p.dim, sign, s.q);
  }
  for (int j = 0; j < block.vecs; ++j) {
    store(s.m + j * W, set1(-kInf));
    store(s.l + j * W, zero());
    // Tiles are whole.
    const int64_t rows = kWay == Way::tiles ? round_up(p.dim_v, 16) : p.dim_v;
    for (int64_t d = 0; d < rows; ++d) store(s.o + d * kLanes + j * W, zero());
  }

  if (kForm && p.sinks && split == 0) {  // a key of weight exp(sink) and value 0, seen first
    for (int i = 0; i < block.count; ++i) {
      s.m[i] = p.sinks[block.head[i]];
      s.l[i] = s.m[i] == -kInf ? 0.0f : 1.0f;
    }
  }

  const int64_t part = plan.first_key + split * plan.split_keys;
  const int64_t begin = max64(block.begin, part);
  const int64_t end = min64(block.end, part + plan.split_keys);
  if (end > begin) {
    // Blocks of equal size, so that the last one is not a sliver.
    const int64_t blocks = (end - begin + kKeys - 1) / kKeys;
    const int64_t whole = kWay == Way::tiles ? 32 : kTileRows;
    const int64_t step = round_up((end - begin + blocks - 1) / blocks, whole);
#ifdef LLMOPS_HAS_TILES
    if (kWay == Way::tiles) begin_tiles();
#endif
    for (int64_t key = begin; key < end; key += step)
      add_keys<T, kWay, kForm>(p, block, s, key, static_cast<int>(min64(step, end - key)));
#ifdef LLMOPS_HAS_TILES
    if (kWay == Way::tiles) end_tiles();
#endif
  }

  const float unit = kForm ? 1.0f : kLn2;
  float lse[kLanes];
  for (int j = 0; j < block.vecs; ++j) {
    const Vec l = load(s.l + j * W);
    // A row that saw nothing has l = 0: its factor 0 makes it zeros.
    store(s.alpha + j * W, select(equal(l, zero()), zero(), set1(1.0f) / l));
  }
  for (int i = 0; i < block.count; ++i)
    lse[i] = s.l[i] == 0.0f ? -kInf : s.m[i] * unit + __builtin_logf(s.l[i]);
  if (plan.splits == 1) {
    T* out[kLanes];
    block_rows(block, static_cast<T*>(p.out), p.out_stride, out);
    unpack_lanes(s.o, block.count, p.dim_v, s.alpha, out);
    for (int i = 0; i < block.count; ++i) p.lse[lse_at(p, block, i)] = lse[i];
  } else {
    const int64_t rows = p.heads / p.kv_heads * block.sequence.queries, width = p.dim_v + 1;
    const int64_t start = partial_start(p, block.sequence, group, plan.splits * rows);
    float* base = p.partial + (start + split * rows + block.first) * width;
    float* out[kLanes];
    for (int i = 0; i < block.count; ++i) out[i] = base + i * width;
    unpack_lanes(s.o, block.count, p.dim_v, s.alpha, out);
    for (int i = 0; i < block.count; ++i) out[i][p.dim_v] = lse[i];
  }
}

template <class T, Way kWay>
LLMOPS_INLINE void dispatch(const AttentionParams& p, int64_t task, void* scratch) {
  if (is_modified(p)) {
    run<T, kWay, kModified>(p, task, scratch);
  } else {
    run<T, kWay, kPlain>(p, task, scratch);
  }
}

}  // namespace

int64_t attention_fwd_scratch(const AttentionParams& p) {
  Arena widened{nullptr}, paired{nullptr};
  if (p.type == DType::f32) {
    layout<float, Way::widened, kModified>(p, widened);
  } else {
    layout<bf16, Way::widened, kModified>(p, widened);
  }
  layout<bf16, kHasTiles ? Way::tiles : Way::pairs, kModified>(p, paired);
  return max64(widened.next - static_cast<char*>(nullptr),
               paired.next - static_cast<char*>(nullptr));
}

void attention_fwd(const AttentionParams& p, int64_t task, void* scratch) {
  if constexpr (kHasPairs) {
    switch (way_of(p)) {
      case Way::pairs:
        return dispatch<bf16, Way::pairs>(p, task, scratch);
      case Way::tiles:
        return dispatch<bf16, kHasTiles ? Way::tiles : Way::pairs>(p, task, scratch);
      case Way::widened:
        break;
    }
  }
  LLMOPS_DISPATCH(p.type, T, (dispatch<T, Way::widened>(p, task, scratch)));
}

}  // namespace llmops::cpu::LLMOPS_ISA
