// Matrix products of a block on the tensor cores: 16-bit tiles in shared memory, filled by
// cp.async, read by ldmatrix into the fragments of mma.m16n8k16, summed in fp32. Users call these
// and nothing of ptx.h; names and arguments stay as they are, what is new gets a name of its own.
//
// A tile is rows of 16-byte chunks of eight elements. Chunk c of row r lies at chunk c ^ swizzle(r)
// of its row, so that the eight rows which one phase of ldmatrix reads, and the eight chunks which
// cp.async writes at a time, lie in different banks.
//
// Fragments of d [16, 8] += a [16, 16] b [16, 8]: lane l holds of d the elements [l / 4 (+ 8)]
// [l % 4 * 2 (+ 1)], d[0..1] of row l / 4, d[2..3] of row l / 4 + 8. The fragment of a [16, 16] is
// the packed pairs of two neighbouring d side by side (`a_of`): what one product wrote is the next
// one's input, with no memory between.
#pragma once

#include "device.h"

namespace llmops::cuda {

// [kRows, kColumns] of a 16-bit type in shared memory; `data` is aligned to 128 bytes where bank
// conflicts matter, to 16 at least.
template <class Element, int kRowCount, int kColumnCount>
struct SharedTile {
  using T = Element;
  static constexpr int kRows = kRowCount, kColumns = kColumnCount;
  static constexpr int kChunks = kColumns / 8;  // of a row
  static constexpr int kElements = kRows * kColumns;
  static constexpr int kBytes = 2 * kElements;
  static_assert(sizeof(T) == 2 && kColumns % 32 == 0 && kRows % 8 == 0, "");

  T* data;

  // Rows of a multiple of 128 bytes begin at the same bank; of 64 more, every other one does.
  __device__ static __forceinline__ int swizzle(int row) {
    static_assert(kChunks % 4 == 0, "");
    return kChunks % 8 == 0 ? row & 7 : row >> 1 & 3;
  }
  // Where chunk `chunk` of row `row` is.
  __device__ __forceinline__ T* at(int row, int chunk) const {
    return data + (row * kChunks + (chunk ^ swizzle(row))) * 8;
  }
  // One element; slow, for what is not worth a fragment.
  __device__ __forceinline__ T& element(int row, int column) const {
    return at(row, column / 8)[column % 8];
  }
};

// The tile from those rows of global memory for which there(row) holds, zeros elsewhere, as
// load_tile.
template <int kThreads, class Tile, class There>
__device__ __forceinline__ void load_tile_where(const Tile& tile, const typename Tile::T* from,
                                                int64_t stride, const There& there, int columns,
                                                bool wide, int thread) {
  using T = typename Tile::T;
  constexpr int kAll = Tile::kRows * Tile::kChunks;
  if (wide) {
#pragma unroll
    for (int first = 0; first < kAll; first += kThreads) {
      const int i = first + thread, row = i / Tile::kChunks, chunk = i % Tile::kChunks;
      if (kAll % kThreads != 0 && i >= kAll) continue;
      cp_async_16(tile.at(row, chunk), from + row * stride + chunk * 8,
                  there(row) && chunk * 8 < columns);
    }
  } else {
#pragma unroll 1
    for (int i = thread; i < Tile::kElements; i += kThreads) {
      const int row = i / Tile::kColumns, column = i % Tile::kColumns;
      T value = from_bits<T>(0);
      if (there(row) && column < columns) value = load(from + row * stride + column);
      tile.element(row, column) = value;
    }
  }
}

// The tile from rows of global memory, `stride` elements apart, by kThreads threads of which this
// is `thread`: `rows` of them and `columns` of each, zeros beyond; nothing beyond is read. With
// `wide`, where columns and stride are multiples of 8 and `from` is aligned to 16 bytes, by
// cp.async: commit, wait and meet at a barrier afterwards. Else by plain accesses, which a barrier
// alone makes seen.
template <int kThreads, class Tile>
__device__ __forceinline__ void load_tile(const Tile& tile, const typename Tile::T* from,
                                          int64_t stride, int64_t rows, int columns, bool wide,
                                          int thread) {
  const auto there = [&](int row) { return row < rows; };
  load_tile_where<kThreads>(tile, from, stride, there, columns, wide, thread);
}

// ---- fragments out of shared memory, by a whole warp. `row` is a multiple of 8 and `column` of
// 16: the first ones of the stored tile that the fragment is of.

__device__ __forceinline__ int lane_of_warp() { return threadIdx.x % 32; }

// a [16, 16] of a tile stored as a is.
template <class Tile>
__device__ __forceinline__ void load_a(uint32_t (&a)[4], const Tile& tile, int row, int column) {
  const int lane = lane_of_warp();
  ldmatrix_x4(a, tile.at(row + lane % 16, column / 8 + lane / 16));
}
// a [16, 16] of a tile that holds a transposed: its rows are the inner dimension.
template <class Tile>
__device__ __forceinline__ void load_a_transposed(uint32_t (&a)[4], const Tile& tile, int row,
                                                  int column) {
  const int lane = lane_of_warp();
  ldmatrix_x4_transposed(a, tile.at(row + lane % 8 + lane / 16 * 8, column / 8 + lane / 8 % 2));
}
// Two b [16, 8] side by side of a tile that holds b transposed: its columns are the inner dimension
// (a key per row, in q k^T). b[0..1] is of rows `row` to `row` + 7, b[2..3] of the next eight.
template <class Tile>
__device__ __forceinline__ void load_b(uint32_t (&b)[4], const Tile& tile, int row, int column) {
  const int lane = lane_of_warp();
  ldmatrix_x4(b, tile.at(row + lane % 8 + lane / 16 * 8, column / 8 + lane / 8 % 2));
}
// Two b [16, 8] side by side of a tile stored as b is: its rows are the inner dimension (a key per
// row, in p v). b[0..1] is of columns `column` to `column` + 7, b[2..3] of the next eight.
template <class Tile>
__device__ __forceinline__ void load_b_transposed(uint32_t (&b)[4], const Tile& tile, int row,
                                                  int column) {
  const int lane = lane_of_warp();
  ldmatrix_x4_transposed(b, tile.at(row + lane % 16, column / 8 + lane / 16));
}

// d, two [16, 8] side by side, += a [16, 16] b [16, 16], b as load_b and load_b_transposed give it.
template <class T>
__device__ __forceinline__ void mma_pair(float (&left)[4], float (&right)[4],
                                         const uint32_t (&a)[4], const uint32_t (&b)[4]) {
  const uint32_t b_left[2] = {b[0], b[1]}, b_right[2] = {b[2], b[3]};
  mma_m16n8k16(left, a, b_left, T{});
  mma_m16n8k16(right, a, b_right, T{});
}

// Two fp32 sums [16, 8] side by side, rounded, as a [16, 16].
template <class T>
__device__ __forceinline__ void a_of(uint32_t (&a)[4], const float (&left)[4],
                                     const float (&right)[4]) {
  a[0] = pack(left[0], left[1], T{});
  a[1] = pack(left[2], left[3], T{});
  a[2] = pack(right[0], right[1], T{});
  a[3] = pack(right[2], right[3], T{});
}

// ---- sums of a [16, 8] fragment: over the four lanes that hold a row; every lane gets the result.

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}

}  // namespace llmops::cuda
