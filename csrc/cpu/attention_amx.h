// The matrix products of attention by AMX (amx.h): two forward, five backward.
//
// B is what vdpbf16ps takes as well: queries and probabilities in lanes, pairs in a cell, or rows
// of queries in pairs. A are K's and V's rows as they lie, V and K transposed, and P and dS by key.
// Tiles are 16 by 16, four above each other: of one vector of queries, or of columns, whose
// arrays then stay in the first-level cache.
#pragma once
#include "attention_tile.h"

#ifdef LLMOPS_HAS_TILES

namespace llmops::cpu::LLMOPS_ISA {
namespace {

// Operand A: rows of pairs, and how many bytes from one row, and from one step of 32, to the next.
struct TileRows {
  const char* base;
  int64_t row, step = 2 * kDepth;
};

// out [16 R][16 of ld] = A B, or += with `add`. b: [16 steps][16] pairs, row on row. The two tiles
// of A take turns.
template <int R>
LLMOPS_OUTLINE void column_product(const char* a, int64_t a_row, int64_t a_step, const float* b,
                                   int64_t steps, float* out, int64_t ld, bool add) {
  const int64_t row = 4 * ld, next = kSide * ld, down = kSide * a_row;
  constexpr int kRowBytes = 4 * kSide;
  memory_is_used(a);
  if (add) {
    _tile_loadd(0, out, row);
    if constexpr (R > 1) _tile_loadd(1, out + next, row);
    if constexpr (R > 2) _tile_loadd(2, out + 2 * next, row);
    if constexpr (R > 3) _tile_loadd(3, out + 3 * next, row);
  } else {
    _tile_zero(0);
    if constexpr (R > 1) _tile_zero(1);
    if constexpr (R > 2) _tile_zero(2);
    if constexpr (R > 3) _tile_zero(3);
  }
  for (int64_t s = 0; s < steps; ++s, a += a_step, b += kSide * kSide) {
    _tile_loadd(6, b, kRowBytes);
    _tile_loadd(4, a, a_row);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (R > 1) {
      _tile_loadd(5, a + down, a_row);
      _tile_dpbf16ps(1, 5, 6);
    }
    if constexpr (R > 2) {
      _tile_loadd(4, a + 2 * down, a_row);
      _tile_dpbf16ps(2, 4, 6);
    }
    if constexpr (R > 3) {
      _tile_loadd(5, a + 3 * down, a_row);
      _tile_dpbf16ps(3, 5, 6);
    }
  }
  _tile_stored(0, out, row);
  if constexpr (R > 1) _tile_stored(1, out + next, row);
  if constexpr (R > 2) _tile_stored(2, out + 2 * next, row);
  if constexpr (R > 3) _tile_stored(3, out + 3 * next, row);
  memory_is_used(out);
}
// The same for `tiles` times 16 rows.
LLMOPS_INLINE void column_products(TileRows a, int64_t tiles, const float* b, int64_t steps,
                                   float* out, int64_t ld, bool add) {
  for (int64_t i = 0; i < tiles; i += 4) {
    with_constant<4>(clamp_int(tiles - i, 1, 4), [&](auto r) {
      column_product<r.value>(a.base + i * kSide * a.row, a.row, a.step, b, steps,
                              out + i * kSide * ld, ld, add);
    });
  }
}

// Rows as an operand: as they lie where they may and whole tiles do, else a copy up to the next
// 16th row and the next 32nd column, zeros where none are.
LLMOPS_INLINE TileRows tile_rows(const bf16* in, int64_t stride, int rows, int64_t dim, float* copy,
                                 bool as_they_lie = true) {
  if (as_they_lie && rows % kSide == 0 && dim % kDepth == 0)
    return {reinterpret_cast<const char*>(in), stride * 2};
  const int64_t width = round_up(dim, kDepth) / 2;
  for (int i = 0; i < round_up(rows, kSide); ++i) {
    for (int64_t d = 0; d < dim; d += kDepth)
      store(copy + i * width + d / 2,
            i < rows ? load_pairs_n(in + i * stride + d, clamp_int(dim - d, 0, kDepth)) : zero());
  }
  return {reinterpret_cast<const char*>(copy), width * 4};
}

// out [dim up to the next 32nd][cells]: cell (d, i) is (in[2i][d], in[2i + 1][d]), for keys up to
// the next 32nd; zeros where there are none.
[[maybe_unused]] LLMOPS_OUTLINE void transpose_rows(const bf16* in, int64_t stride, int rows,
                                                    int64_t dim, float* out, int64_t cells) {
  const auto row = [&](int i, int64_t d) __attribute__((always_inline)) {
    return i < rows ? load_pairs_n(in + i * stride + d, clamp_int(dim - d, 0, kDepth)) : zero();
  };
  for (int i = 0; i < rows; i += kDepth) {
    for (int64_t d = 0; d < dim; d += kDepth) {
      Vec pairs[2][kSide];
      for (int r = 0; r < kSide; ++r) {
        Vec both[2];
        interleave_pairs(row(i + 2 * r, d), row(i + 2 * r + 1, d), both);
        pairs[0][r] = both[0], pairs[1][r] = both[1];
      }
      for (int h = 0; h < 2; ++h) {
        transpose(pairs[h]);
        LLMOPS_UNROLL for (int r = 0; r < kSide; ++r)
            store(out + (d + h * kSide + r) * cells + i / 2, pairs[h][r]);
      }
    }
  }
}

}  // namespace
}  // namespace llmops::cpu::LLMOPS_ISA
#endif
