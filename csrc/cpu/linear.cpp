// Linear layer for few rows of x (a decode step, a small batch); for many: matmul.cpp. Formula:
// linear.h
//
// Reading W is the cost: element size * N * K bytes for 2 * rows * N * K flops. x is copied once
// into padded fp32 rows (bf16 ones for vdpbf16ps) and stays in cache; then W rows of weights at a
// time are multiplied by all of x, in tiles of R rows of x by W / R rows of weights (AVX2: six, by
// three), lanes along K. The W rows come from eight runs through memory far apart: a processor
// fetches ahead within a page only, and eight pages at a time go 1.5 times as fast as one. The W
// sums of a block are formed by one reduction, the bias is added in fp32, and each result is
// rounded once. Many rows of x go through in panels that stay in L2, which reads W once per panel.
// bf16 by AMX: linear_amx.h; from 13 rows on in fp32: linear_lanes.h
#include "linear.h"

#include "dot_tile.h"
#include "linear_amx.h"
#include "linear_lanes.h"
#include "linear_split.h"

namespace llmops::cpu::LLMOPS_ISA {
namespace {

constexpr int kTile = W == 1 ? 1 : 4;  // rows of x per tile
// Bytes of each row of weights that are fetched in advance, as measured (benchmarks/NOTES.md).
constexpr int kAhead = W == 1 ? 0 : (W == 8 ? 512 : 1024);
constexpr int64_t kPanelFloats = 256 << 8;  // a panel of x: 256 KiB, half of a common L2
constexpr int64_t kAgainBytes = 4 << 20;

template <class T>
struct Pairs {
  static constexpr bool value = false;
};
#ifdef LLMOPS_HAS_DOT_PAIRS
template <>
struct Pairs<bf16> {
  static constexpr bool value = true;
};
#endif

// What R rows of x are multiplied by: kRows rows of weights, from kStreams runs through them, in
// tiles of kColumns; the sums of kGroup columns are whole vectors.
template <int R>
struct Block {
  // AVX2: twelve sums, three rows of weights and one of x are its 16 registers.
  static constexpr bool kTwelve = W == 8 && R == 4;
  static constexpr int kGroup = kTwelve ? 6 : W / R;
  static constexpr int kColumns = kTwelve ? 3 : (kGroup < 8 ? kGroup : 8);
  static constexpr int kRows = kTwelve ? kGroup : W;
  static constexpr int kStreams = kRows < 8 ? kRows : 8;
};

// Pairs have twice the flops of the fp32 that lanes make of them.
template <class T>
LLMOPS_INLINE bool by_lanes(int64_t rows) {
  return !Pairs<T>::value && takes_lanes<T>(rows);
}
// Floats of one packed row: whole vectors, of 2 * W elements where they are pairs.
template <class T>
LLMOPS_INLINE int64_t packed_stride(int64_t k) {
  return (k + 2 * W - 1) / (2 * W) * (Pairs<T>::value ? W : 2 * W);
}
LLMOPS_INLINE int64_t padded_rows(int64_t rows) {
  return rows <= 2 && kTile > 1 ? rows : (rows + kTile - 1) / kTile * kTile;
}

template <class T>
LLMOPS_INLINE void pack_row(const T* x, int64_t rows, int64_t k, float* out) {
#ifdef LLMOPS_HAS_DOT_PAIRS
  if constexpr (Pairs<T>::value) {
    for (int64_t i = 0; i < k; i += 2 * W)
      store(out + i / 2, load_pairs_n(x + i, static_cast<int>(k - i < 2 * W ? k - i : 2 * W)));
    return;
  }
#endif
  const int64_t stride = packed_stride<T>(k);
  int64_t i = 0;
  for (; i + 2 * W <= k; i += 2 * W) store_row<T>(out + i, rows, load(x + i), load(x + i + W));
  if (i == stride) return;
  const int left = static_cast<int>(k - i);
  store_row<T>(out + i, rows, load_n(x + i, left), left > W ? load_n(x + i + W, left - W) : zero());
}

// x . w without vectors: as many partial sums as AVX2 has lanes, since one alone rounds too often.
template <class T>
LLMOPS_INLINE float dot_plain(const T* w, int64_t k, const float* x) {
  float part[8] = {};
  for (int64_t i = 0; i < k; ++i) part[i % 8] += x[i] * to_float(w[i]);
  return ((part[0] + part[1]) + (part[2] + part[3])) + ((part[4] + part[5]) + (part[6] + part[7]));
}

// sums[r][t] = x[r] . w[t] for R rows of x and the block's rows of weights.
template <class T, int R>
LLMOPS_INLINE void dot_block(const T* const* w, int64_t k, const float* x,
                             float (*sums)[Block<R>::kRows]) {
  if constexpr (W == 1) {
    sums[0][0] = dot_plain(w[0], k, x);
  } else {
    constexpr int kGroup = Block<R>::kGroup, kColumns = Block<R>::kColumns;
    for (int t = 0; t < Block<R>::kRows; t += kGroup) {
      Vec acc[R * kGroup];
      for (int j = 0; j < kGroup; j += kColumns) {
        Vec tile[R * kColumns];  // an array of its own stays in registers
        dot_tile<T, Pairs<T>::value, R, kColumns, kAhead>(w + t + j, k, x, packed_stride<T>(k),
                                                          tile);
        LLMOPS_UNROLL for (int i = 0; i < R * kColumns; ++i) acc[j * R + i] = tile[i];
      }
      float all[R * kGroup];
      LLMOPS_UNROLL for (int i = 0; i < R * kGroup; i += W) store(all + i, reduce_each(acc + i));
      LLMOPS_UNROLL for (int r = 0; r < R; ++r) {
        LLMOPS_UNROLL for (int j = 0; j < kGroup; ++j) {
          sums[r][t + j] = all[(j / kColumns * R + r) * kColumns + j % kColumns];
        }
      }
    }
  }
}

// Which rows of weights make up a block: kStreams runs through memory, each going on where the
// block before stopped. What is left when all runs are equally long are blocks of neighbours.
template <int kRows, int kStreams>
class Blocks {
 public:
  Blocks(int64_t begin, int64_t end)
      : begin_(begin), end_(end), run_((end - begin) / kRows * kDepth) {}
  // The rows of the block whose first is `n` (begin, then what next gave); past the end the last
  // row again, computed and not kept. Returns how many are kept.
  int rows(int64_t n, int64_t* row) const {
    const bool in_runs = n < begin_ + run_;
    LLMOPS_UNROLL for (int t = 0; t < kRows; ++t) {
      row[t] = n + (in_runs ? t % kStreams * run_ + t / kStreams : t);
      if (row[t] >= end_) row[t] = end_ - 1;
    }
    return in_runs || end_ - n > kRows ? kRows : static_cast<int>(end_ - n);
  }
  int64_t next(int64_t n) const {
    if (n >= begin_ + run_) return n + kRows;
    return n + kDepth < begin_ + run_ ? n + kDepth : begin_ + kStreams * run_;
  }

