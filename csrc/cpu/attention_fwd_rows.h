// What attention's forward holds for a block of query rows: its scratch, how rows begin and end,
// and the blocks of keys that they see.
#pragma once
#include "attention_score.h"
#include "attention_split.h"
#include "attention_tile.h"

namespace llmops::cpu::LLMOPS_ISA {
namespace {

constexpr int kShared = 4;  // blocks of queries that share keys in strips
// Of one block: S, P and V stay near, and what is done once for each block is done seldom.
template <Way kWay>
constexpr int64_t kKeys = kWay == Way::split || kWay == Way::tiles ? 64 : 96;
// Tiles take one vector of queries after the other.
template <Way kWay>
constexpr int kRow = kWay == Way::tiles ? W : kLanes;

// What exponentials are taken relative to: the maximum so far, or one that it exceeds by so little
// that nothing overflows; then O need not be rescaled.
LLMOPS_INLINE Vec reference(Vec top, Vec before) {
  constexpr float kSlack = 5.0f;  // of an exponent to base 2 or e
  const Vec most = max(top, before);
  return select(less(before + set1(kSlack), most), most, before);
}
// The factor of what was summed relative to `before`, where that is anything.
LLMOPS_INLINE Vec rescaling(Vec before, Vec exponential) {
  return select(equal(before, set1(-kInf)), set1(1.0f), exponential);
}

struct Scratch {
  float* q;                    // [padded D][64], or pairs [padded D / 2][64]; lane_steps
  float* q_split;              // the strips of q
  float* s;                    // [kKeys][kRow]: scores, then probabilities
  float* pairs;                // [kKeys / 2][kRow]: probabilities as bf16 pairs; or a strip of s
  float* o;                    // [padded Dv][64]; lane_steps
  float *k, *v;                // a block of keys and values, widened, paired or in strips
  void *k_page, *v_page;       // the same as they come, from several pages
  float* bias;                 // the mask of a block
  float* keep;                 // [kKeys][64], or null without dropout
  float *m, *l, *alpha, *top;  // [64]
};

// What each block of rows has of its own.
template <Way kWay>
LLMOPS_INLINE void layout_rows(const AttentionParams& p, Arena& arena, Scratch& s) {
  s.q = arena.take<float>(round_up(p.dim, 2 * W) * kLanes);
  s.o = arena.take<float>(round_up(p.dim_v, 2 * W) * kLanes);
#ifdef LLMOPS_HAS_TILES
  if (kWay == Way::split) s.q_split = arena.take<float>(strips_size(kLanes, p.dim));
#endif
  s.m = arena.take<float>(kLanes);
  s.l = arena.take<float>(kLanes);
  s.alpha = arena.take<float>(kLanes);
  s.top = arena.take<float>(kLanes);
}

template <class T, Way kWay, bool kForm>
LLMOPS_INLINE Scratch layout(const AttentionParams& p, Arena& arena) {
  const int64_t dim = round_up(p.dim, 2 * W), dim_v = round_up(p.dim_v, 2 * W);
  Scratch s{};
  layout_rows<kWay>(p, arena, s);
  s.s = arena.take<float>((kWay == Way::split ? 2 : 1) * kKeys<kWay> * kRow<kWay>);
  if (kWay == Way::split) {
#ifdef LLMOPS_HAS_TILES
    s.pairs = arena.take<float>(2 * (kLanes / kPair) * strips_size(kPair, kKeys<kWay>));
    s.k = arena.take<float>(strips_size(kKeys<kWay>, p.dim));
    s.v = arena.take<float>(strips_size(p.dim_v, kKeys<kWay>));
#endif
  } else if (kWay != Way::widened) {
    s.pairs = arena.take<float>(kKeys<kWay> / 2 * kRow<kWay>);
    s.k = arena.take<float>(p.dim % 2 || kWay == Way::tiles ? kKeys<kWay> * dim / 2 : 0);
    s.v = arena.take<float>(kKeys<kWay> / 2 * dim_v);
  } else if (sizeof(T) == 2) {
    s.k = arena.take<float>(kKeys<kWay> * dim);
    s.v = arena.take<float>(kKeys<kWay> * dim_v);
  }
  if (p.page > 0) {
    s.k_page = arena.take<T>(kKeys<kWay> * p.dim);
    s.v_page = arena.take<T>(kKeys<kWay> * p.dim_v);
  }
  if (kForm && p.mask_kind != ScoreMask::none)
    s.bias = arena.take<float>(mask_scratch(kKeys<kWay>));
  if (kForm && p.dropout.active) s.keep = arena.take<float>(kKeys<kWay> * kLanes);
  return s;
}

// The queries, packed as the way wants them, and nothing seen yet.
template <class T, Way kWay, bool kForm>
LLMOPS_INLINE void begin_rows(const AttentionParams& p, const QueryBlock& block, const Scratch& s,
                              int64_t split) {
  const T* row[kLanes];
  block_rows(block, static_cast<const T*>(p.q), p.q_stride, row);
  const float sign = split_scale(p.scale).query;
  if constexpr (kWay == Way::pairs || kWay == Way::tiles) {
#ifdef LLMOPS_HAS_DOT_PAIRS
    pack_lane_pairs(row, block.count, p.dim, sign < 0.0f,
                    lane_steps<kWay>(round_up(p.dim, 2 * W) / 2), s.q);
#endif
  } else {
    pack_lanes(row, block.count, p.dim, sign, s.q);
  }
#ifdef LLMOPS_HAS_TILES
  if constexpr (kWay == Way::split)
    split_strips<false>({s.q, 1, kLanes, block.vecs * W, p.dim}, s.q_split);
#endif
  // Two vectors share a strip, though the second may hold no row.
  const int vecs = kWay == Way::split ? kBlockVecs : block.vecs;
  const LaneSteps steps = lane_steps<kWay>(round_up(p.dim_v, 2 * W));
  for (int j = 0; j < vecs; ++j) {
    store(s.m + j * W, set1(-kInf));
    store(s.l + j * W, zero());
    for (int64_t d = 0; d < round_up(p.dim_v, kWholeRows<kWay>); ++d)
      store(s.o + j * steps.vec + d * steps.row, zero());
  }
  if (kForm && p.sinks && split == 0) {  // a key of weight exp(sink) and value 0, seen first
    for (int i = 0; i < block.count; ++i) {
      s.m[i] = p.sinks[block.head[i]];
      s.l[i] = s.m[i] == -kInf ? 0.0f : 1.0f;
    }
  }
}

// Results and their log-sum-exp, or one split's partial ones. False, and nothing written, where the
// plain form does not resolve a row.
template <class T, Way kWay, bool kForm>
LLMOPS_INLINE bool finish_rows(const AttentionParams& p, const QueryBlock& block, const Scratch& s,
                               int64_t group, int64_t split) {
  const AttentionPlan& plan = block.sequence.plan;
  const LaneSteps steps = lane_steps<kWay>(round_up(p.dim_v, 2 * W));
  if constexpr (!kForm) {
    for (int i = 0; i < block.count; ++i)
      if (!is_resolved(s.m[i], s.l[i])) return false;
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
    unpack_lanes(s.o, steps, block.count, p.dim_v, s.alpha, out);
    for (int i = 0; i < block.count; ++i) p.lse[lse_at(p, block, i)] = lse[i];
  } else {
    const int64_t rows = p.heads / p.kv_heads * block.sequence.queries, width = p.dim_v + 1;
    const int64_t start = partial_start(p, block.sequence, group, plan.splits * rows);
    float* base = p.partial + (start + split * rows + block.first) * width;
    float* out[kLanes];
    for (int i = 0; i < block.count; ++i) out[i] = base + i * width;
    unpack_lanes(s.o, steps, block.count, p.dim_v, s.alpha, out);
    for (int i = 0; i < block.count; ++i) out[i][p.dim_v] = lse[i];
  }
  return true;
}

// Probabilities of vector j's first `keys` keys, whose scores and pairs are `kRow` floats apart: in
// place, or as pairs. m and l follow; what O is to be multiplied by. top: the scores' maximum.
// Lines from `ahead` on are asked for, so many with each two keys.
template <bool kPairs, bool kNatural, int kRow>
LLMOPS_OUTLINE Vec softmax_lanes(const Scratch& s, int j, int keys, Vec factor, Vec top,
                                 float* score, [[maybe_unused]] float* pairs,
                                 const float* ahead = nullptr, int lines = 0) {
  const Vec before = load(s.m + j * W);
  // Plain blocks keep m in units of log2 (factor applied), modified ones in natural units: an
  // additive mask may hold the lowest finite number, which times log2 e would be -inf.
  const Vec m = reference(kNatural ? top : top * factor, before);
  // Nothing seen yet: -inf - -inf would be NaN.
  Vec shift = select(equal(before, set1(-kInf)), zero(), before);
  Vec sum0 = load(s.l + j * W), sum1 = zero(), alpha = set1(1.0f);
  // Seldom, and foreseen: the exponentials begin before the maximum is known.
  if (__builtin_expect(mask_bits(equal(m, before)) != kAllLanes, 0)) {
    shift = select(equal(m, set1(-kInf)), zero(), m);
    const Vec fade = kNatural ? (before - shift) * factor : before - shift;
    alpha = rescaling(before, exp2_softmax(fade));
    sum0 = sum0 * alpha;
    store(s.m + j * W, m);
  }
  const Vec minus = zero() - shift;
  const auto probability = [&](int k) __attribute__((always_inline)) {
    const Vec x = load(score + k * kRow);
    return exp2_softmax(kNatural ? (x - shift) * factor : fma(x, factor, minus));
  };
  // Dropout spares the normalizer: what is summed is not what multiplies V.
  const auto kept = [&](int k, Vec x) __attribute__((always_inline)) {
    if constexpr (!kNatural) return x;
    return s.keep ? x * load(s.keep + k * kLanes + j * W) : x;
  };
  int k = 0;
  _Pragma("GCC unroll 4") for (; k + 2 <= keys; k += 2) {
    for (int i = 0; i < lines; ++i, ahead += W) __builtin_prefetch(ahead, 1);
    Vec a = probability(k), b = probability(k + 1);
    sum0 = sum0 + a;
    sum1 = sum1 + b;
    a = kept(k, a), b = kept(k + 1, b);
    if constexpr (kPairs) {
#ifdef LLMOPS_HAS_DOT_PAIRS
      store(pairs + k / 2 * kRow, make_pairs(a, b));
#endif
    } else {
      store(score + k * kRow, a);
      store(score + (k + 1) * kRow, b);
    }
  }
  if (k < keys) {
    Vec a = probability(k);
    sum0 = sum0 + a;
    a = kept(k, a);
    if constexpr (kPairs) {
#ifdef LLMOPS_HAS_DOT_PAIRS
      store(pairs + k / 2 * kRow, make_pairs(a, zero()));
#endif
    } else {
      store(score + k * kRow, a);
    }
  }
  store(s.l + j * W, sum0 + sum1);
  return alpha;
}

// f(key, keys) over [begin, end) of one split: blocks of equal size, so that the last one is not a
// sliver, in multiples of the tiles' rows.
template <Way kWay, class F>
LLMOPS_INLINE void for_keys(const AttentionPlan& plan, int64_t split, int64_t begin, int64_t end,
                            const F& f) {
  constexpr int64_t whole = kWay == Way::tiles || kWay == Way::split ? 32 : kTileRows;
  const int64_t part = plan.first_key + split * plan.split_keys;
  begin = max64(begin, part), end = min64(end, part + plan.split_keys);
  if (end <= begin) return;
  const int64_t blocks = (end - begin + kKeys<kWay> - 1) / kKeys<kWay>;
  const int64_t step = round_up((end - begin + blocks - 1) / blocks, whole);
  for (int64_t key = begin; key < end; key += step)
    f(key, static_cast<int>(min64(step, end - key)));
}

#ifdef LLMOPS_HAS_TILES
// Several blocks of queries against the keys that they share: `forward` has as many `rows` and
// `block`s, of which `count` are there, and takes keys by add_keys and finish. The tasks of the
// other blocks have nothing left to do. Whether it could, as finish_rows.
template <class T, Way kWay, bool kForm, class Forward>
LLMOPS_INLINE bool run_shared(const AttentionParams& p, int64_t task, void* scratch, int shared,
                              Forward& forward) {
  const auto [group, index, part] = task_of(p, task);
  if (index % shared) return true;
  Arena arena{static_cast<char*>(scratch)};
  forward.rows[0] = layout<T, kWay, kForm>(p, arena);
  for (int i = 1; i < shared; ++i) {
    forward.rows[i] = forward.rows[0];
    layout_rows<kWay>(p, arena, forward.rows[i]);
  }
  int64_t begin = INT64_MAX, end = 0;
  int& count = forward.count;
  do {
    QueryBlock& block = forward.block[count];
    begin_block(p, group, index + count, block);
    begin_rows<T, kWay, kForm>(p, block, forward.rows[count], part);
    begin = min64(begin, block.begin), end = max64(end, block.end);
    ++count;
  } while (count < shared && index + count < forward.block[0].sequence.plan.blocks);

  begin_tiles();
  for_keys<kWay>(forward.block[0].sequence.plan, part, begin, end,
                 [&](int64_t key, int keys) { forward.add_keys(key, keys); });
  forward.finish();
  end_tiles();
  bool resolved = true;
  for (int i = 0; i < count; ++i) {
    resolved =
        finish_rows<T, kWay, kForm>(p, forward.block[i], forward.rows[i], group, part) && resolved;
  }
  return resolved;
}
#endif

}  // namespace
}  // namespace llmops::cpu::LLMOPS_ISA
