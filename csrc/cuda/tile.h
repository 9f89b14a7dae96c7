// A row in the registers of the threads that share it: how it is read, reduced and written.
//
// kThreads threads (a warp or a whole block) hold kChunks chunks of eight elements each. Where rows
// are wide (Rows::wide) a chunk is eight neighbours, read by one 16-byte access of 16-bit elements
// or two of fp32; else neighbouring threads hold neighbouring elements. All in fp32, whatever the
// type, which is a value and not a template argument: a kernel would be compiled nine times and
// more for all combinations. The two 16-bit types are loaded as bits and differ in a select; the
// branch between them and fp32 is outside the loops, so that all loads of a thread are on their way
// at once.
#pragma once

#include "device.h"
#include "rows.h"

namespace llmops::cuda {

// ---- reductions over the threads of a row; the result is every thread's, and always the same bits

template <class T>
__device__ __forceinline__ T warp_sum(T v) {
  for (int distance = 16; distance > 0; distance /= 2) v += __shfl_xor_sync(kAllLanes, v, distance);
  return v;
}
__device__ __forceinline__ float warp_max(float v) {
  for (int distance = 16; distance > 0; distance /= 2)
    v = fmaxf(v, __shfl_xor_sync(kAllLanes, v, distance));
  return v;
}

// f over what the warps left, in their order; four of them by one access.
template <int kWarps, class F>
__device__ __forceinline__ float joined(const float* parts, const F& f) {
  const float4* fours = reinterpret_cast<const float4*>(parts);
  const float4 first = fours[0];
  float v = f(first.x, first.y);
  if constexpr (kWarps > 2) v = f(f(v, first.z), first.w);
#pragma unroll
  for (int i = 1; i < kWarps / 4; ++i) {
    const float4 x = fours[i];
    v = f(f(f(f(v, x.x), x.y), x.z), x.w);
  }
  return v;
}
template <int kWarps, class F>
__device__ __forceinline__ double joined(const double* parts, const F& f) {
  double v = parts[0];
  for (int w = 1; w < kWarps; ++w) v = f(v, parts[w]);
  return v;
}

// Several sums behind one pair of barriers.
template <int kThreads, int kSums, class T>
__device__ __forceinline__ void row_sums(T (&v)[kSums]) {
#pragma unroll
  for (int k = 0; k < kSums; ++k) v[k] = warp_sum(v[k]);
  if constexpr (kThreads > 32) {
    constexpr int kWarps = kThreads / 32, kEach = kWarps < 4 ? 4 : kWarps;  // 16 bytes each
    LLMOPS_SHARED(T, parts, kSums * kEach);
    if (threadIdx.x % 32 == 0) {
#pragma unroll
      for (int k = 0; k < kSums; ++k) parts[k * kEach + threadIdx.x / 32] = v[k];
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kSums; ++k)
      v[k] = joined<kWarps>(parts + k * kEach, [](T a, T b) { return a + b; });
    __syncthreads();  // the next sums write parts
  }
}
template <int kThreads>
__device__ __forceinline__ float row_sum(float v) {
  float sums[1] = {v};
  row_sums<kThreads>(sums);
  return sums[0];
}
// Every kernel takes a sum between two maxima, whose barriers keep the next one from writing parts.
template <int kThreads>
__device__ __forceinline__ float row_max(float v) {
  v = warp_max(v);
  if constexpr (kThreads > 32) {
    LLMOPS_SHARED(float, parts, kThreads / 32 < 4 ? 4 : kThreads / 32);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = v;
    __syncthreads();
    v = joined<kThreads / 32>(parts, [](float a, float b) { return fmaxf(a, b); });
  }
  return v;
}

// ---- elements of a type known at run time

// The fp32 value of 16 bits, and the other way round, to nearest even.
__device__ __forceinline__ float widened(uint16_t bits, bool bf16) {
  return bf16 ? to_float(from_bits<__nv_bfloat16>(bits)) : to_float(from_bits<__half>(bits));
}
__device__ __forceinline__ uint16_t narrowed(float x, bool bf16) {
  return bf16 ? bits_of(from_float<__nv_bfloat16>(x)) : bits_of(from_float<__half>(x));
}

// Eight neighbours, aligned to 16 bytes.
__device__ __forceinline__ void load_8(const float* p, float* v) {
  const float4 a = load(reinterpret_cast<const float4*>(p));
  const float4 b = load(reinterpret_cast<const float4*>(p) + 1);
  v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w;
  v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
}
__device__ __forceinline__ void store_8(float* p, const float* v) {
  store(reinterpret_cast<float4*>(p), float4{v[0], v[1], v[2], v[3]});
  store(reinterpret_cast<float4*>(p) + 1, float4{v[4], v[5], v[6], v[7]});
}
__device__ __forceinline__ void load_8(const uint16_t* p, bool bf16, float* v) {
  union {
    uint4 all;
    uint16_t each[8];
  } x;
  x.all = load(reinterpret_cast<const uint4*>(p));
#pragma unroll
  for (int j = 0; j < 8; ++j) v[j] = widened(x.each[j], bf16);
}
__device__ __forceinline__ void store_8(uint16_t* p, bool bf16, const float* v) {
  union {
    uint4 all;
    uint16_t each[8];
  } x;
#pragma unroll
  for (int j = 0; j < 8; ++j) x.each[j] = narrowed(v[j], bf16);
  store(reinterpret_cast<uint4*>(p), x.all);
}

// One element, `at` elements from the tensor's first.
__device__ __forceinline__ float element(const Rows& r, int64_t at) {
  if (r.type == kF32) return load(static_cast<const float*>(r.data) + at);
  if (r.type == kBool) return load(static_cast<const uint8_t*>(r.data) + at);
  return widened(load(static_cast<const uint16_t*>(r.data) + at), r.type == kBf16);
}
__device__ __forceinline__ void set_element(const Rows& r, int64_t at, float value) {
  if (r.type == kF32) {
    store(static_cast<float*>(r.data) + at, value);
  } else {
    store(static_cast<uint16_t*>(r.data) + at, narrowed(value, r.type == kBf16));
  }
}

// ---- rows

__device__ __forceinline__ int64_t divided(int64_t x, const Divisor& d) {
  const auto n = static_cast<uint64_t>(x);
  return static_cast<int64_t>((__umul64hi(n, d.factor) + n) >> d.shift);
}

__device__ __forceinline__ int64_t place_of(const Rows& r, int64_t row) {
  if (r.size_c.by == 1) return row * r.stride_a;
  const int64_t ab = divided(row, r.size_c), c = row - ab * r.size_c.by;
  const int64_t a = divided(ab, r.size_b), b = ab - a * r.size_b.by;
  return a * r.stride_a + b * r.stride_b + c * r.stride_c;
}

// As a tensor of that type holds it.
__device__ __forceinline__ float rounded(float x, int type) {
  return type == kF32 ? x : widened(narrowed(x, type == kBf16), type == kBf16);
}

// Part of a row that kThreads threads hold, 16 elements each: 64 bytes or 32 on their way.
template <int kThreads, int kChunkCount = 2>
struct Tile {
  static constexpr int kChunks = kChunkCount;
  static constexpr int kHeld = 8 * kChunks;
  static constexpr int kElements = kThreads * kHeld;

