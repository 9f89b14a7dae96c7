// Which rows a block of queries holds, which keys they see, and what happens to their scores
// between the two matrix products.
//
// Score modifiers are compile-time bits. A modified block holds natural logits (scale applied,
// -inf where dropped); an unmodified one holds raw q . k, the scale folded into the exponential.
// A further modifier (softcap, ALiBi, a window) is one more bit, one more line in modify_scores
// and, where it narrows the keys, in begin_block: the tile loops stay as they are.
#pragma once
#include "attention_tile.h"

namespace llmops::cpu::LLMOPS_ISA {
namespace {

enum : unsigned { kPlain = 0, kMasked = 1u << 0 };

// Up to 64 query rows of one (batch, kv head).
struct QueryBlock {
  int64_t batch, kv_head;
  int64_t first;    // first row, counted head * Tq + token within the group
  int count, vecs;  // rows, and the vectors they fill
  int64_t head[kLanes], token[kLanes];
  int64_t limit[kLanes];          // row i sees keys [0, limit[i])
  int64_t vec_limit[kBlockVecs];  // the largest limit in vectors 0..j
  int64_t full, end;              // every row sees [0, full), none sees past end
};

[[maybe_unused]] LLMOPS_OUTLINE void begin_block(const AttentionParams& p, int64_t group,
                                                 int64_t index, QueryBlock& block) {
  const int64_t heads_per_group = p.heads / p.kv_heads;
  block.batch = group / p.kv_heads;
  block.kv_head = group % p.kv_heads;
  int64_t count;
  if (p.plan.packed) {
    block.first = index * kLanes;
    count = heads_per_group * p.queries - block.first;
  } else {
    const int64_t per_head = (p.queries + kLanes - 1) / kLanes;
    const int64_t token = index % per_head * kLanes;
    block.first = index / per_head * p.queries + token;
    count = p.queries - token;
  }
  block.count = clamp_int(count, 0, kLanes);
  block.vecs = (block.count + W - 1) / W;
  int64_t head = block.first / p.queries, token = block.first % p.queries;
  block.full = p.keys;
  block.end = 0;
  for (int i = 0; i < block.count; ++i) {
    block.head[i] = block.kv_head * heads_per_group + head;
    block.token[i] = token;
    // Bottom-right alignment: the last query sees every key.
    const int64_t limit =
        p.causal ? max64(0, min64(p.keys, token + 1 + p.keys - p.queries)) : p.keys;
    block.limit[i] = limit;
    block.full = min64(block.full, limit);
    block.end = max64(block.end, limit);
    block.vec_limit[i / W] = block.end;
    if (++token == p.queries) {
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
// Pointers to the block's rows of a [B, Hq, Tq, *] tensor.
template <class T>
LLMOPS_INLINE void block_rows(const QueryBlock& block, T* base, const int64_t* stride, T** row) {
  for (int i = 0; i < block.count; ++i)
    row[i] = row_at(base, stride, block.batch, block.head[i], block.token[i]);
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

// bias [keys][64], or [keys][1] when all rows share one mask row (the return value: bias's width).
template <class M>
LLMOPS_OUTLINE int pack_mask_of(const AttentionParams& p, const QueryBlock& block, int64_t key,
                                int keys, float* bias) {
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
                            int keys, float* bias) {
  if (p.mask_kind == ScoreMask::boolean) return pack_mask_of<uint8_t>(p, block, key, keys, bias);
  int width = kLanes;
  LLMOPS_DISPATCH(p.mask_type, M, width = pack_mask_of<M>(p, block, key, keys, bias));
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

// Turns raw scores s [keys][64] of the keys from `key` on into modified ones, and drops what the
// causal limit hides. top, if not null: the lanes' maximum.
template <unsigned kMods>
LLMOPS_OUTLINE void modify_scores(const AttentionParams& p, const QueryBlock& block, int64_t key,
                                  int keys, const int* visible, float* s, float* bias, float* top) {
  const Vec scale = set1(split_scale(p.scale).score);
  const int width = kMods & kMasked ? pack_mask(p, block, key, keys, bias) : 0;
  for (int j = 0; j < block.vecs; ++j) {
    float limits[W];
    bool cut = false;
    for (int i = 0; i < W; ++i) {
      const int lane = j * W + i;
      limits[i] = static_cast<float>(
          lane < block.count ? clamp_int(block.limit[lane] - key, 0, keys) : keys);
      cut = cut || limits[i] < static_cast<float>(visible[j]);
    }
    const Vec limit = load(limits);
    Vec m = set1(-kInf);
    for (int k = 0; k < visible[j]; ++k) {
      float* cell = s + k * kLanes + j * W;
      Vec x = load(cell);
      if constexpr (kMods != kPlain) x = x * scale;
      if constexpr ((kMods & kMasked) != 0) {
        const Vec b = width == 1 ? set1(bias[k]) : load(bias + k * kLanes + j * W);
        // Compared, not only added: a dropped key stays dropped where its score is inf or NaN.
        x = select(equal(b, set1(-kInf)), b, x + b);
      }
      if (cut) x = select(less(set1(static_cast<float>(k)), limit), x, set1(-kInf));
      store(cell, x);
      m = max(x, m);
    }
    if (top) store(top + j * W, m);
  }
}

}  // namespace
}  // namespace llmops::cpu::LLMOPS_ISA
