// What the backward kernels share: a block of queries made ready, the pass that turns scores and
// dP^T into P and dS, and the products beside the forward's. Formula: attention.h
#pragma once
#include "attention_score.h"
#include "attention_tile.h"

namespace llmops::cpu::LLMOPS_ISA {
namespace {

constexpr int64_t kGradKeys = 48;   // of one block: S and dP stay in the first-level cache
constexpr int64_t kTiledKeys = 64;  // of one by tiles, whose vectors of queries take turns

// Rows past a vector's visible keys, up to here, are read as zeros by the dk and dv tiles.
LLMOPS_INLINE int tile_end(int visible, int keys) {
  const int end = (visible + kTileRows - 1) / kTileRows * kTileRows;
  return end < keys ? end : keys;
}

// The lane-wise facts of a block, [64] each.
struct GradLanes {
  float* lse;    // in the unit of the scores' exponent; +inf for a row that saw nothing
  float* delta;  // dout . out - dlse
  float* norm;   // what is left to divide P by: 1, unless lse is too large to resolve it
  // Of a block of keys, [kTiledKeys][64], or null:
  float* keep;   // dropout's factor of P
  float* slope;  // the soft cap's derivative
};
LLMOPS_INLINE GradLanes take_grad_lanes(const AttentionParams& p, Arena& arena) {
  GradLanes lanes{};
  lanes.lse = arena.take<float>(kLanes);
  lanes.delta = arena.take<float>(kLanes);
  lanes.norm = arena.take<float>(kLanes);
  if (p.dropout.active) lanes.keep = arena.take<float>(kTiledKeys * kLanes);
  if (p.softcap != 0.0f) lanes.slope = arena.take<float>(kTiledKeys * kLanes);
  return lanes;
}

// Fills `lanes`, and the rows of q and dout. A row that saw no key has zero gradients whatever its
// q and dout hold (0 * NaN is NaN): its rows become `zeros`, a row of zeros.
template <class T, bool kNatural>
LLMOPS_OUTLINE void begin_grad_block(const AttentionGradParams& g, const QueryBlock& block,
                                     const T* zeros, const GradLanes& lanes, const T** q,
                                     const T** grad) {
  const AttentionParams& p = g.fwd;
  const T* out[kLanes];
  block_rows(block, static_cast<const T*>(p.q), p.q_stride, q);
  block_rows(block, static_cast<const T*>(g.grad_out), g.grad_out_stride, grad);
  block_rows(block, static_cast<const T*>(p.out), p.out_stride, out);
  for (int i = 0; i < kLanes; ++i) {
    lanes.lse[i] = kInf;
    lanes.delta[i] = 0.0f;
    lanes.norm[i] = 1.0f;
    if (i >= block.count) continue;
    const float lse = p.lse[lse_at(p, block, i)];
    if (lse == -kInf) {
      q[i] = grad[i] = zeros;
      continue;
    }
    lanes.lse[i] = kNatural ? lse : lse * kLog2e;
    Vec dot = zero();
    for (int64_t d = 0; d < p.dim_v; d += W)
      dot = fma(load_some(out[i] + d, p.dim_v - d), load_some(grad[i] + d, p.dim_v - d), dot);
    lanes.delta[i] = reduce_add(dot);
    if (g.grad_lse) lanes.delta[i] -= *block_row(block, g.grad_lse, g.grad_lse_stride, i);
  }
}

// From here on the spacing of fp32 numbers hides the sum that lse holds beside the maximum, as in
// a row whose keys all got the lowest finite number from an additive mask.
constexpr float kLseResolves = 1024.0f;
LLMOPS_INLINE bool needs_norm(const QueryBlock& block, const GradLanes& lanes) {
  bool needed = false;
  for (int i = 0; i < block.count; ++i)
    needed = needed || lanes.lse[i] < -kLseResolves ||
             (lanes.lse[i] > kLseResolves && lanes.lse[i] != kInf);
  return needed;
}

template <bool kNatural>
LLMOPS_INLINE Vec probability(Vec score, Vec lse, Vec factor) {
  return exp2_softmax(kNatural ? (score - lse) * factor : fma(score, factor, zero() - lse));
}

// s, dp [keys][64]: scores become P (as it multiplied V), dP becomes dS (unscaled; kCapped: before
// the soft cap), for vector j; zeros to tile_end.
template <bool kNatural, bool kCapped, class Store>
LLMOPS_INLINE void grad_lanes(const GradLanes& lanes, const float* s, const float* dp, int j,
                              int visible, int keys, Vec factor, const Store& put) {
  const Vec lse = load(lanes.lse + j * W), delta = load(lanes.delta + j * W);
  const Vec norm = load(lanes.norm + j * W);
  const auto cell = [&](int k, Vec& p, Vec& ds) __attribute__((always_inline)) {
    p = probability<kNatural>(load(s + k * kLanes + j * W), lse, factor);
    if (kNatural) p = p * norm;
    const int at = k * kLanes + j * W;
    if (kNatural && lanes.keep) {
      const Vec keep = load(lanes.keep + at);
      ds = p * fma(load(dp + at), keep, zero() - delta);
      p = p * keep;
    } else {
      ds = p * (load(dp + at) - delta);
    }
    if (kNatural && kCapped && lanes.slope) ds = ds * load(lanes.slope + at);
  };
  int k = 0;
  Vec p0, ds0, p1, ds1;
  _Pragma("GCC unroll 2") for (; k + 2 <= visible; k += 2) {
    cell(k, p0, ds0);
    cell(k + 1, p1, ds1);
    put(k, 2, p0, ds0, p1, ds1);
  }
  if (k < visible) {
    cell(k, p0, ds0);
    put(k, k + 1 < keys ? 2 : 1, p0, ds0, zero(), zero());
    k += 2;
  }
  for (; k < tile_end(visible, keys); k += 2)
    put(k, k + 1 < keys ? 2 : 1, zero(), zero(), zero(), zero());
}

// sums [keys][ld] += A B, for the keys of a block: A [keys][64] cells over the queries, B
// [64][ld] rows. Queries of vectors that do not see a group of keys are left out.
template <bool kPairs>
LLMOPS_OUTLINE void add_to_keys(Cells a, const float* b, int64_t ld, const QueryBlock& block,
                                const int* visible, int keys, float* sums) {
  constexpr int kStep = kPairs ? 2 : 1;
  for (int i = 0; i < keys; i += kTileRows) {
    const int rows = keys - i < kTileRows ? keys - i : kTileRows;
    int j = 0;
    while (j < block.vecs && visible[j] <= i) ++j;
    const int64_t first = j * W / kStep, steps = (block.count + kStep - 1) / kStep - first;
    if (steps <= 0) continue;
    for (int64_t c = 0; c < ld; c += kTileVecs * W) {
      const int vecs = clamp_int((ld - c) / W, 1, kTileVecs);
      with_constant<kTileRows>(rows, [&](auto r) {
        with_constant<kTileVecs>(vecs, [&](auto v) {
          update_tile<r.value, v.value, kPairs>(a.at(i, first).base, a.row, a.step,
                                                b + first * ld + c, ld, steps, sums + i * ld + c,
                                                ld, nullptr);
        });
      });
    }
  }
}

// A block of rows of k or v as the A operand against packed queries.
template <class T, bool kPairs>
LLMOPS_INLINE Cells key_cells(const T* rows, int64_t stride, int keys, int64_t dim, float* copy) {
  [[maybe_unused]] const int64_t width = round_up(dim, 2 * W);
  if constexpr (kPairs) {
#ifdef LLMOPS_HAS_DOT_PAIRS
    if (dim % 2) {
      copy_rows(rows, stride, keys, dim, reinterpret_cast<bf16*>(copy), width);
      return cells(copy, width * 2, 4);
    }
#endif
    return cells(rows, stride * 2, 4);
  } else if constexpr (sizeof(T) == 2) {
    widen_rows(rows, stride, keys, dim, copy, width);
    return cells(copy, width * 4, 4);
  } else {
    return cells(rows, stride * 4, 4);
  }
}

}  // namespace
}  // namespace llmops::cpu::LLMOPS_ISA