  // The column, from the tile's first, of a thread's element; it grows with i.
  __device__ static __forceinline__ int column(bool wide, int thread, int i) {
    return wide ? (i / 8 * kThreads + thread) * 8 + i % 8 : i * kThreads + thread;
  }

  // How many of n columns, from the tile's first, are in the tile: 64-bit comparisons with n itself
  // would be two instructions an element.
  __device__ static __forceinline__ int within(int64_t n) {
    return n < 0 ? 0 : (n < kElements ? static_cast<int>(n) : kElements);
  }

  // f(i) of the elements in columns below `limit`; where that is all of a thread's, as it is of
  // nearly every thread, nothing is compared for each.
  template <class F>
  __device__ static __forceinline__ void each(bool wide, int thread, int limit, const F& f) {
    if (column(wide, thread, kHeld - 1) < limit) {
#pragma unroll
      for (int i = 0; i < kHeld; ++i) f(i);
    } else {
#pragma unroll
      for (int i = 0; i < kHeld; ++i)
        if (column(wide, thread, i) < limit) f(i);
    }
  }

  // v = the elements of [0, n) from `at` on, `other` outside.
  __device__ static __forceinline__ void read(const Rows& r, int64_t at, int64_t n, bool wide,
                                              int thread, float (&v)[kHeld], float other) {
    const float* from_32 = static_cast<const float*>(r.data) + at;
    const uint16_t* from_16 = static_cast<const uint16_t*>(r.data) + at;
    const int limit = within(n);
    // Of wide rows a chunk that begins inside is read whole: they are a multiple of eight long, and
    // what is read beyond n is still the row's.
    if (wide && r.type == kF32) {
      chunks(thread, limit, [&](int c, int first) { load_8(from_32 + first, v + 8 * c); });
    } else if (wide && r.type == kBf16) {
      chunks(thread, limit, [&](int c, int first) { load_8(from_16 + first, true, v + 8 * c); });
    } else if (wide) {
      chunks(thread, limit, [&](int c, int first) { load_8(from_16 + first, false, v + 8 * c); });
    } else if (r.type == kF32) {
#pragma unroll
      for (int i = 0; i < kHeld; ++i)
        if (column(false, thread, i) < limit) v[i] = load(from_32 + column(false, thread, i));
    } else {
      const bool bf16 = r.type == kBf16;
#pragma unroll
      for (int i = 0; i < kHeld; ++i)
        if (column(false, thread, i) < limit)
          v[i] = widened(load(from_16 + column(false, thread, i)), bf16);
    }
    if (column(wide, thread, kHeld - 1) < limit) return;
#pragma unroll
    for (int i = 0; i < kHeld; ++i)
      if (column(wide, thread, i) >= limit) v[i] = other;
  }

