// What a block of attention has: its query rows and the keys that they see, how both come to shared
// memory, and which instance of a kernel a call takes. What a warp does with them:
// attention_tile.h.
#pragma once

#include "attention.h"
#include "mma.h"
#include "tile.h"

namespace llmops::cuda {

// Rows [first, last) of those of one (batch, kv head), and the keys that any of them sees.
struct QueryBlock {
  int batch, kv_head, first, last;
  int begin, end;
};

__device__ __forceinline__ int clamped(int x, int low, int high) {
  return x < low ? low : (x > high ? high : x);
}
// The query at `token` sees keys [key_start, key_limit).
__device__ __forceinline__ int key_limit(const Attention& p, int token) {
  const int keys = static_cast<int>(p.keys);
  if (p.right < 0) return keys;
  return clamped(token + keys - static_cast<int>(p.queries - p.right) + 1, 0, keys);
}
__device__ __forceinline__ int key_start(const Attention& p, int token) {
  if (p.left < 0) return 0;
  const int keys = static_cast<int>(p.keys);
  return clamped(token + keys - static_cast<int>(p.queries + p.left), 0, keys);
}

// `block`, counted over (batch, kv head) and blocks of kRows rows, the last one of a head first:
// under a causal limit it has the most keys.
template <int kRows>
__device__ __forceinline__ QueryBlock query_block(const Attention& p, unsigned block) {
  const auto blocks = static_cast<unsigned>(p.blocks), kv_heads = static_cast<unsigned>(p.kv_heads);
  const unsigned group = block / blocks;
  const int index = static_cast<int>(blocks - 1 - block % blocks);
  const int queries = static_cast<int>(p.queries);
  QueryBlock b;
  b.batch = static_cast<int>(group / kv_heads);
  b.kv_head = static_cast<int>(group % kv_heads);
  int low, high;  // tokens
  if (p.packed) {
    const int rows = queries * static_cast<int>(p.heads / p.kv_heads);
    b.first = index * kRows;
    b.last = min(b.first + kRows, rows);
    low = b.first % queries, high = (b.last - 1) % queries;
    if (b.last - b.first > high - low + 1) low = 0, high = queries - 1;
  } else {
    const int per_head = (queries + kRows - 1) / kRows, head = index / per_head;
    low = index % per_head * kRows;
    high = min(low + kRows, queries) - 1;
    b.first = head * queries + low;
    b.last = head * queries + high + 1;
  }
  b.begin = key_start(p, low);
  b.end = key_limit(p, high);
  return b;
}

// Head, of all of them, and token of a row.
struct RowPlace {
  int head, token;
};
__device__ __forceinline__ RowPlace row_place(const Attention& p, const QueryBlock& b, int row) {
  const int head = static_cast<int>(divided(row, p.of_queries));
  return {b.kv_head * static_cast<int>(p.heads / p.kv_heads) + head,
          row - head * static_cast<int>(p.queries)};
}
__device__ __forceinline__ int64_t lse_place(const Attention& p, int batch, const RowPlace& at) {
  return (batch * p.heads + at.head) * p.queries + at.token;
}

// The block's rows of q into a tile, zeros beyond the last one, as load_tile does it.
template <int kThreads, class Tile>
__device__ __forceinline__ void load_queries(const Tile& tile, const Attention& p,
                                             const QueryBlock& b) {
  using T = typename Tile::T;
  const T* q = static_cast<const T*>(p.q) + b.batch * p.q_stride[0];
  const int columns = static_cast<int>(p.dim);
  constexpr int kPieces = Tile::kChunks;
  for (int i = threadIdx.x; i < Tile::kRows * kPieces; i += kThreads) {
    const int row = i / kPieces, chunk = i % kPieces;
    const bool there = b.first + row < b.last;
    const RowPlace at = row_place(p, b, there ? b.first + row : b.first);
    const T* from = q + at.head * p.q_stride[1] + at.token * p.q_stride[2] + chunk * 8;
    if (p.wide_q) {
      cp_async_16(tile.at(row, chunk), from, there && chunk * 8 < columns);
    } else {
#pragma unroll 1
      for (int j = 0; j < 8; ++j)
        tile.at(row, chunk)[j] =
            there && chunk * 8 + j < columns ? load(from + j) : from_bits<T>(0);
    }
  }
}

// K and V of a block, kKeys of each at a time, in two stages of shared memory: one is filled while
// the other is used.
template <class T, int kKeys, int kDim>
struct KeyStages {
  using Tile = SharedTile<T, kKeys, kDim>;

  T* data;

  __device__ __forceinline__ Tile k(int stage) const {
    return {data + stage * 2 * Tile::kElements};
  }
  __device__ __forceinline__ Tile v(int stage) const { return {k(stage).data + Tile::kElements}; }
  // The keys from `key` on, and their values; zeros from the block's end on. Waited for as
  // load_tile says, of what is one group of cp.async.
  template <int kThreads>
  __device__ __forceinline__ void fetch(const Attention& p, const QueryBlock& b, int stage,
                                        int key) const {
    const int thread = opaque(threadIdx.x), batch = opaque(b.batch), head = opaque(b.kv_head);
    const T* k_from = static_cast<const T*>(p.k) + batch * p.k_stride[0] + head * p.k_stride[1] +
                      key * p.k_stride[2];
    const T* v_from = static_cast<const T*>(p.v) + batch * p.v_stride[0] + head * p.v_stride[1] +
                      key * p.v_stride[2];
    const Tile k_to = k(stage), v_to = v(stage);
    load_tile<kThreads>(k_to, k_from, p.k_stride[2], b.end - key, static_cast<int>(p.dim),
                        p.wide_kv, thread);
    load_tile<kThreads>(v_to, v_from, p.v_stride[2], b.end - key, static_cast<int>(p.dim_v),
                        p.wide_kv, thread);
    cp_async_commit();
  }
};

// Whether the scores are more than a positive multiple of q . k, or a very large one.
inline bool attention_modified(const Attention& p) {
  return !(p.scale > 0.0f && p.scale <= kLargestPlainScale) || p.softcap != 0.0f || p.slopes ||
         p.sinks || p.mask.data || p.dropout.active;
}

// f(T{}, the head dim's tile, whether modified) as constants; the plain tiles of a kernel that has
// them (k96) are also 96 wide.
template <bool k96, class F>
void with_attention_tile(const Attention& p, const F& f) {
  const int64_t dim = p.dim > p.dim_v ? p.dim : p.dim_v;
  const auto sized = [&](auto type, auto modified) {
    constexpr bool kThere = k96 && !decltype(modified)::value;
    if (dim <= 64) {
      f(type, Constant<64>{}, modified);
    } else if (kThere && dim <= 96) {
      f(type, Constant<kThere ? 96 : 128>{}, modified);
    } else if (dim <= 128) {
      f(type, Constant<128>{}, modified);
    } else {
      f(type, Constant<256>{}, modified);
    }
  };
  const auto typed = [&](auto type) {
    if (attention_modified(p)) {
      sized(type, Constant<true>{});
    } else {
      sized(type, Constant<false>{});
    }
  };
  if (p.type == kBf16) {
    typed(__nv_bfloat16{});
  } else {
    typed(__half{});
  }
}

}  // namespace llmops::cuda
