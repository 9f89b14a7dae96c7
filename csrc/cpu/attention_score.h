// Which rows a block of queries holds, which keys they see, and what happens to their scores
// between the two matrix products.
//
// The tile loops exist twice, plain and modified. A modified block holds natural logits (scale
// applied, -inf where dropped); a plain one holds raw q . k, the scale folded into the exponential.
// Which modifiers change the scores is known to begin_modifiers alone, bit by bit; what narrows the
// keys (causal, a window) belongs to begin_block and costs the same in both forms.
#pragma once
#include "attention_tile.h"

namespace llmops::cpu::LLMOPS_ISA {
namespace {

// Whether the kernel's modified form is needed, and (as template argument) which one this is.
enum : bool { kPlain = false, kModified = true };
LLMOPS_INLINE bool is_modified(const AttentionParams& p) {
  return p.mask_kind != ScoreMask::none || p.softcap != 0.0f || p.slopes || p.sinks ||
         p.dropout.active;
}

// Whether a row's plain form held: maximum m in units of log2, sum l. A fused scale * x - m is off
// at the maximum itself by what m was rounded by, which all its terms share; from 2^24 on that
// is more than a factor of 2, and then out of range. The modified form subtracts first.
LLMOPS_INLINE bool is_resolved(float m, float l) {
  return m == -kInf || (__builtin_fabsf(m) < 16777216.0f && __builtin_fabsf(l) < kInf);
}

LLMOPS_INLINE AttentionSequence sequence_of(const AttentionParams& p, int64_t batch) {
  if (p.sequences) return p.sequences[batch];
  return {0, p.queries, 0, p.keys, nullptr, p.plan, 0};
}
LLMOPS_INLINE AttentionTask task_of(const AttentionParams& p, int64_t task) {
  if (p.tasks) return p.tasks[task];
  const int64_t block = task / p.plan.splits;
  // The last block of a head first: under a causal mask it is the longest.
  return {block / p.plan.blocks, p.plan.blocks - 1 - block % p.plan.blocks, task % p.plan.splits};
}
// The row of AttentionParams::partial where a group that has `rows` of them begins.
LLMOPS_INLINE int64_t partial_start(const AttentionParams& p, const AttentionSequence& sequence,
                                    int64_t group, int64_t rows) {
  return p.sequences ? sequence.partial + group % p.kv_heads * rows : group * rows;
}

// Up to 64 query rows of one (batch, kv head). Tokens and keys count from their sequence's first.
struct QueryBlock {
  AttentionSequence sequence;
  int64_t batch, kv_head;
  int64_t first;    // first row, counted head * Tq + token within the group
  int count, vecs;  // rows, and the vectors they fill
  int64_t head[kLanes], token[kLanes];
  int64_t start[kLanes], limit[kLanes];  // row i sees keys [start[i], limit[i])
  int64_t vec_limit[kBlockVecs];         // the largest limit in vectors 0..j
  int64_t shift;                         // the first query is at key `shift`
  int64_t begin, end;                    // no row sees a key outside [begin, end)
  int64_t full_begin, full_end;          // every row sees all of [full_begin, full_end)