  __device__ static __forceinline__ void write(const Rows& r, int64_t at, int64_t n, bool wide,
                                               int thread, const float (&v)[kHeld]) {
    float* to_32 = static_cast<float*>(r.data) + at;
    uint16_t* to_16 = static_cast<uint16_t*>(r.data) + at;
    const int limit = within(n);
    if (wide && r.type == kF32) {
      chunks(thread, limit, [&](int c, int first) { store_8(to_32 + first, v + 8 * c); });
    } else if (wide && r.type == kBf16) {
      chunks(thread, limit, [&](int c, int first) { store_8(to_16 + first, true, v + 8 * c); });
    } else if (wide) {
      chunks(thread, limit, [&](int c, int first) { store_8(to_16 + first, false, v + 8 * c); });
    } else {
#pragma unroll
      for (int i = 0; i < kHeld; ++i)
        if (column(false, thread, i) < limit) set_element(r, at + column(false, thread, i), v[i]);
    }
  }

 private:
  // f(c, column) of the chunks that begin below `limit`.
  template <class F>
  __device__ static __forceinline__ void chunks(int thread, int limit, const F& f) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
      if (column(true, thread, 8 * c) < limit) f(c, column(true, thread, 8 * c));
  }
};

// Rows of a block of 128 threads where a warp has a row of its own; else the block has one.
template <int kThreads>
constexpr int kRowsOfBlock = kThreads == 32 ? 4 : 1;
template <int kThreads>
constexpr int kBlock = kThreads == 32 ? 128 : kThreads;
// For __launch_bounds__: the blocks of a processor whose threads have kRegisters each. Left alone
// ptxas takes up to twice as many as a kernel needs, and half as many rows are under way.
template <int kThreads, int kRegisters>
constexpr int kBlocks = (64 << 10) / kRegisters / kBlock<kThreads>;

// The longest row that is held in registers.
constexpr int64_t kLongest = 16384;

// f(threads), an integral constant, for the smallest tile that holds a row of n.
template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};
template <class F>
void with_threads(int64_t n, const F& f) {
  if (n <= Tile<32>::kElements) {
    f(Constant<32>{});
  } else if (n <= Tile<64>::kElements) {
    f(Constant<64>{});
  } else if (n <= Tile<128>::kElements) {
    f(Constant<128>{});
  } else if (n <= Tile<256>::kElements) {
    f(Constant<256>{});
  } else if (n <= Tile<512>::kElements) {
    f(Constant<512>{});
  } else {
    f(Constant<1024>{});
  }
}

// Rows cut into tiles: which one a warp or a block takes.
struct Tiles {
  int64_t count = 0;
  Divisor of_row;

  template <int kThreads>
  static Tiles of(int64_t rows, int64_t n) {
    const int64_t of_row = (n + Tile<kThreads>::kElements - 1) / Tile<kThreads>::kElements;
    return {rows * of_row, Divisor(of_row)};
  }
};
// f(row, begin) of each tile of this thread's warp or block.
template <int kThreads, class F>
__device__ __forceinline__ void for_tiles(const Tiles& tiles, const F& f) {
  constexpr int kTiles = kRowsOfBlock<kThreads>;
  for (int64_t tile = static_cast<int64_t>(blockIdx.x) * kTiles + threadIdx.x / kThreads;
       tile < tiles.count; tile += static_cast<int64_t>(gridDim.x) * kTiles) {
    const int64_t row = divided(tile, tiles.of_row);
    f(row, (tile - row * tiles.of_row.by) * Tile<kThreads>::kElements);
  }
}
// f(threads, grid, tiles) of a kernel that calls for_tiles.
template <class F>
void with_tiles(int64_t rows, int64_t n, const F& f) {
  const auto call = [&](auto threads) {
    constexpr int kThreads = decltype(threads)::value, kTiles = kRowsOfBlock<kThreads>;
    const Tiles tiles = Tiles::of<kThreads>(rows, n);
    f(threads, grid_of((tiles.count + kTiles - 1) / kTiles), tiles);
  };
  if (n <= Tile<32>::kElements) {
    call(Constant<32>{});
  } else {
    call(Constant<256>{});
  }
}

}  // namespace llmops::cuda
