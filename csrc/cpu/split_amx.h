// Products of more than bf16's precision by AMX (amx.h), which multiplies bf16 alone: every element
// is taken as the sum of bf16 values, eight bits of its mantissa each. Henry, Tang and Heinecke
// (2019). In each 32 steps the small products come first.
//
// fp32, three parts, so that nothing of it is lost. Six products take half the time of fp32 FMAs.
//   a b = a0 b0 + (a0 b1 + a1 b0 + a0 b2 + a1 b1 + a2 b0); left out: less than 2^-21 |a b|
// fp32 where torch.set_float32_matmul_precision asks for less, "high": two parts, rounded,
//   a b = a0 b0 + (a0 b1 + a1 b0); left out: less than 2^-13 |a b|, 2^-17 on average
// and "medium": one.
// fp16, two parts and all four products, which are exact. bf16 is one part as it is.
//
// Tiles have no subnormals: what is below 2^-126 counts as zero, so elements below 2^-110 have
// fewer than 24 bits. An infinity's other parts, and those that are zero, are 2^-126 with its sign:
// an infinite part times zero would be NaN, where the product is infinite.
#pragma once
#include <type_traits>

#include "amx.h"

#ifdef LLMOPS_HAS_TILES

namespace llmops::cpu::LLMOPS_ISA {
namespace {

constexpr int kTileFloats = kSide * kSide;
constexpr int kPair = 2 * kSide;                  // rows, or columns, of a product
constexpr int64_t kPartFloats = 2 * kTileFloats;  // both tiles of one part

// How elements are taken apart; kStepFloats: of a strip's 32 steps of k.
template <class T, int N>
struct PartsOf {
  using Element = T;
  static constexpr int kParts = N;
  static constexpr bool kRounded = std::is_same_v<T, float> && N < 3;  // not all of it is kept
  static constexpr int64_t kStepFloats = N * kPartFloats;
  // A step is gathered a tile at a time; of bf16, whose pairs are there already, both at once.
  static constexpr int kGathers = std::is_same_v<T, bf16> ? 1 : 2;
};
using Fp32Parts = PartsOf<float, 3>;
using Fp32High = PartsOf<float, 2>;
using Fp32Medium = PartsOf<float, 1>;
using Fp16Parts = PartsOf<fp16, 2>;
using Bf16Parts = PartsOf<bf16, 1>;
LLMOPS_INLINE int64_t tiled_steps(int64_t depth) { return (depth + kDepth - 1) / kDepth; }

LLMOPS_INLINE int up_to(int most, int64_t n) { return static_cast<int>(n < most ? n : most); }

// A row of the tiles of each part: lane by lane a pair, first's below second's.
// Not kCareful: of finite values.
template <class Parts, bool kCareful = true>
LLMOPS_INLINE void split(Vec first, Vec second, float* out) {
  constexpr int kLast = Parts::kParts - 1;
  // The upper half of a signalling NaN may be an infinity's; smaller makes its other parts NaN.
  const Vec least = set1(0x1p-126f), x = smaller(first, least), y = smaller(second, least);
  LLMOPS_UNROLL for (int part = 0; part < kLast; ++part) {
    store(out + part * kPartFloats, pair_high_halves(first, second));
    first = first - high_half(first);
    second = second - high_half(second);
    if constexpr (kCareful) {
      first = larger(first, x);
      second = larger(second, y);
    }
  }
  store(out + kLast * kPartFloats,
        Parts::kRounded ? make_pairs(first, second) : pair_high_halves(first, second));
}

// `count` outer elements by `depth` steps of k as strips of 32 of them, each [steps of 32][parts]
// [2 tiles][16][16 pairs]: rows of a tile are outer elements and its pairs k for the operand a, the
// other way round for b. A pair is of k and k + 16. Element (outer, k) is at data + outer *
// outer_step + k * k_step, one of the steps 1; zeros where there is none.
template <class T>
struct SplitSource {
  const T* data;
  int64_t outer_step, k_step, count, depth;
  bool by_steps = false;  // a step of all strips before the next step
  int64_t strips() const { return (count + kPair - 1) / kPair; }
};
template <class Parts>
LLMOPS_INLINE int64_t gathers_of(const SplitSource<typename Parts::Element>& from) {
  return from.strips() * tiled_steps(from.depth) * Parts::kGathers;
}
// Where the tile of a gather is: its first outer element and step of k, and where its first row
// goes.
struct SplitTile {
  int64_t outer, k;
  float* out;
};
template <class Parts>
LLMOPS_INLINE SplitTile tile_at(const SplitSource<typename Parts::Element>& from, int64_t index,
                                float* out) {
  constexpr int kGathers = Parts::kGathers;
  const int64_t steps = tiled_steps(from.depth), tile = index % kGathers;
  const int64_t inner = from.by_steps ? from.strips() : steps;
  const int64_t high = index / kGathers / inner, low = index / kGathers % inner;
  const int64_t strip = from.by_steps ? low : high, step = from.by_steps ? high : low;
  return {strip * kPair + tile * kSide, step * kDepth,
          out + (strip * steps + step) * Parts::kStepFloats + tile * kTileFloats};
}
// Half h of a tile's rows before they are split.
template <bool kRowsAreOuter, class T>
LLMOPS_INLINE void gather(const SplitSource<T>& from, const SplitTile& tile, int h,
                          Vec (*halves)[kSide]) {
  Vec* const half = halves[h];
  const bool outer_dense = from.outer_step == 1;
  const int64_t k = tile.k + h * kSide;
  const T* const p = from.data + tile.outer * from.outer_step + k * from.k_step;
  const int outers = up_to(kSide, from.count - tile.outer), ks = up_to(kSide, from.depth - k);
  const int rows = outer_dense ? ks : outers, lanes = outer_dense ? outers : ks;
  const int64_t stride = outer_dense ? from.k_step : from.outer_step;
  if (rows == kSide && lanes == kSide) {
    LLMOPS_UNROLL for (int i = 0; i < kSide; ++i) half[i] = load(p + i * stride);
  } else {
    for (int i = 0; i < kSide; ++i) half[i] = i < rows ? load_n(p + i * stride, lanes) : zero();
  }
  if (outer_dense == kRowsAreOuter) transpose(half);
}
// Of bf16 the rows of both tiles: first as they are read, then turned where they must be.
template <bool kRowsAreOuter>
LLMOPS_INLINE void gather(const SplitSource<bf16>& from, const SplitTile& tile, int h,
                          Vec (*tiles)[kSide]) {
  const bool outer_dense = from.outer_step == 1;
  if (h == 1) {
    if (outer_dense == kRowsAreOuter) transpose(tiles[0]), transpose(tiles[1]);
    return;
  }
  const bf16* const p = from.data + tile.outer * from.outer_step + tile.k * from.k_step;
  const int outers = up_to(kPair, from.count - tile.outer), ks = up_to(kPair, from.depth - tile.k);
  const int rows = outer_dense ? ks : outers, lanes = outer_dense ? outers : ks;
  const int64_t stride = outer_dense ? from.k_step : from.outer_step;
  const auto row = [&](int i) __attribute__((always_inline)) {
    return i < rows ? load_pairs_n(p + i * stride, lanes) : zero();
  };
  for (int i = 0; i < kSide; ++i) {
    if (outer_dense) {
      Vec both[2];
      interleave_pairs(row(i), row(i + kSide), both);
      tiles[0][i] = both[0], tiles[1][i] = both[1];
    } else {
      tiles[0][i] = merge_halves(row(i)), tiles[1][i] = merge_halves(row(i + kSide));
    }
  }
}
// Row i of what was gathered, in parts.
template <class Parts>
LLMOPS_INLINE void put_row(const Vec (*half)[kSide], int i, const SplitTile& tile) {
  float* const out = tile.out + i * kSide;
  if constexpr (Parts::kGathers == 1) {
    store(out, half[0][i]);
    store(out + kTileFloats, half[1][i]);
  } else {
    split<Parts>(half[0][i], half[1][i], out);
  }
}
template <bool kRowsAreOuter, class Parts = Fp32Parts>
LLMOPS_NOINLINE void split_strips(const SplitSource<typename Parts::Element>& from, float* out) {
  for (int64_t index = 0; index < gathers_of<Parts>(from); ++index) {
    Vec half[2][kSide];
    const SplitTile tile = tile_at<Parts>(from, index, out);
    for (int h = 0; h < 2; ++h) gather<kRowsAreOuter>(from, tile, h, half);
    LLMOPS_UNROLL for (int i = 0; i < kSide; ++i) put_row<Parts>(half, i, tile);
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
template <bool kRowsAreOuter, class Parts = Fp32Parts>
struct Strips {
  using Source = SplitSource<typename Parts::Element>;
  Source from{};
  float* out = nullptr;
  SplitTile tile{}, next{};
  int64_t index = 0, gathers = 0;
  int phase = 0;
  Vec half[2][kSide];

  void begin(const Source& source, float* to) {
    from = source, out = to;
    index = 0, phase = 0, gathers = gathers_of<Parts>(source);
    if (gathers > 0) next = tile_at<Parts>(from, 0, out);
  }
  bool done() const { return index == gathers; }
  __attribute__((noinline)) void some() {
    if (phase < 2) {
      if (phase == 0) tile = next, next = tile_at<Parts>(from, index + 1, out);
      gather<kRowsAreOuter>(from, tile, phase, half);
      ++phase;
      return;
    }
    const int row = (phase - 2) * kRowsEach;
    const auto* const ahead = from.data + next.outer * from.outer_step + next.k * from.k_step;
    const int64_t stride = from.outer_step == 1 ? from.k_step : from.outer_step;
    const int64_t second = kSide * (Parts::kGathers == 1 ? stride : from.k_step);
    LLMOPS_UNROLL for (int i = 0; i < kRowsEach; ++i) {
      put_row<Parts>(half, row + i, tile);
      __builtin_prefetch(ahead + (row + i) * stride);
      __builtin_prefetch(ahead + (row + i) * stride + second);
    }
    phase = phase + 1 == kPhases ? 0 : phase + 1;
    index += phase == 0;
  }
  void finish() { finish(gathers); }
  void finish(int64_t end) {
    while (index < end) some();
  }

 private:
  static constexpr int kRowsEach = 2, kPhases = 2 + kSide / kRowsEach;
};

// The sums of two strips, [32][32 of ld], in four tiles: those in memory or zeros. kNarrow: of b's
// first 16 alone.
template <bool kNarrow = false>
LLMOPS_INLINE void begin_sums(const float* sums, int64_t ld, bool add) {
  const int64_t row = ld * 4;
  memory_is_used(sums);
  if (add) {
    _tile_loadd(0, sums, row);
    _tile_loadd(2, sums + kSide * ld, row);
    if constexpr (!kNarrow) {
      _tile_loadd(1, sums + kSide, row);
      _tile_loadd(3, sums + kSide * ld + kSide, row);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
}
template <bool kNarrow = false>
LLMOPS_INLINE void end_sums(float* sums, int64_t ld) {
  const int64_t row = ld * 4;
  _tile_stored(0, sums, row);
  _tile_stored(2, sums + kSide * ld, row);
  if constexpr (!kNarrow) {
    _tile_stored(1, sums + kSide, row);
    _tile_stored(3, sums + kSide * ld + kSide, row);
  }
  memory_is_used(sums);
}
// Adds the products of `steps` steps. `beside` is called after every second product of tiles: its
// vectors' instructions run while the tiles multiply.
template <class Parts, bool kNarrow = false, class F>
LLMOPS_INLINE void add_products(const float* a, const float* b, int64_t steps, F& beside) {
  // With the next part of a, or of b, in place of the last one. Each load just before its first
  // use.
  const auto rows = [&](const float* part) __attribute__((always_inline)) {
    _tile_loadd(4, part, 4 * kSide);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (!kNarrow) _tile_dpbf16ps(1, 4, 7);
    beside();
    _tile_loadd(5, part + kTileFloats, 4 * kSide);
    _tile_dpbf16ps(2, 5, 6);
    if constexpr (!kNarrow) _tile_dpbf16ps(3, 5, 7);
    beside();
  };
  const auto columns = [&](const float* part) __attribute__((always_inline)) {
    _tile_loadd(6, part, 4 * kSide);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(2, 5, 6);
    beside();
    if constexpr (!kNarrow) {
      _tile_loadd(7, part + kTileFloats, 4 * kSide);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
      beside();
    }
  };
  for (int64_t s = 0; s < steps; ++s, a += Parts::kStepFloats, b += Parts::kStepFloats) {
    _tile_loadd(6, b, 4 * kSide);
    if constexpr (!kNarrow) _tile_loadd(7, b + kTileFloats, 4 * kSide);
    if constexpr (Parts::kParts == 3) rows(a + 2 * kPartFloats);
    if constexpr (Parts::kParts > 1) rows(a + kPartFloats);
    if constexpr (Parts::kParts > 1 && !Parts::kRounded) columns(b + kPartFloats);
    rows(a);
    if constexpr (Parts::kParts == 3) columns(b + 2 * kPartFloats);
    if constexpr (Parts::kParts == 2 && Parts::kRounded) columns(b + kPartFloats);
    if constexpr (Parts::kParts > 1 && !Parts::kRounded) columns(b);
  }
}
// out [32][32 of ld] = A B of two strips, or += with `add`.
template <class Parts = Fp32Parts, class F>
LLMOPS_INLINE void split_product(const float* a, const float* b, int64_t steps, float* out,
                                 int64_t ld, bool add, F& beside) {
  begin_sums(out, ld, add);
  add_products<Parts>(a, b, steps, beside);
  end_sums(out, ld);
}

}  // namespace
}  // namespace llmops::cpu::LLMOPS_ISA
#endif