  bool cuts(int64_t key, int keys) const { return key < full_begin || key + keys > full_end; }
};

[[maybe_unused]] LLMOPS_OUTLINE void begin_block(const AttentionParams& p, int64_t group,
                                                 int64_t index, QueryBlock& block) {
  const int64_t heads_per_group = p.heads / p.kv_heads;
  block.batch = group / p.kv_heads;
  block.kv_head = group % p.kv_heads;
  block.sequence = sequence_of(p, block.batch);
  const int64_t queries = block.sequence.queries, keys = block.sequence.keys;
  int64_t count;
  if (block.sequence.plan.packed) {
    block.first = index * kLanes;
    count = heads_per_group * queries - block.first;
  } else {
    const int64_t per_head = (queries + kLanes - 1) / kLanes;
    const int64_t token = index % per_head * kLanes;
    block.first = index / per_head * queries + token;
    count = queries - token;
  }
  block.count = clamp_int(count, 0, kLanes);
  block.vecs = (block.count + W - 1) / W;
  int64_t head = block.first / queries, token = block.first % queries;
  block.shift = keys - queries;
  block.begin = block.full_end = keys;
  block.end = block.full_begin = 0;
  for (int i = 0; i < block.count; ++i) {
    block.head[i] = block.kv_head * heads_per_group + head;
    block.token[i] = token;
    // Bottom-right alignment: the last query is at the last key.
    const int64_t position = token + block.shift;
    const int64_t limit = p.right < 0 ? keys : max64(0, min64(keys, position + p.right + 1));
    const int64_t start = p.left < 0 ? 0 : max64(0, min64(limit, position - p.left));
    block.start[i] = start;
    block.limit[i] = limit;
    block.begin = min64(block.begin, start);
    block.end = max64(block.end, limit);
    block.full_begin = max64(block.full_begin, start);
    block.full_end = min64(block.full_end, limit);
    block.vec_limit[i / W] = block.end;
    if (++token == queries) {
      token = 0;
      ++head;
    }
  }
}

template <class T>
LLMOPS_INLINE T* row_at(T* base, const int64_t* stride, int64_t batch, int64_t head,
                        int64_t token) {
  return base + batch * stride[0] + head * stride[1] + token * stride[2];
}
// Row i of the block in a [B, Hq, Tq, *] tensor, and all of them.
template <class T>
LLMOPS_INLINE T* block_row(const QueryBlock& block, T* base, const int64_t* stride, int i) {
  return row_at(base, stride, block.batch, block.head[i],
                block.sequence.query_start + block.token[i]);
}
template <class T>
LLMOPS_INLINE void block_rows(const QueryBlock& block, T* base, const int64_t* stride, T** row) {
  for (int i = 0; i < block.count; ++i) row[i] = block_row(block, base, stride, i);
}
LLMOPS_INLINE int64_t lse_at(const AttentionParams& p, const AttentionSequence& sequence,
                             int64_t batch, int64_t head, int64_t token) {
  return batch * p.lse_stride[0] + head * p.lse_stride[1] + sequence.query_start + token;
}
LLMOPS_INLINE int64_t lse_at(const AttentionParams& p, const QueryBlock& block, int i) {
  return lse_at(p, block.sequence, block.batch, block.head[i], block.token[i]);
}

// Rows of k or v from `key` on: the first one, their distance, and how many lie at that distance.
template <class T>
struct KeyRows {
  const T* first;
  int64_t stride;
  int count;
};
template <class T>
LLMOPS_INLINE KeyRows<T> key_run(const AttentionParams& p, const QueryBlock& block,
                                 const void* base, const int64_t* stride, int64_t key, int keys) {
  int64_t batch = block.batch, row = block.sequence.key_start + key;
  if (__builtin_expect(block.sequence.pages != nullptr, 0)) {
    batch = block.sequence.pages[row / p.page];
    row %= p.page;
    keys = clamp_int(p.page - row, 0, keys);
  }
  return {row_at(static_cast<const T*>(base), stride, batch, block.kv_head, row), stride[2], keys};
}
// All `keys` of them, copied together into `copy` [keys][dim] where they span pages.
template <class T>
LLMOPS_INLINE KeyRows<T> key_rows(const AttentionParams& p, const QueryBlock& block,
                                  const void* base, const int64_t* stride, int64_t key, int keys,
                                  int64_t dim, T* copy) {
  KeyRows<T> run = key_run<T>(p, block, base, stride, key, keys);
  if (run.count == keys) return run;
  for (int i = 0; i < keys; i += run.count) {
    run = key_run<T>(p, block, base, stride, key + i, keys - i);
    for (int r = 0; r < run.count; ++r)
      __builtin_memcpy(copy + (i + r) * dim, run.first + r * run.stride, dim * sizeof(T));
  }
  return {copy, dim, keys};
}

// n elements of a mask row as additive fp32: 0 or -inf for a boolean one.
template <class M>
LLMOPS_INLINE Vec mask_values(const M* p, int64_t step, int n) {
  if (step == 0) return set1(to_float(*p));
  if (step == 1) return load_some(p, n);
  float buffer[W];
  for (int i = 0; i < W; ++i) buffer[i] = i < n ? to_float(p[i * step]) : 0.0f;
  return load(buffer);
}
LLMOPS_INLINE Vec mask_values(const uint8_t* p, int64_t step, int n) {
  if (step == 1) return select(load_mask_n(p, n), zero(), set1(-kInf));
  float buffer[W];
  for (int i = 0; i < W; ++i) buffer[i] = i < n && p[i * step] ? 0.0f : -kInf;
  return load(buffer);
}

// bias [keys][64] of the vectors that see a key, or [keys][1] when all rows share one mask row (the
// return value: bias's width).
template <class M>
LLMOPS_OUTLINE int pack_mask_of(const AttentionParams& p, const QueryBlock& block, int64_t key,
                                int keys, const int* visible, float* bias) {
  const M* row[kLanes];
  const int64_t step = p.mask_stride[3];
  const M* base = static_cast<const M*>(p.mask) + key * step;
  block_rows(block, base, p.mask_stride, row);
  bool shared = true;
  for (int i = 1; i < block.count; ++i) shared = shared && row[i] == row[0];
  if (shared) {
    for (int k = 0; k < keys; k += W)
      store(bias + k, mask_values(row[0] + k * step, step, keys - k < W ? keys - k : W));
    return 1;
  }
  for (int a = 0; a < block.count; a += W) {
    if (visible[a / W] == 0) continue;
    for (int k = 0; k < keys; k += W) {
      const int n = keys - k < W ? keys - k : W;
      Vec r[W];
      for (int i = 0; i < W; ++i)
        r[i] = a + i < block.count ? mask_values(row[a + i] + k * step, step, n) : zero();
      transpose(r);
      LLMOPS_UNROLL for (int i = 0; i < W; ++i) store(bias + (k + i) * kLanes + a, r[i]);
    }
  }
  return kLanes;
}
LLMOPS_INLINE int pack_mask(const AttentionParams& p, const QueryBlock& block, int64_t key,
                            int keys, const int* visible, float* bias) {
  if (p.mask_kind == ScoreMask::boolean)
    return pack_mask_of<uint8_t>(p, block, key, keys, visible, bias);
  int width = kLanes;
  LLMOPS_DISPATCH(p.mask_type, M, width = pack_mask_of<M>(p, block, key, keys, visible, bias));
  return width;
}
// Floats that pack_mask may write for blocks of `keys` keys.
LLMOPS_INLINE int64_t mask_scratch(int64_t keys) { return round_up(keys, W) * kLanes; }

// How the raw product becomes a logit: the sign of the scale goes into the packed queries, so that
// the largest raw score is the largest logit; scale 0 multiplies the queries by 0 (NaN stays).
struct Scale {
  float query, score;
};
LLMOPS_INLINE Scale split_scale(float scale) {
  if (scale == 0.0f) return {0.0f, 1.0f};
  return scale < 0.0f ? Scale{-1.0f, -scale} : Scale{1.0f, scale};
}

enum : unsigned { kMasked = 1u << 0, kSoftcap = 1u << 1, kAlibi = 1u << 2, kRaw = 1u << 3 };

// One vector of lanes, `visible` keys from `key` on, their scores `row` floats apart: the modifiers
// that kBits names, in the reference's order, then what the causal limit and the window hide. The
// lanes' maximum. slope, if not null, receives the derivative of the soft cap.
template <unsigned kBits>
LLMOPS_OUTLINE Vec modify_lanes(const AttentionParams& p, const QueryBlock& block, int64_t key,
                                int visible, int j, float* s, int64_t row, const float* bias,
                                int bias_width, float* slope) {
  float starts[W], limits[W], offsets[W] = {}, slopes[W] = {};
  bool cut_start = false, cut_end = false;
  for (int i = 0; i < W; ++i) {
    const int lane = j * W + i;
    starts[i] = 0.0f;
    limits[i] = static_cast<float>(visible);
    if (lane >= block.count) continue;
    starts[i] = static_cast<float>(clamp_int(block.start[lane] - key, 0, visible));
    limits[i] = static_cast<float>(clamp_int(block.limit[lane] - key, 0, visible));
    cut_start = cut_start || starts[i] > 0.0f;
    cut_end = cut_end || limits[i] < static_cast<float>(visible);
    if constexpr ((kBits & kAlibi) != 0) {
      offsets[i] = static_cast<float>(key - (block.token[lane] + block.shift));
      slopes[i] = p.slopes[block.batch * p.slope_stride[0] + block.head[lane] * p.slope_stride[1]];
    }
  }
  const Vec start = load(starts), limit = load(limits), scale = set1(split_scale(p.scale).score);
  const Vec offset = load(offsets), alibi = load(slopes);
  const Vec cap = set1(p.softcap), into_cap = set1(split_scale(p.scale).score / p.softcap);
  Vec m = set1(-kInf);
  for (int k = 0; k < visible; ++k) {
    float* cell = s + k * row;
    const Vec at = set1(static_cast<float>(k));
    Vec x = load(cell);
    if constexpr ((kBits & kSoftcap) != 0) {
      const Vec t = tanh(x * into_cap);
      x = t * cap;
      if (slope) store(slope + k * kLanes + j * W, fnma(t, t, set1(1.0f)));
    } else if constexpr ((kBits & kRaw) == 0) {
      x = x * scale;
    }
    if constexpr ((kBits & kAlibi) != 0) x = fnma(alibi, abs(offset + at), x);
    if constexpr ((kBits & kMasked) != 0) {
      const Vec b = bias_width == 1 ? set1(bias[k]) : load(bias + k * kLanes + j * W);
      // Compared, not only added: a dropped key stays dropped where its score is inf or NaN.
      x = select(equal(b, set1(-kInf)), b, x + b);
    }
    if (cut_end) x = select(less(at, limit), x, set1(-kInf));
    if (cut_start) x = select(less(at, start), set1(-kInf), x);
    store(cell, x);
    m = max(x, m);
  }
  return m;
}

// What a block of keys is modified by: kMasked and its like, and the width of bias, which is
// packed.
struct Modifiers {
  unsigned bits;
  int width;
};
template <bool kForm>
LLMOPS_INLINE Modifiers begin_modifiers(const AttentionParams& p, const QueryBlock& block,
                                        int64_t key, int keys, const int* visible, float* bias) {
  if (kForm == kPlain) return {kRaw, 0};
  Modifiers m{(p.softcap != 0.0f ? kSoftcap : 0u) | (p.slopes ? kAlibi : 0u), 0};
  if (p.mask_kind != ScoreMask::none) {
    m.bits |= kMasked;
    m.width = pack_mask(p, block, key, keys, visible, bias);
  }
  return m;
}

// Turns a vector's raw scores of the keys from `key` on into natural logits (kModified), and drops
// what the causal limit and the window hide. Their maximum.
template <bool kForm>
LLMOPS_INLINE Vec modify_vector(const AttentionParams& p, const QueryBlock& block, int64_t key,
                                Modifiers modifiers, int visible, int j, float* s, int64_t row,
                                const float* bias, float* slope) {
  const auto apply = [&](auto known) {
    return modify_lanes<static_cast<unsigned>(known.value)>(p, block, key, visible, j, s, row, bias,
                                                            modifiers.width, slope);
  };
  if constexpr (kForm == kPlain) return apply(Constant<kRaw>{});
  switch (modifiers.bits) {
    case 0:
      return apply(Constant<0>{});
    case 1:
      return apply(Constant<1>{});
    case 2:
      return apply(Constant<2>{});
    case 3:
      return apply(Constant<3>{});
    case 4:
      return apply(Constant<4>{});
    case 5:
      return apply(Constant<5>{});
    case 6:
      return apply(Constant<6>{});
    default:
      return apply(Constant<7>{});
  }
}

// The same for scores s [keys][64], which lie as `steps` say. top, if not null: the lanes' maximum.
// Vectors that see no key are left as they are.
template <bool kForm>
LLMOPS_OUTLINE void modify_scores(const AttentionParams& p, const QueryBlock& block, int64_t key,
                                  int keys, const int* visible, float* s, float* bias, float* top,
                                  float* slope, LaneSteps steps = kSideBySide) {
  const Modifiers modifiers = begin_modifiers<kForm>(p, block, key, keys, visible, bias);
  for (int j = 0; j < block.vecs; ++j) {
    if (visible[j] == 0) continue;
    const Vec m = modify_vector<kForm>(p, block, key, modifiers, visible[j], j, s + j * steps.vec,
                                       steps.row, bias, slope);
    if (top) store(top + j * W, m);
  }
}

}  // namespace
}  // namespace llmops::cpu::LLMOPS_ISA
