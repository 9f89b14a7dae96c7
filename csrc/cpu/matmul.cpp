// Matrix product for many rows. Formula and interface: matmul.h
//
// As Goto and van de Geijn's (2008) and BLIS's (Van Zee and van de Geijn, 2015): a tile of y,
// kRows x kVecs vectors, stays in registers for kSteps steps of k, each of which broadcasts kRows
// elements of a packed strip of a to the vectors of a packed strip of b. A strip of b stays in L1
// and a block of a, packed, in L2 while one runs over the other; a panel of b in L3. Packing widens
// 16-bit elements, so that every product is fp32; sums beyond kSteps go through memory as fp32 and
// are rounded once.
//
// Where there is AMX, all types go through it, cut alike: split_amx.h.
//
// Roofline on AVX2: 12 FMAs per step and 8 loads, that is 6 cycles of FMA and 3 to 4 of loads.
#include "matmul.h"

#include "simd.h"
#include "split_amx.h"

namespace llmops::cpu::LLMOPS_ISA {
namespace {

constexpr int kRows = W == 1 ? 4 : 6;
constexpr int kVecs = W == 8 ? 2 : 4;
constexpr int kColumns = kVecs * W;
constexpr int64_t kSteps = 256;            // 16 KiB of b and 6 of a on AVX2
constexpr int64_t kBlock = 16 * kRows;     // 96 KiB of a
constexpr int64_t kPanelFloats = 1 << 20;  // 4 MiB of b
// 16-bit results wait as fp32 for the last of their k: 192 KiB of them.
constexpr int64_t kNarrowColumns = 512;
template <class T>
constexpr bool kWide = sizeof(T) == sizeof(float);

LLMOPS_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
LLMOPS_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
LLMOPS_INLINE int count_of(int64_t n, int most) { return static_cast<int>(n < most ? n : most); }

template <class T>
LLMOPS_INLINE Vec load_some(const T* p, int n) {
  return n >= W ? load(p) : load_n(p, n);
}

// out[k][width] of `depth` steps from k on and `count` <= width outer elements, zeros beyond these.
// Where width is no multiple of W, a vector's last lanes are written again by the next step, and
// the last one's lie up to W floats past the end.
template <class T, int kWidth>
LLMOPS_NOINLINE void pack(const MatmulOperand& from, int64_t outer, int count, int64_t k,
                          int64_t depth, float* out) {
  const T* data = static_cast<const T*>(from.data) + outer * from.outer_step + k * from.k_step;
  if (from.outer_step == 1) {
    for (int64_t d = 0; d < depth; ++d)
      for (int i = 0; i < kWidth; i += W)
        store(out + d * kWidth + i,
              i < count ? load_some(data + d * from.k_step + i, count - i) : zero());
    return;
  }
  for (int i = 0; i < kWidth; i += W) {
    for (int64_t d = 0; d < depth; d += W) {
      const int steps = count_of(depth - d, W);
      Vec r[W];
      LLMOPS_UNROLL for (int j = 0; j < W; ++j) {
        r[j] = i + j < count ? load_some(data + (i + j) * from.outer_step + d, steps) : zero();
      }
      transpose(r);
      if (steps == W) {
        LLMOPS_UNROLL for (int j = 0; j < W; ++j) store(out + (d + j) * kWidth + i, r[j]);
      } else {
        for (int j = 0; j < steps; ++j) store(out + (d + j) * kWidth + i, r[j]);
      }
    }
  }
}

// Where a tile's sums begin and go: `sums` holds fp32 between one kSteps and the next.
template <class T>
struct Tile {
  float* sums;
  T* y;
  const T* bias;  // of the tile's columns; null
  int64_t sums_stride, y_stride;
  bool first, last;
  bool past;  // the caches, where y is aligned for it
};

template <class T>
LLMOPS_INLINE void finish(const Tile<T>& t, int i, int j, Vec v, int left) {
  const int64_t at = j * W;
  float* const sums = t.sums + i * t.sums_stride + at;
  if (!t.first) v = v + load_some(sums, left);
  if (!t.last) {
    left < W ? store_n(sums, v, left) : store(sums, v);
    return;
  }
  if (t.bias) v = v + load_some(t.bias + at, left);
  T* const y = t.y + i * t.y_stride + at;
  if (left < W) {
    store_n(y, v, left);
  } else if (t.past) {
    stream(y, v);
  } else {
    store(y, v);
  }
}

template <class T>
LLMOPS_NOINLINE void multiply(const float* a, const float* b, int64_t depth, const Tile<T>& tile,
                              int rows, int columns) {
  Vec acc[kRows][kVecs];
  LLMOPS_UNROLL for (int i = 0; i < kRows; ++i) {
    LLMOPS_UNROLL for (int j = 0; j < kVecs; ++j) acc[i][j] = zero();
    __builtin_prefetch(tile.sums + i * tile.sums_stride);  // y may have left the caches
  }
  for (int64_t d = 0; d < depth; ++d) {
    Vec row[kVecs];
    LLMOPS_UNROLL for (int j = 0; j < kVecs; ++j) row[j] = load(b + j * W);
    LLMOPS_UNROLL for (int i = 0; i < kRows; ++i) {
      const Vec x = set1(a[i]);
      LLMOPS_UNROLL for (int j = 0; j < kVecs; ++j) acc[i][j] = fma(x, row[j], acc[i][j]);
    }
    a += kRows;
    b += kColumns;
  }
  if (rows == kRows && columns == kColumns) {
    LLMOPS_UNROLL for (int i = 0; i < kRows; ++i) {
      LLMOPS_UNROLL for (int j = 0; j < kVecs; ++j) finish(tile, i, j, acc[i][j], W);
    }
    return;
  }
  LLMOPS_UNROLL for (int i = 0; i < kRows; ++i) {
    LLMOPS_UNROLL for (int j = 0; j < kVecs; ++j) {
      if (i < rows && j * W < columns) finish(tile, i, j, acc[i][j], count_of(columns - j * W, W));
    }
  }
}

template <class T>
LLMOPS_INLINE void block(const MatmulParams& p, int64_t column, int64_t end, const float* packed,
                         int64_t row, float* scratch) {
  const int64_t rows = least(kBlock, p.m - row);
  float* const left = scratch;
  float* const sums = scratch + kBlock * kSteps + W;
  T* const y = static_cast<T*>(p.y) + row * p.y_stride;
  for (int64_t k = 0; k < p.k || k == 0; k += kSteps) {
    const int64_t depth = least(kSteps, p.k - k);
    for (int64_t i = 0; i < rows; i += kRows)
      pack<T, kRows>(p.a, row + i, count_of(p.m - row - i, kRows + W), k, depth, left + i * depth);
    for (int64_t c = column; c < end; c += kColumns) {
      const float* const strip = packed + (c - column) * p.k + k * kColumns;
      for (int64_t i = 0; i < rows; i += kRows) {
        Tile<T> tile{};
        tile.y = y + i * p.y_stride + c;
        tile.y_stride = p.y_stride;
        if constexpr (kWide<T>) {
          tile.sums = tile.y;
          tile.sums_stride = p.y_stride;
        } else {
          tile.sums = sums + i * kNarrowColumns + (c - column);
          tile.sums_stride = kNarrowColumns;
        }
        tile.bias = p.bias ? static_cast<const T*>(p.bias) + c : nullptr;
        tile.first = k == 0 && !p.add;
        tile.last = k + depth >= p.k;
        multiply<T>(left + i * depth, strip, depth, tile, count_of(rows - i, kRows),
                    count_of(end - c, kColumns));
      }
    }
  }
}

#ifdef LLMOPS_HAS_TILES
// Strips of 32 columns of b in a panel, blocks of rows of a, 768 steps of k at a time, as measured
// (benchmarks/NOTES.md). Errors are two thirds of those of FMAs one after the other, for sums begin
// anew with each 768.
constexpr int64_t kTiledDepth = 768;            // 144 KiB of a strip
constexpr int64_t kTiledBlock = 8 * kPair;      // rows: 1.1 MiB of a
constexpr int64_t kTiledPanelFloats = 4 << 20;  // 16 MiB of b
// A panel goes through memory. A strip that is split beside the products with the one before it
// stays in L2, which is ahead up to four blocks that split it again. Where b's columns are dense,
// that is two strips of 384 steps, so that 256 bytes of each row are read, and ahead up to two
// blocks; for a panel half a kilobyte.
constexpr int64_t kAcrossDepth = 384, kAcrossStrips = 2, kPanelStrips = 4;
// The first strips of b multiply each strip of a while the next one of a is split.
constexpr int64_t kLeadStrips = 2;

// Steps of k at a time: as many as three parts of 768 are.
template <class Parts>
LLMOPS_INLINE int64_t depth_of(bool across) {
  return (across ? kAcrossDepth : kTiledDepth) * 3 / Parts::kParts;
}
LLMOPS_INLINE bool takes_tiles() { return active_isa() == Isa::amx; }
// f of how p's elements are taken apart.
template <class F>
LLMOPS_INLINE void with_parts(const MatmulParams& p, F f) {
  if (p.type == DType::bf16) return f(Bf16Parts{});
  if (p.type == DType::f16) return f(Fp16Parts{});
  if (p.parts == 1) return f(Fp32Medium{});
  if (p.parts == 2) return f(Fp32High{});
  f(Fp32Parts{});
}
LLMOPS_INLINE bool packs_as_it_goes(const MatmulParams& p) {
  return p.m <= (p.b.outer_step == 1 ? 2 : 4) * kTiledBlock;
}
// [outer, end) of an operand, `depth` steps of k from k on.
template <class T>
LLMOPS_INLINE SplitSource<T> source_of(const MatmulOperand& x, int64_t outer, int64_t end,
                                       int64_t k, int64_t depth) {
  const T* const data = static_cast<const T*>(x.data) + outer * x.outer_step + k * x.k_step;
  return {data, x.outer_step, x.k_step, end - outer, depth};
}

// What is split while tiles multiply: a's next strip, then b's next ones.
template <class Parts>
struct Splits {
  Strips<true, Parts> a;
  Strips<false, Parts> b;
};
template <class Parts>
struct Beside {
  Splits<Parts>* splits;
  LLMOPS_BESIDE void operator()() const {
    if (!splits->a.done()) {
      splits->a.some();
    } else if (!splits->b.done()) {
      splits->b.some();
    }
  }
};

// 32 x 32 of y: a strip of a by one of b.
template <class Parts, class T>
LLMOPS_INLINE void tile_of(const float* a, const float* b, int64_t steps, const Tile<T>& tile,
                           int rows, int columns, Beside<Parts>& beside) {
  if constexpr (kWide<T>) {
    if (rows == kPair && columns == kPair && tile.first && !tile.past && !(tile.last && tile.bias))
      return split_product<Parts>(a, b, steps, tile.y, tile.y_stride, false, beside);
  }
  alignas(64) float sums[kPair * kPair];
  split_product<Parts>(a, b, steps, sums, kPair, false, beside);
  for (int r = 0; r < rows; ++r) {
    for (int j = 0; j * W < columns; ++j)
      finish(tile, r, j, load(sums + r * kPair + j * W), count_of(columns - j * W, W));
  }
}

// T: of y and bias.
template <class Parts, class T>
LLMOPS_NOINLINE void block_by_tiles(const MatmulParams& p, int64_t column, int64_t end,
                                    const float* packed, int64_t row, float* scratch) {
  using Element = typename Parts::Element;
  constexpr int64_t kStepFloats = Parts::kStepFloats;
  const bool goes = packs_as_it_goes(p), across = goes && p.b.outer_step == 1;
  const int64_t rows = least(kTiledBlock, p.m - row), strip = tiled_steps(p.k) * kStepFloats;
  const int64_t deepest = depth_of<Parts>(across);
  const int64_t group = (!goes ? kLeadStrips : across ? kAcrossStrips : 1) * kPair;
  float* const right = scratch + kTiledBlock / kPair * tiled_steps(deepest) * kStepFloats;
  const int64_t right_floats = group / kPair * tiled_steps(deepest) * kStepFloats;
  float* const narrow_sums = right + (goes ? 2 * right_floats : 0);
  Splits<Parts> splits;
  Beside<Parts> beside{&splits};
  begin_tiles();
  for (int64_t k = 0; k < p.k || k == 0; k += deepest) {
    const int64_t depth = least(deepest, p.k - k), steps = tiled_steps(depth);
    const auto begin_group = [&](int64_t first) {
      auto from = source_of<Element>(p.b, first, least(first + group, end), k, depth);
      from.by_steps = across;
      splits.b.begin(from, right + first / group % 2 * right_floats);
    };
    splits.a.begin(source_of<Element>(p.a, row, row + rows, k, depth), scratch);
    if (goes) begin_group(column);
    for (int64_t first = column; first < end; first += group) {
      const int64_t last = least(first + group, end);
      splits.b.finish();
      if (goes && last < end) begin_group(last);
      const auto multiply_by = [&](int64_t c, int64_t i) {
        const float* const b =
            goes ? right + first / group % 2 * right_floats +
                       (c - first) / kPair * steps * kStepFloats
                 : packed + (c - column) / kPair * strip + k / kDepth * kStepFloats;
        Tile<T> tile{};
        tile.y = static_cast<T*>(p.y) + (row + i) * p.y_stride + c;
        tile.y_stride = p.y_stride;
        if constexpr (kWide<T>) {
          tile.sums = tile.y;
          tile.sums_stride = p.y_stride;
        } else {
          tile.sums = narrow_sums + i * kNarrowColumns + (c - column);
          tile.sums_stride = kNarrowColumns;
        }
        tile.bias = p.bias ? static_cast<const T*>(p.bias) + c : nullptr;
        tile.first = k == 0 && !p.add;
        tile.last = k + depth >= p.k;
        tile.past = p.past && (k == 0 || !kWide<T>);
        tile_of(scratch + i / kPair * steps * kStepFloats, b, steps, tile,
                count_of(rows - i, kPair), count_of(end - c, kPair), beside);
      };
      if (first == column) {
        for (int64_t i = 0; i < rows; i += kPair) {
          splits.a.finish((i / kPair + 1) * steps * Parts::kGathers);  // the strips up to i
          for (int64_t c = first; c < last; c += kPair) multiply_by(c, i);
        }
      } else {
        for (int64_t c = first; c < last; c += kPair)
          for (int64_t i = 0; i < rows; i += kPair) multiply_by(c, i);
      }
    }
  }
  end_tiles();
  if (p.past) stream_fence();
}

template <class Parts>
LLMOPS_INLINE MatmulPlan plan_by_tiles(const MatmulParams& p) {
  constexpr int64_t kStepFloats = Parts::kStepFloats;
  const int64_t strip = tiled_steps(p.k) * kStepFloats, fit = kTiledPanelFloats / (strip + 1);
  const int64_t left = kTiledBlock / kPair * tiled_steps(depth_of<Parts>(false)) * kStepFloats;
  const bool goes = packs_as_it_goes(p), across = p.b.outer_step == 1;
  // 16-bit sums of several depths are kept apart, for so many columns.
  const bool narrow =
      !p.wide && !kWide<typename Parts::Element> && p.k > depth_of<Parts>(goes && across);
  const int64_t most = narrow ? kNarrowColumns : p.n;
  const int64_t sums = narrow ? kTiledBlock * kNarrowColumns : 0;
  if (goes) {
    // These strips and the next.
    const int64_t right =
        2 * (across ? kAcrossStrips : 1) * tiled_steps(depth_of<Parts>(across)) * kStepFloats;
    return {round_up(least(p.n, most), kPair), kPair, kTiledBlock, 0, left + right + sums};
  }
  // Strips to one packing: several where that reads more of each row.
  const int64_t each = across ? kPanelStrips : 1, columns = each * kPair;
  const int64_t panel = round_up(fit < 4 ? 4 : fit, each) * kPair;
  return {least(panel, round_up(least(p.n, most), columns)), columns, kTiledBlock, each * strip,
          left + sums};
}
#endif

}  // namespace

MatmulPlan matmul_plan(const MatmulParams& p) {
#ifdef LLMOPS_HAS_TILES
  if (takes_tiles()) {
    MatmulPlan plan{};
    with_parts(p, [&](auto parts) { plan = plan_by_tiles<decltype(parts)>(p); });
    return plan;
  }
#endif
  const int64_t fit = kPanelFloats / (p.k > 0 ? p.k : 1) / kColumns * kColumns;
  int64_t panel = fit < 4 * kColumns ? 4 * kColumns : fit;
  const bool narrow = p.type != DType::f32;
  if (narrow) panel = least(panel, kNarrowColumns);
  panel = least(panel, round_up(p.n, kColumns));
  return {panel, kColumns, kBlock, p.k * kColumns,
          kBlock * kSteps + W + (narrow ? kBlock * kNarrowColumns : 0)};
}

void matmul_pack(const MatmulParams& p, int64_t column, float* out) {
#ifdef LLMOPS_HAS_TILES
  if (takes_tiles()) {
    const int64_t columns = p.b.outer_step == 1 ? kPanelStrips * kPair : kPair;
    return with_parts(p, [&](auto parts) {
      using Parts = decltype(parts);
      auto from =
          source_of<typename Parts::Element>(p.b, column, least(column + columns, p.n), 0, p.k);
      from.by_steps = true;
      split_strips<false, Parts>(from, out);
    });
  }
#endif
  LLMOPS_DISPATCH(p.type, T,
                  (pack<T, kColumns>(p.b, column, count_of(p.n - column, kColumns), 0, p.k, out)));
}

void matmul_block(const MatmulParams& p, int64_t column, int64_t end, const float* packed,
                  int64_t row, float* scratch) {
#ifdef LLMOPS_HAS_TILES
  if (takes_tiles()) {
    return with_parts(p, [&](auto parts) {
      using Parts = decltype(parts);
      if (p.wide) return block_by_tiles<Parts, float>(p, column, end, packed, row, scratch);
      block_by_tiles<Parts, typename Parts::Element>(p, column, end, packed, row, scratch);
    });
  }
#endif
  LLMOPS_DISPATCH(p.type, T, block<T>(p, column, end, packed, row, scratch));
}

}  // namespace llmops::cpu::LLMOPS_ISA