 private:
  static constexpr int kDepth = kRows / kStreams;
  int64_t begin_, end_, run_;
};

template <class T, int R>
LLMOPS_INLINE void run(const LinearParams& p, const float* packed, int64_t first, int64_t last,
                       int64_t begin, int64_t end) {
  const int64_t stride = packed_stride<T>(p.k);
  const T* weights = static_cast<const T*>(p.w);
  const T* bias = static_cast<const T*>(p.bias);
  constexpr int kRows = Block<R>::kRows;
  const Blocks<kRows, Block<R>::kStreams> blocks(begin, end);
  for (int64_t n = begin; n < end; n = blocks.next(n)) {
    int64_t row[kRows];
    const int count = blocks.rows(n, row);
    const T* w[kRows];
    LLMOPS_UNROLL for (int t = 0; t < kRows; ++t) w[t] = weights + row[t] * p.w_stride;
    for (int64_t r = first; r < last; r += R) {
      float sums[R][kRows];
      dot_block<T, R>(w, p.k, packed + r * stride, sums);
      for (int i = 0; i < R && r + i < last; ++i) {
        T* y = static_cast<T*>(p.y) + (r + i) * p.y_stride;
        for (int t = 0; t < count; ++t)
          from_float(bias ? sums[i][t] + to_float(bias[row[t]]) : sums[i][t], y + row[t]);
      }
    }
  }
}

}  // namespace

int64_t linear_scratch(DType type, int64_t rows, int64_t k) {
#ifdef LLMOPS_HAS_TILES
  if (takes_tiles(type, rows)) return tile_panels(rows) * tile_steps(k) * kTileFloats;
  if (takes_split(type, rows))
    return type == DType::f16 ? split_floats<Fp16Parts>(rows, k) : split_floats<Fp32Parts>(rows, k);
#endif
  int64_t floats = 0;
  LLMOPS_DISPATCH(type, T, {
    floats = by_lanes<T>(rows) ? lanes_of(rows) * k : padded_rows(rows) * packed_stride<T>(k);
  });
  return floats;
}

void linear_pack(DType type, int64_t rows, int64_t k, const void* x, int64_t x_stride,
                 float* packed) {
#ifdef LLMOPS_HAS_TILES
  if (takes_tiles(type, rows))
    return pack_tiles(static_cast<const bf16*>(x), x_stride, rows, k, packed);
  if (takes_split(type, rows)) {
    return (type == DType::f16 ? pack_split<Fp16Parts> : pack_split<Fp32Parts>)(x, x_stride, rows,
                                                                                k, packed);
  }
#endif
  LLMOPS_DISPATCH(type, T, {
    if (by_lanes<T>(rows)) return pack_lanes(static_cast<const T*>(x), x_stride, rows, k, packed);
    const int64_t stride = packed_stride<T>(k);
    const int64_t all = padded_rows(rows);
    for (int64_t r = 0; r < rows; ++r)
      pack_row(static_cast<const T*>(x) + r * x_stride, rows, k, packed + r * stride);
    for (int64_t i = rows * stride; i < all * stride; i += W) store(packed + i, zero());
  });
}

void linear_fwd(const LinearParams& p, const float* packed, int64_t begin, int64_t end) {
#ifdef LLMOPS_HAS_TILES
  if (takes_tiles(p.type, p.rows)) return linear_by_tiles(p, packed, begin, end);
  if (takes_split(p.type, p.rows)) {
    return (p.type == DType::f16 ? linear_by_parts<Fp16Parts>
                                 : linear_by_parts<Fp32Parts>)(p, packed, begin, end);
  }
#endif
  LLMOPS_DISPATCH(p.type, T, {
    if (by_lanes<T>(p.rows)) return linear_by_lanes<T>(p, packed, begin, end);
    if (kTile == 1 || p.rows == 1) {
      for (int64_t r = 0; r < p.rows; ++r) run<T, 1>(p, packed, r, r + 1, begin, end);
    } else if (p.rows == 2) {
      run<T, W == 1 ? 1 : 2>(p, packed, 0, 2, begin, end);
    } else {
      const int64_t fit = kPanelFloats / (packed_stride<T>(p.k) + 1) / kTile * kTile;
      const int64_t bytes = (end - begin) * p.k * static_cast<int64_t>(sizeof(T));
      // Two tiles of x and a block of weights are more than an L1: where the weights stay in a
      // larger cache anyway, they are read once per tile.
      const bool again = p.rows <= 2 * kTile && bytes <= kAgainBytes;
      const int64_t panel = fit > kTile && !again ? fit : kTile;
      for (int64_t r = 0; r < p.rows; r += panel)
        run<T, kTile>(p, packed, r, r + panel < p.rows ? r + panel : p.rows, begin, end);
    }
  });
}

}  // namespace llmops::cpu::LLMOPS_ISA
