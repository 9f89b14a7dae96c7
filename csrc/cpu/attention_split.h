// The products of attention in fp32 by AMX: split_amx.h, whose strips are 32 keys or dimensions
// (operand a: K, V, V^T, K^T, and P and dS by key), 32 lanes of queries (operand b: Q, dO, P, dS)
// or 32 dimensions (operand b: the rows of Q and dO).
#pragma once
#include "attention_amx.h"
#include "split_amx.h"

#ifdef LLMOPS_HAS_TILES

namespace llmops::cpu::LLMOPS_ISA {
namespace {

// From where splitting keys and values is paid for (benchmarks/NOTES.md).
constexpr int64_t kSplitRows = 128, kSplitFrom = 256;
LLMOPS_INLINE bool takes_split(const AttentionParams& p, const AttentionSequence& sequence) {
  return p.type == DType::f32 && active_isa() == Isa::amx && sequence.keys >= kSplitFrom &&
         p.heads / p.kv_heads * sequence.queries >= kSplitRows;
}

// Floats of the strips of `outer` elements by `depth` steps.
LLMOPS_INLINE int64_t strips_size(int64_t outer, int64_t depth) {
  return round_up(outer, kPair) / kPair * tiled_steps(depth) * kStepFloats;
}
// All of them; parameters as of split_strip.
template <bool kRowsAreOuter>
LLMOPS_OUTLINE void split_strips(const float* data, int64_t outer_step, int64_t k_step,
                                 int64_t count, int64_t depth, float* out) {
  for (int64_t i = 0; i < count; i += kPair, out += tiled_steps(depth) * kStepFloats)
    split_strip<kRowsAreOuter>(data + i * outer_step, outer_step, k_step, count - i, depth, out);
}

// As scores_by_tiles; of two vectors of lanes that share a strip, both are written.
LLMOPS_OUTLINE void scores_by_strips(const float* k, const float* q, int64_t steps, int keys,
                                     int vecs, const int* visible, float* out, float* top) {
  for (int i = 0; i < keys; i += kPair, k += steps * kStepFloats) {
    for_vectors(vecs, visible, i, [&](int j, int columns) {
      const int first = j / 2 * 2;
      split_product(k, q + first / 2 * steps * kStepFloats, steps, out + i * kLanes + first * W,
                    kLanes, false);
      if (top) max_of_keys(out, i, j, columns, visible, top);
    });
  }
}

// As update_by_tiles: v has strips of 32 dimensions by v_steps of keys, p [keys][64] fp32, of which
// what a vector does not see is overwritten with zeros; `strip` holds one of p.
LLMOPS_OUTLINE void update_by_strips(const float* v, int64_t v_steps, int64_t rows, float* p,
                                     int vecs, const int* visible, float* out, const float* alpha,
                                     float* strip) {
  for_vectors(vecs, visible, 0, [&](int j, int columns) {
    const int first = j / 2 * 2;
    const int64_t steps = tiled_steps(visible[j + columns - 1]);
    for (int c = first; c < first + 2; ++c) {
      const int seen = c < vecs ? visible[c] : 0;
      for (int i = seen; i < steps * kDepth; ++i) store(p + i * kLanes + c * W, zero());
      if (seen > 0) rescale(out, rows, c, alpha);
    }
    split_strip<false>(p + first * W, 1, kLanes, kPair, steps * kDepth, strip);
    for (int64_t d = 0; d < rows; d += kPair, v += v_steps * kStepFloats)
      split_product(v, strip, steps, out + d * kLanes + first * W, kLanes, true);
    v -= round_up(rows, kPair) / kPair * v_steps * kStepFloats;
  });
}

// P or dS of 32 keys [32][64] as a strip of operand a; what a vector of queries does not see is
// overwritten with zeros. The first step of 32 queries that is in it, `count` queries' steps if
// none.
[[maybe_unused]] LLMOPS_OUTLINE int64_t split_by_key(float* a, int count, int vecs,
                                                     const int* visible, float* strip) {
  const int64_t all = tiled_steps(count);
  int64_t first = all;
  for (int j = 2 * static_cast<int>(all) - 1; j >= 0; --j) {
    const int seen = j < vecs ? visible[j] : 0;
    for (int k = seen; k < kPair; ++k) store(a + k * kLanes + j * W, zero());
    if (seen > 0) first = j / 2;
  }
  split_strip<true>(a + first * kDepth, kLanes, 1, kPair, (all - first) * kDepth,
                    strip + first * kStepFloats);
  return first;
}

// sums [keys][ld] += A B, for up to 32 keys: a strip of queries from step `first` of `all` on, b
// strips of 32 columns. copy: [32][ld], for the sums of keys that fill no tile.
[[maybe_unused]] LLMOPS_OUTLINE void add_to_keys_by_strips(const float* a, const float* b,
                                                           int64_t first, int64_t all, int64_t ld,
                                                           int keys, float* sums, float* copy) {
  if (first == all) return;
  float* const out = keys == kPair ? sums : copy;
  a += first * kStepFloats, b += first * kStepFloats;
  for (int64_t c = 0; c < ld; c += kPair, b += all * kStepFloats)
    split_product(a, b, all - first, out + c, ld, out == sums);
  for (int64_t d = 0; out == copy && d < keys * ld; d += W)
    store(sums + d, load(sums + d) + load(copy + d));
}

}  // namespace
}  // namespace llmops::cpu::LLMOPS_ISA
#endif
