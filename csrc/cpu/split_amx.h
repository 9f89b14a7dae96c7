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
  bool by_steps = false;  // a step of all strips before the next step
  int64_t strips() const { return (count + kPair - 1) / kPair; }
  int64_t tiles() const { return strips() * tiled_steps(depth) * 2; }
};
// Where the tile `index` is: its first outer element and step of k, and where its first row goes.
struct SplitTile {
  int64_t outer, k;
  float* out;
};
LLMOPS_INLINE SplitTile tile_at(const SplitSource& from, int64_t index, float* out) {
  const int64_t steps = tiled_steps(from.depth), tile = index % 2;
  const int64_t inner = from.by_steps ? from.strips() : steps;
  const int64_t high = index / 2 / inner, low = index / 2 % inner;
  const int64_t strip = from.by_steps ? low : high, step = from.by_steps ? high : low;
  return {strip * kPair + tile * kSide, step * kDepth,
          out + (strip * steps + step) * kStepFloats + tile * kTileFloats};
}
// Half h of a tile's rows before they are split.
template <bool kRowsAreOuter>
LLMOPS_INLINE void gather(const SplitSource& from, const SplitTile& tile, int h, Vec* half) {
  const bool outer_dense = from.outer_step == 1;
  const int64_t k = tile.k + h * kSide;
  const float* const p = from.data + tile.outer * from.outer_step + k * from.k_step;
  const int outers = up_to_side(from.count - tile.outer), ks = up_to_side(from.depth - k);
  const int rows = outer_dense ? ks : outers, lanes = outer_dense ? outers : ks;
  const int64_t stride = outer_dense ? from.k_step : from.outer_step;
  if (rows == kSide && lanes == kSide) {
    LLMOPS_UNROLL for (int i = 0; i < kSide; ++i) half[i] = load(p + i * stride);
  } else {
    for (int i = 0; i < kSide; ++i) half[i] = i < rows ? load_n(p + i * stride, lanes) : zero();
  }
  if (outer_dense == kRowsAreOuter) transpose(half);
}
template <bool kRowsAreOuter>
LLMOPS_NOINLINE void split_strips(const SplitSource& from, float* out) {
  for (int64_t index = 0; index < from.tiles(); ++index) {
    Vec half[2][kSide];
    const SplitTile tile = tile_at(from, index, out);
    for (int h = 0; h < 2; ++h) gather<kRowsAreOuter>(from, tile, h, half[h]);
    LLMOPS_UNROLL for (int i = 0; i < kSide; ++i)
        split(half[0][i], half[1][i], tile.out + i * kSide);
  }
}

// For members, which LLMOPS_INLINE would make static: inlined, what runs beside a product keeps its
// state in registers.
#define LLMOPS_BESIDE __attribute__((always_inline))
struct Nothing {
  LLMOPS_BESIDE void operator()() const {}
};
// split_strips by and by, to run beside products: each call has few enough instructions for the
// products after it to be under way meanwhile, and what the next tile reads is fetched.
template <bool kRowsAreOuter>
struct Strips {
  SplitSource from{};
  float* out = nullptr;
  SplitTile tile{}, next{};
  int64_t index = 0, tiles = 0;
  int phase = 0;
  Vec half[2][kSide];

  void begin(const SplitSource& source, float* to) {
    from = source, out = to;
    index = 0, phase = 0, tiles = source.tiles();
    if (tiles > 0) next = tile_at(from, 0, out);
  }
  bool done() const { return index == tiles; }
  __attribute__((noinline)) void some() {
    if (phase < 2) {
      if (phase == 0) tile = next, next = tile_at(from, index + 1, out);
      gather<kRowsAreOuter>(from, tile, phase, half[phase]);
      ++phase;
      return;
    }
    const int row = (phase - 2) * kRowsEach;
    const float* const ahead = from.data + next.outer * from.outer_step + next.k * from.k_step;
    const int64_t stride = from.outer_step == 1 ? from.k_step : from.outer_step;
    LLMOPS_UNROLL for (int i = 0; i < kRowsEach; ++i) {
      split(half[0][row + i], half[1][row + i], tile.out + (row + i) * kSide);
      __builtin_prefetch(ahead + (row + i) * stride);
      __builtin_prefetch(ahead + (row + i) * stride + kSide * from.k_step);
    }
    phase = phase + 1 == kPhases ? 0 : phase + 1;
    index += phase == 0;
  }
  void finish() { finish(tiles); }
  void finish(int64_t end) {
    while (index < end) some();
  }

 private:
  static constexpr int kRowsEach = 2, kPhases = 2 + kSide / kRowsEach;
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
