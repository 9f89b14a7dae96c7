// The matrix products of attention by AMX (amx.h): two forward, five backward.
//
// B is what vdpbf16ps takes as well: queries and probabilities in lanes, pairs in a cell, or rows
// of queries in pairs. A are K's and V's rows as they lie, V and K transposed, and P and dS by key.
// Tiles are 16 by 16. Two by two of them at a time each that is loaded is used twice; four above
// each other belong to one vector of queries, whose arrays then stay in the first-level cache.
#pragma once
#include "attention_tile.h"

#ifdef LLMOPS_HAS_TILES

namespace llmops::cpu::LLMOPS_ISA {
namespace {

// out [16 R][16 C of ld] = A B, or += with `add`. a: 16 R rows of `steps` times 32 bf16, row_bytes
// apart; b: [16 steps][ld] pairs.
template <int R, int C>
LLMOPS_OUTLINE void tile_product(const char* a, int64_t row_bytes, const float* b, int64_t steps,
                                 float* out, int64_t ld, bool add) {
  const int64_t row = ld * 4;
  memory_is_used(a);
  float* const below = out + kSide * ld;
  if (add) {
    _tile_loadd(0, out, row);
    if constexpr (C > 1) _tile_loadd(1, out + kSide, row);
    if constexpr (R > 1) _tile_loadd(2, below, row);
    if constexpr (R > 1 && C > 1) _tile_loadd(3, below + kSide, row);
  } else {
    _tile_zero(0);
    if constexpr (C > 1) _tile_zero(1);
    if constexpr (R > 1) _tile_zero(2);
    if constexpr (R > 1 && C > 1) _tile_zero(3);
  }
  for (int64_t s = 0; s < steps; ++s) {
    _tile_loadd(4, a, row_bytes);
    _tile_loadd(6, b, row);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (C > 1) {
      _tile_loadd(7, b + kSide, row);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (R > 1) {
      _tile_loadd(5, a + kSide * row_bytes, row_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (C > 1) _tile_dpbf16ps(3, 5, 7);
    }
    a += 2 * kDepth;
    b += kSide * ld;
  }
  _tile_stored(0, out, row);
  if constexpr (C > 1) _tile_stored(1, out + kSide, row);
  if constexpr (R > 1) _tile_stored(2, below, row);
  if constexpr (R > 1 && C > 1) _tile_stored(3, below + kSide, row);
  memory_is_used(out);
}
LLMOPS_INLINE void tile_products(int rows, int columns, const char* a, int64_t row_bytes,
                                 const float* b, int64_t steps, float* out, int64_t ld, bool add) {
  with_constant<2>(rows, [&](auto r) {
    with_constant<2>(columns, [&](auto c) {
      tile_product<r.value, c.value>(a, row_bytes, b, steps, out, ld, add);
    });
  });
}

// out [16 R][16] = A B, or += with `add`. a: as above; b: [16 steps][16] pairs. All of it lies row
// on row: the two tiles of A take turns.
template <int R>
LLMOPS_OUTLINE void column_product(const char* a, int64_t row_bytes, const float* b, int64_t steps,
                                   float* out, bool add) {
  constexpr int kTile = kSide * kSide, kRowBytes = 4 * kSide;
  memory_is_used(a);
  if (add) {
    _tile_loadd(0, out, kRowBytes);
    if constexpr (R > 1) _tile_loadd(1, out + kTile, kRowBytes);
    if constexpr (R > 2) _tile_loadd(2, out + 2 * kTile, kRowBytes);
    if constexpr (R > 3) _tile_loadd(3, out + 3 * kTile, kRowBytes);
  } else {
    _tile_zero(0);
    if constexpr (R > 1) _tile_zero(1);
    if constexpr (R > 2) _tile_zero(2);
    if constexpr (R > 3) _tile_zero(3);
  }
  const int64_t down = kSide * row_bytes;
  for (int64_t s = 0; s < steps; ++s, a += 2 * kDepth, b += kTile) {
    _tile_loadd(6, b, kRowBytes);
    _tile_loadd(4, a, row_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (R > 1) {
      _tile_loadd(5, a + down, row_bytes);
      _tile_dpbf16ps(1, 5, 6);
    }
    if constexpr (R > 2) {
      _tile_loadd(4, a + 2 * down, row_bytes);
      _tile_dpbf16ps(2, 4, 6);
    }
    if constexpr (R > 3) {
      _tile_loadd(5, a + 3 * down, row_bytes);
      _tile_dpbf16ps(3, 5, 6);
    }
  }
  _tile_stored(0, out, kRowBytes);
  if constexpr (R > 1) _tile_stored(1, out + kTile, kRowBytes);
  if constexpr (R > 2) _tile_stored(2, out + 2 * kTile, kRowBytes);
  if constexpr (R > 3) _tile_stored(3, out + 3 * kTile, kRowBytes);
  memory_is_used(out);
}
// The same for `tiles` times 16 rows.
LLMOPS_INLINE void column_products(const char* a, int64_t row_bytes, int64_t tiles, const float* b,
                                   int64_t steps, float* out, bool add) {
  for (int64_t i = 0; i < tiles; i += 4) {
    with_constant<4>(clamp_int(tiles - i, 1, 4), [&](auto r) {
      column_product<r.value>(a + i * kSide * row_bytes, row_bytes, b, steps,
                              out + i * kSide * kSide, add);
    });
  }
}

// f(first vector, how many) of pairs of vectors that see more than `keys`; visible is not
// decreasing.
template <class F>
LLMOPS_INLINE void for_vectors(int vecs, const int* visible, int keys, const F& f) {
  for (int c = 0; c < vecs; c += 2) {
    const int end = c + 2 < vecs ? c + 2 : vecs;
    int first = c;
    while (first < end && visible[first] <= keys) ++first;
    if (first < end) f(first, end - first);
  }
}

// S^T [keys][64] = K Q^T, where some lane of a vector sees a key; rows up to the next 16th are
// written, too. k: rows up to there, zeros up to the next 32nd column.
[[maybe_unused]] LLMOPS_OUTLINE void scores_by_tiles(const char* k, int64_t row_bytes,
                                                     const float* q, int64_t steps, int keys,
                                                     int vecs, const int* visible, float* out) {
  for (int i = 0; i < keys; i += 2 * kSide) {
    for_vectors(vecs, visible, i, [&](int j, int columns) {
      const int rows = visible[j + columns - 1] > i + kSide ? 2 : 1;
      tile_products(rows, columns, k + i * row_bytes, row_bytes, q + j * W, steps,
                    out + i * kLanes + j * W, kLanes, false);
    });
  }
}

// out [rows][64] += A B. a: [up to the next 16th row][a_cells] pairs of keys; of B, pairs [][64],
// what a vector does not see up to the next 32nd key is overwritten with zeros.
[[maybe_unused]] LLMOPS_OUTLINE void update_by_tiles(const float* a, int64_t a_cells, int64_t rows,
                                                     float* pairs, int vecs, const int* visible,
                                                     float* out) {
  for_vectors(vecs, visible, 0, [&](int j, int columns) {
    const int steps = (visible[j + columns - 1] + kDepth - 1) / kDepth;
    for (int c = j; c < j + columns; ++c) {
      for (int i = (visible[c] + 1) / 2; i < steps * kSide; ++i)
        store(pairs + i * kLanes + c * W, zero());
    }
    for (int64_t d = 0; d < rows; d += 2 * kSide) {
      tile_products(rows - d > kSide ? 2 : 1, columns,
                    reinterpret_cast<const char*>(a + d * a_cells), a_cells * 4, pairs + j * W,
                    steps, out + d * kLanes + j * W, kLanes, true);
    }
  });
}

// Rows as an operand: as they lie where they may and whole tiles do, else a copy up to the next
// 16th row and the next 32nd column, zeros where none are.
LLMOPS_INLINE Cells tile_rows(const bf16* in, int64_t stride, int rows, int64_t dim, float* copy,
                              bool as_they_lie = true) {
  if (as_they_lie && rows % kSide == 0 && dim % kDepth == 0) return cells(in, stride * 2, 4);
  const int64_t width = round_up(dim, kDepth) / 2;
  for (int i = 0; i < round_up(rows, kSide); ++i) {
    for (int64_t d = 0; d < dim; d += kDepth)
      store(copy + i * width + d / 2,
            i < rows ? load_pairs_n(in + i * stride + d, clamp_int(dim - d, 0, kDepth)) : zero());
  }
  return cells(copy, width * 4, 4);
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

// sums [keys][ld] += A B: a [keys up to the next 16th][64] bf16, of which what a vector of queries
// does not see is overwritten with zeros; b [32][ld] pairs of queries, zeros where there are none.
// copy: [32][ld], for the sums of keys that fill no tile.
[[maybe_unused]] LLMOPS_OUTLINE void add_to_keys_by_tiles(bf16* a, const float* b, int64_t ld,
                                                          int count, int vecs, const int* visible,
                                                          int keys, float* sums, float* copy) {
  const int64_t all = (count + kDepth - 1) / kDepth;
  for (int j = 0; j < 2 * all; ++j) {
    for (int k = j < vecs ? visible[j] : 0; k < round_up(keys, kSide); ++k)
      store(a + k * kLanes + j * W, zero());
  }
  for (int i = 0; i < keys; i += 2 * kSide) {
    int j = 0;
    while (j < vecs && visible[j] <= i) ++j;
    const int64_t first = j * W / kDepth;
    if (first >= all) continue;
    const int rows = keys - i < 2 * kSide ? keys - i : 2 * kSide;
    const bool whole = rows % kSide == 0;
    float* out = whole ? sums + i * ld : copy;
    for (int64_t c = 0; c < ld; c += 2 * kSide) {
      tile_products(rows > kSide ? 2 : 1, 2,
                    reinterpret_cast<const char*>(a + i * kLanes + first * kDepth), kLanes * 2,
                    b + first * kSide * ld + c, all - first, out + c, ld, whole);
    }
    for (int64_t d = 0; !whole && d < rows * ld; d += W)
      store(sums + i * ld + d, load(sums + i * ld + d) + load(copy + d));
  }
}

}  // namespace
}  // namespace llmops::cpu::LLMOPS_ISA
#endif
