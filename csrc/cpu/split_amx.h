// Products in fp32 by AMX (amx.h), which multiplies bf16 alone: every element is taken as the sum
// of three bf16 values, eight bits of its mantissa each, so that nothing of it is lost.
//   a b = a0 b0 + (a0 b1 + a1 b0 + a0 b2 + a1 b1 + a2 b0); left out: less than 2^-21 |a b|
// Henry, Tang and Heinecke (2019). Six products of tiles take half the time of fp32 FMAs. In each
// 32 steps the small ones come first.
//
// Tiles have no subnormals: what is below 2^-126 counts as zero, so elements below 2^-110 have
// fewer than 24 bits. An infinity's other parts, and those that are zero, are 2^-126 with its sign:
// an infinite part times zero would be NaN, where the product is infinite.
#pragma once
#include "amx.h"

#ifdef LLMOPS_HAS_TILES

namespace llmops::cpu::LLMOPS_ISA {
namespace {

constexpr int kParts = 3;
constexpr int kTileFloats = kSide * kSide;
constexpr int kPair = 2 * kSide;                       // rows, or columns, of a product
constexpr int64_t kPartFloats = 2 * kTileFloats;       // both tiles of one part
constexpr int64_t kStepFloats = kParts * kPartFloats;  // of a strip's 32 steps of k
LLMOPS_INLINE int64_t tiled_steps(int64_t depth) { return (depth + kDepth - 1) / kDepth; }

LLMOPS_INLINE int up_to_side(int64_t n) { return static_cast<int>(n < kSide ? n : kSide); }

// A row of the tiles of each part: lane by lane a pair, first's below second's.
LLMOPS_INLINE void split(Vec first, Vec second, float* out) {
  // The upper half of a signalling NaN may be an infinity's; smaller makes its other parts NaN.
  const Vec least = set1(0x1p-126f), x = smaller(first, least), y = smaller(second, least);
  LLMOPS_UNROLL for (int part = 0; part < kParts; ++part) {
    store(out + part * kPartFloats, pair_high_halves(first, second));
    first = larger(first - high_half(first), x);
    second = larger(second - high_half(second), y);
  }
}

// `count` outer elements by `depth` steps of k as strips of 32 of them, each [steps of 32][parts]
// [2 tiles][16][16 pairs]: rows of a tile are outer elements and its pairs k for the operand a, the
// other way round for b. A pair is of k and k + 16. Element (outer, k) is at data + outer *
// outer_step + k * k_step, one of the steps 1; zeros where there is none.
struct SplitSource {
  const float* data;
  int64_t outer_step, k_step, count, depth;
  int64_t tiles() const { return (count + kPair - 1) / kPair * tiled_steps(depth) * 2; }
};
// The rows of tile `index` before they are split, and where the first of them goes.
template <bool kRowsAreOuter>
LLMOPS_INLINE float* gather(const SplitSource& from, int64_t index, float* out, Vec* first,
                            Vec* second) {
  const int64_t steps = tiled_steps(from.depth), step = index / 2 % steps, tile = index % 2;
  const int64_t outer = index / 2 / steps * kPair + tile * kSide;
  const bool outer_dense = from.outer_step == 1;
  for (int h = 0; h < 2; ++h) {
    Vec* const half = h ? second : first;
    const int64_t k = step * kDepth + h * kSide;
    const float* const p = from.data + outer * from.outer_step + k * from.k_step;
    const int outers = up_to_side(from.count - outer), ks = up_to_side(from.depth - k);
    const int rows = outer_dense ? ks : outers, lanes = outer_dense ? outers : ks;
    const int64_t stride = outer_dense ? from.k_step : from.outer_step;
    if (rows == kSide && lanes == kSide) {
      LLMOPS_UNROLL for (int i = 0; i < kSide; ++i) half[i] = load(p + i * stride);
    } else {
      for (int i = 0; i < kSide; ++i) half[i] = i < rows ? load_n(p + i * stride, lanes) : zero();
    }
    if (outer_dense == kRowsAreOuter) transpose(half);
  }
  return out + index / 2 * kStepFloats + tile * kTileFloats;
}
template <bool kRowsAreOuter>
LLMOPS_NOINLINE void split_strips(const SplitSource& from, float* out) {
  for (int64_t index = 0; index < from.tiles(); ++index) {
    Vec half[2][kSide];
    float* const at = gather<kRowsAreOuter>(from, index, out, half[0], half[1]);
    LLMOPS_UNROLL for (int i = 0; i < kSide; ++i) split(half[0][i], half[1][i], at + i * kSide);
  }
}

// For members, which LLMOPS_INLINE would make static: inlined, what runs beside a product keeps its
// state in registers.
#define LLMOPS_BESIDE __attribute__((always_inline))
struct Nothing {
  LLMOPS_BESIDE void operator()() const {}
};
// out [32][32 of ld] = A B of two strips, or += with `add`. `beside` is called after every second
// product of tiles: its vectors' instructions run while the tiles multiply.
template <class F>
LLMOPS_INLINE void split_product(const float* a, const float* b, int64_t steps, float* out,
                                 int64_t ld, bool add, F& beside) {
  const int64_t row = ld * 4;
  float* const below = out + kSide * ld;
  memory_is_used(out);
  if (add) {
    _tile_loadd(0, out, row);
    _tile_loadd(1, out + kSide, row);
    _tile_loadd(2, below, row);
    _tile_loadd(3, below + kSide, row);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  // With the next part of a, or of b, in place of the last one. Each load just before its first
  // use.
  const auto rows = [&](const float* part) __attribute__((always_inline)) {
    _tile_loadd(4, part, 4 * kSide);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    beside();
    _tile_loadd(5, part + kTileFloats, 4 * kSide);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    beside();
  };
  const auto columns = [&](const float* part) __attribute__((always_inline)) {
    _tile_loadd(6, part, 4 * kSide);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(2, 5, 6);
    beside();
    _tile_loadd(7, part + kTileFloats, 4 * kSide);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
    beside();
  };
  for (int64_t s = 0; s < steps; ++s, a += kStepFloats, b += kStepFloats) {
    _tile_loadd(6, b, 4 * kSide);
    _tile_loadd(7, b + kTileFloats, 4 * kSide);
    rows(a + 2 * kPartFloats);
    rows(a + kPartFloats);
    columns(b + kPartFloats);
    rows(a);
    columns(b + 2 * kPartFloats);
    columns(b);
  }
  _tile_stored(0, out, row);
  _tile_stored(1, out + kSide, row);
  _tile_stored(2, below, row);
  _tile_stored(3, below + kSide, row);
  memory_is_used(out);
}

}  // namespace
}  // namespace llmops::cpu::LLMOPS_ISA
#endif
