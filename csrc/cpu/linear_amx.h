// linear's product by AMX (amx.h): y^T = W x^T, 16 rows of weights by 16 rows of x to a tile.
//
// The weights are A as they lie in memory; x is B, packed once. A product of up to 16 rows of x
// costs no more than the reading of W does, so 64 rows of weights share each tile of x. Beyond, two
// tiles by two. Nothing is fetched in advance: a tile's load asks for 16 lines at once, and every
// distance tried lost (benchmarks/NOTES.md).
#pragma once
#include "amx.h"
#include "linear.h"
#include "split_amx.h"

#ifdef LLMOPS_HAS_TILES

namespace llmops::cpu::LLMOPS_ISA {
namespace {

constexpr int64_t kTiledRows = 3;  // from here on one pass of tiles is ahead of the pairs'

LLMOPS_INLINE bool takes_tiles(DType type, int64_t rows) {
  return type == DType::bf16 && rows >= kTiledRows && active_isa() == Isa::amx;
}

LLMOPS_INLINE int64_t tile_steps(int64_t k) { return (k + kDepth - 1) / kDepth; }
LLMOPS_INLINE int64_t tile_panels(int64_t rows) { return (rows + kSide - 1) / kSide; }

// 16 rows of 32 bf16, zeros beyond `rows` and `columns`.
LLMOPS_NOINLINE void padded_tile(const bf16* from, int64_t stride, int rows, int64_t columns,
                                 float* out) {
  for (int i = 0; i < kSide; ++i) {
    const int n = i < rows ? static_cast<int>(columns < kDepth ? columns : kDepth) : 0;
    store(out + i * kSide, n > 0 ? load_pairs_n(from + i * stride, n) : zero());
  }
}

// out [panels of 16 rows of x][steps of 32][16 pairs][16 rows]; zeros where x ends.
LLMOPS_NOINLINE void pack_tiles(const bf16* x, int64_t x_stride, int64_t rows, int64_t k,
                                float* out) {
  for (int64_t first = 0; first < rows; first += kSide) {
    const int count = static_cast<int>(rows - first < kSide ? rows - first : kSide);
    for (int64_t d = 0; d < k; d += kDepth, out += kTileFloats) {
      padded_tile(x + first * x_stride + d, x_stride, count, k - d, out);
      Vec r[W];
      LLMOPS_UNROLL for (int i = 0; i < W; ++i) r[i] = load(out + i * kSide);
      transpose(r);
      LLMOPS_UNROLL for (int i = 0; i < W; ++i) store(out + i * kSide, r[i]);
    }
  }
}

// sums [NX][16 NW rows of weights][16 rows of x]. w: `rows` of them, the last tile's may be fewer;
// x: NX panels, `panel` floats apart.
template <int NW, int NX>
LLMOPS_NOINLINE void weights_product(const bf16* w, int64_t stride, int rows, int64_t k,
                                     const float* x, int64_t panel, float* sums) {
  static_assert(NX == 1 ? NW <= 4 : NW <= 2, "four tiles of sums");
  alignas(64) float part[NW][kTileFloats];
  const bf16* tile[NW];
  _tile_zero(0);
  if constexpr (NW * NX > 1) _tile_zero(1);
  if constexpr (NW * NX > 2) {
    _tile_zero(2);
    _tile_zero(3);
  }
  memory_is_used(x);
  const int64_t steps = tile_steps(k);
  for (int64_t s = 0; s < steps; ++s, x += kTileFloats) {
    const int64_t d = s * kDepth;
    int64_t bytes = stride * 2;
    if (rows == NW * kSide && k - d >= kDepth) {
      LLMOPS_UNROLL for (int i = 0; i < NW; ++i) tile[i] = w + i * kSide * stride + d;
    } else {
      bytes = 4 * kSide;
      for (int i = 0; i < NW; ++i) {
        padded_tile(w + i * kSide * stride + d, stride, rows - i * kSide, k - d, part[i]);
        tile[i] = reinterpret_cast<const bf16*>(part[i]);
      }
      memory_is_used(part);
    }
    _tile_loadd(6, x, 4 * kSide);
    _tile_loadd(4, tile[0], bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (NX > 1) {
      _tile_loadd(7, x + panel, 4 * kSide);
      _tile_dpbf16ps(1, 4, 7);
      if constexpr (NW > 1) {
        _tile_loadd(5, tile[1], bytes);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    } else if constexpr (NW > 1) {
      _tile_loadd(5, tile[1], bytes);
      _tile_dpbf16ps(1, 5, 6);
      _tile_loadd(4, tile[2], bytes);
      _tile_dpbf16ps(2, 4, 6);
      _tile_loadd(5, tile[3], bytes);
      _tile_dpbf16ps(3, 5, 6);
    }
  }
  _tile_stored(0, sums, 4 * kSide);
  if constexpr (NW * NX > 1) {
    // Of two panels, the second's sums are behind all of the first's.
    _tile_stored(1, sums + (NX > 1 ? NW : 1) * kTileFloats, 4 * kSide);
  }
  if constexpr (NW * NX > 2) {
    _tile_stored(2, sums + (NX > 1 ? 1 : 2) * kTileFloats, 4 * kSide);
    _tile_stored(3, sums + 3 * kTileFloats, 4 * kSide);
  }
  memory_is_used(sums);
}

// y of rows [first, first + 16) of x and weights [n, n + rows), from sums [up to the next 16th
// weight][16].
LLMOPS_NOINLINE void put_sums(const LinearParams& p, int64_t first, int64_t n, int rows,
                              const float* sums) {
  const bf16* bias = static_cast<const bf16*>(p.bias);
  for (int i = 0; i < rows; i += kSide, n += kSide, sums += kTileFloats) {
    const int count = rows - i < kSide ? rows - i : kSide;
    const Vec add = bias ? load_n(bias + n, count) : zero();
    Vec r[W];
    LLMOPS_UNROLL for (int j = 0; j < W; ++j) r[j] = load(sums + j * kSide);
    transpose(r);
    for (int j = 0; j < kSide && first + j < p.rows; ++j)
      store_n(static_cast<bf16*>(p.y) + (first + j) * p.y_stride + n, bias ? r[j] + add : r[j],
              count);
  }
}

LLMOPS_NOINLINE void linear_by_tiles(const LinearParams& p, const float* packed, int64_t begin,
                                     int64_t end) {
  const bf16* weights = static_cast<const bf16*>(p.w);
  const int64_t panel = tile_steps(p.k) * kTileFloats, panels = tile_panels(p.rows);
  const int most = panels == 1 ? 4 * kSide : 2 * kSide;
  alignas(64) float sums[4 * kTileFloats];
  begin_tiles();
  for (int64_t n = begin, rows; n < end; n += rows) {
    rows = end - n >= most ? most : (end - n < kSide ? end - n : kSide);
    const int count = static_cast<int>(rows);
    const bf16* w = weights + n * p.w_stride;
    for (int64_t i = 0; i < panels; i += 2) {
      const float* x = packed + i * panel;
      const bool two = i + 1 < panels, full = count == most;
      if (two) {
        (full ? weights_product<2, 2> : weights_product<1, 2>)(w, p.w_stride, count, p.k, x, panel,
                                                               sums);
        put_sums(p, (i + 1) * kSide, n, count, sums + (full ? 2 : 1) * kTileFloats);
      } else if (full && panels == 1) {
        weights_product<4, 1>(w, p.w_stride, count, p.k, x, panel, sums);
      } else {
        for (int j = 0; j < count; j += kSide)
          weights_product<1, 1>(w + j * p.w_stride, p.w_stride,
                                count - j < kSide ? count - j : kSide, p.k, x, panel,
                                sums + j * kSide);
      }
      put_sums(p, i * kSide, n, count, sums);
    }
  }
  end_tiles();
}

}  // namespace
}  // namespace llmops::cpu::LLMOPS_ISA
#endif
