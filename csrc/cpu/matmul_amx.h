// matmul's product in fp32 by AMX (amx.h), which multiplies bf16 alone: every element is taken as
// the sum of three bf16 values, eight bits of its mantissa each, so that nothing of it is lost.
//   a b = a0 b0 + (a0 b1 + a1 b0 + a0 b2 + a1 b1 + a2 b0); left out: less than 2^-21 |a b|
// Henry, Tang and Heinecke (2019). Six products of tiles take a third of the time of fp32 FMAs.
//
// Work is cut as in matmul.cpp: strips of 32 columns of b in a panel, blocks of 256 rows of a, 768
// steps of k at a time. In each 32 steps the small products come first. Errors are two thirds of
// those of fp32 FMAs one after the other (benchmarks/NOTES.md), for sums begin anew every 768
// steps.
//
// Tiles have no subnormals: what is below 2^-126 counts as zero, so elements below 2^-110 have
// fewer than 24 bits. An infinity's other parts, and those that are zero, are 2^-126 with its sign:
// an infinite part times zero would be NaN, where the product is infinite.
#pragma once
#include "amx.h"
#include "matmul.h"

#ifdef LLMOPS_HAS_TILES

namespace llmops::cpu::LLMOPS_ISA {
namespace {

constexpr int kParts = 3;
constexpr int kTileFloats = kSide * kSide;
constexpr int kPair = 2 * kSide;                       // rows, or columns, of a product
constexpr int64_t kPartFloats = 2 * kTileFloats;       // both tiles of one part
constexpr int64_t kStepFloats = kParts * kPartFloats;  // of a strip's 32 steps of k
constexpr int64_t kTiledDepth = 768;                   // 144 KiB of a strip
constexpr int64_t kTiledBlock = 8 * kPair;             // rows: 1.1 MiB of a
constexpr int64_t kTiledPanelFloats = 4 << 20;         // 16 MiB of b

LLMOPS_INLINE bool takes_tiles(const MatmulParams& p) {
  return p.type == DType::f32 && active_isa() == Isa::amx;
}
LLMOPS_INLINE int64_t tiled_steps(int64_t depth) { return (depth + kDepth - 1) / kDepth; }

LLMOPS_INLINE int up_to_side(int64_t n) { return static_cast<int>(n < kSide ? n : kSide); }

// A row of the tiles of each part: lane by lane a pair, first's below second's.
LLMOPS_INLINE void split(Vec first, Vec second, float* out) {
  // A signalling NaN becomes a quiet one, which is NaN in its upper half, too.
  first = first + zero();
  second = second + zero();
  const Vec least = set1(0x1p-126f), x = smaller(first, least), y = smaller(second, least);
  LLMOPS_UNROLL for (int part = 0; part < kParts; ++part) {
    store(out + part * kPartFloats, pair_high_halves(first, second));
    first = larger(first - high_half(first), x);
    second = larger(second - high_half(second), y);
  }
}

// Outer elements [outer, outer + 32), of which `count` exist, by `depth` steps from k on, as
// [steps of 32][parts][2 tiles][16][16 pairs]: rows of a tile are outer elements and its pairs k
// where `rows_are_outer` (operand a), else the other way round (b). A pair is of k and k + 16.
template <bool kRowsAreOuter>
LLMOPS_NOINLINE void split_strip(const MatmulOperand& from, int64_t outer, int64_t count, int64_t k,
                                 int64_t depth, float* out) {
  const float* const data =
      static_cast<const float*>(from.data) + outer * from.outer_step + k * from.k_step;
  const bool outer_dense = from.outer_step == 1;
  for (int64_t d = 0; d < depth; d += kDepth, out += kStepFloats) {
    for (int tile = 0; tile < 2; ++tile) {
      const int64_t first = tile * kSide;
      Vec half[2][kSide];
      for (int h = 0; h < 2; ++h) {
        const int64_t step = d + h * kSide;
        const float* const p = data + first * from.outer_step + step * from.k_step;
        const int outers = up_to_side(count - first), steps = up_to_side(depth - step);
        const int rows = outer_dense ? steps : outers, lanes = outer_dense ? outers : steps;
        const int64_t stride = outer_dense ? from.k_step : from.outer_step;
        if (rows == kSide && lanes == kSide) {
          LLMOPS_UNROLL for (int i = 0; i < kSide; ++i) half[h][i] = load(p + i * stride);
        } else {
          for (int i = 0; i < kSide; ++i)
            half[h][i] = i < rows ? load_n(p + i * stride, lanes) : zero();
        }
        if (outer_dense == kRowsAreOuter) transpose(half[h]);
      }
      LLMOPS_UNROLL for (int i = 0; i < kSide; ++i)
          split(half[0][i], half[1][i], out + tile * kTileFloats + i * kSide);
    }
  }
}

// sums [2 tiles of rows][2 of columns][16][16].
LLMOPS_NOINLINE void split_product(const float* a, const float* b, int64_t steps, float* sums) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  memory_is_used(a);
  memory_is_used(b);
  // With the next part of a, or of b, in place of the last one. Each load just before its first
  // use.
  const auto rows = [](const float* part) __attribute__((always_inline)) {
    _tile_loadd(4, part, 4 * kSide);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, part + kTileFloats, 4 * kSide);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  };
  const auto columns = [](const float* part) __attribute__((always_inline)) {
    _tile_loadd(6, part, 4 * kSide);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(2, 5, 6);
    _tile_loadd(7, part + kTileFloats, 4 * kSide);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
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
  _tile_stored(0, sums, 4 * kSide);
  _tile_stored(1, sums + kTileFloats, 4 * kSide);
  _tile_stored(2, sums + 2 * kTileFloats, 4 * kSide);
  _tile_stored(3, sums + 3 * kTileFloats, 4 * kSide);
  memory_is_used(sums);
}

}  // namespace
}  // namespace llmops::cpu::LLMOPS_ISA
#endif
