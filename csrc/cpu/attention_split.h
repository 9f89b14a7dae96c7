// The two products of attention's forward in fp32 by AMX: split_amx.h, whose strips are 32 keys or
// dimensions (operand a: K, V^T) or 32 lanes of queries (operand b: Q, P).
#pragma once
#include "attention_amx.h"
#include "split_amx.h"

#ifdef LLMOPS_HAS_TILES

namespace llmops::cpu::LLMOPS_ISA {
namespace {

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

}  // namespace
}  // namespace llmops::cpu::LLMOPS_ISA
#endif
