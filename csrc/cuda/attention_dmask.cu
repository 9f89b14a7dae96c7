// Gradient of an additive mask: dmask = dS summed over the dimensions the mask broadcasts along.
// A launch of its own, since no model without a learned mask needs it. Formula:
// csrc/cpu/attention.h
//
// A block has 64 queries by 32 keys of the mask (or the whole of a broadcast dimension), computes S
// and dP again for every batch, head and tile that falls on them, 64 columns of D at a time, and
// sums dS in registers in that order, at last over rows or columns by way of shared memory. Each
// element is written once: the same bits in every run. 4 Tq Tk D flops per head.
#include "attention_bwd_tile.h"

namespace llmops::cuda {
namespace {

constexpr int kThreads = 128, kQueries = 64, kKeys = 32, kColumns = 64;

struct Walk {
  int begin, end;
};
// What of `count` falls on tile `index`, of `step`, of a dimension of the mask.
__device__ __forceinline__ Walk walk_of(int64_t mask_size, int index, int step, int64_t count) {
  const int all = static_cast<int>(count);
  if (mask_size == 1) return {0, all};
  return {index * step, min((index + 1) * step, all)};
}
__device__ __forceinline__ unsigned tiles_of(int64_t mask_size, int step) {
  return static_cast<unsigned>((mask_size + step - 1) / step);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1) attention_dmask_kernel(AttentionBackward b) {
  using QTile = SharedTile<T, kQueries, kColumns>;
  using KTile = SharedTile<T, kKeys, kColumns>;
  const Attention& p = b.of;
  LLMOPS_SHARED(T, q_memory, QTile::kElements);
  LLMOPS_SHARED(T, grad_memory, QTile::kElements);
  LLMOPS_SHARED(T, k_memory, KTile::kElements);
  LLMOPS_SHARED(T, v_memory, KTile::kElements);
  LLMOPS_SHARED(float, totals, kQueries* kKeys);
  const QTile q{q_memory}, grad{grad_memory};
  const KTile k{k_memory}, v{v_memory};

  unsigned rest = blockIdx.x;
  const auto digit = [&](unsigned of) {
    const unsigned own = rest % of;
    rest /= of;
    return static_cast<int>(own);
  };
  const int64_t* const size = b.dmask_size;
  const int key_tile = digit(tiles_of(size[3], kKeys));
  const int query_tile = digit(tiles_of(size[2], kQueries));
  const int mask_head = digit(static_cast<unsigned>(size[1]));
  const int mask_batch = static_cast<int>(rest);
  const Walk batches = walk_of(size[0], mask_batch, 1, p.batch);
  const Walk heads = walk_of(size[1], mask_head, 1, p.heads);
  const Walk queries = walk_of(size[2], query_tile, kQueries, p.queries);
  const Walk keys = walk_of(size[3], key_tile, kKeys, p.keys);
  const int row = threadIdx.x / 32 * 16;
  const int columns = static_cast<int>(p.dim > p.dim_v ? p.dim : p.dim_v);
  const Limits limits(p);

  // Adds S and dP of a tile, whose rows of q and of k are given.
  const auto products = [&](int batch, int head, int64_t row_at, int query, int key,
                            float (&s)[kKeys / 8][4], float (&dp)[kKeys / 8][4]) {
    const int kv_head = head / static_cast<int>(p.heads / p.kv_heads);
    // A row without a key has no gradient, whatever its q and dout hold.
    const auto there = [&](int r) {
      return query + r < queries.end && load(b.row_lse + row_at + r) != INFINITY;
    };
    const auto place = [&](const void* data, const int64_t (&stride)[3], int h, int t) {
      return static_cast<const T*>(data) + batch * stride[0] + h * stride[1] + t * stride[2];
    };
#pragma unroll 1
    for (int column = 0; column < columns; column += kColumns) {
      const int of_qk = static_cast<int>(p.dim) - column;
      const int of_v = static_cast<int>(p.dim_v) - column;
      __syncthreads();  // nobody uses the tiles any more
      load_tile_where<kThreads>(q, place(p.q, p.q_stride, head, query) + column, p.q_stride[2],
                                there, of_qk, p.wide_q, threadIdx.x);
      load_tile_where<kThreads>(grad, place(b.grad_out, b.grad_out_stride, head, query) + column,
                                b.grad_out_stride[2], there, of_v, b.wide_grad, threadIdx.x);
      load_tile<kThreads>(k, place(p.k, p.k_stride, kv_head, key) + column, p.k_stride[2],
                          keys.end - key, of_qk, b.wide_k, threadIdx.x);
      load_tile<kThreads>(v, place(p.v, p.v_stride, kv_head, key) + column, p.v_stride[2],
                          keys.end - key, of_v, b.wide_v, threadIdx.x);
      cp_async_commit();
      cp_async_wait<0>();
      __syncthreads();
      multiply_rows(s, q, row, k, 0);
      multiply_rows(dp, grad, row, v, 0);
    }
  };

  float sums[kKeys / 8][4] = {};
#pragma unroll 1
  for (int batch = batches.begin; batch < batches.end; ++batch) {
#pragma unroll 1
    for (int head = heads.begin; head < heads.end; ++head) {
      const ScoreHead of(p, batch, head);
#pragma unroll 1
      for (int query = queries.begin; query < queries.end; query += kQueries) {
        const int64_t row_at = (batch * p.heads + head) * p.queries + query;
        const int own = row + lane_of_warp() / 4;
        RowStats stats[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const bool there = query + own + 8 * h < queries.end;
          stats[h].lse = there ? load(b.row_lse + row_at + own + 8 * h) : INFINITY;
          stats[h].delta = there ? load(b.row_delta + row_at + own + 8 * h) : 0.0f;
          stats[h].norm = there ? load(b.row_norm + row_at + own + 8 * h) : 0.0f;
        }
#pragma unroll 1
        for (int key = keys.begin; key < keys.end; key += kKeys) {
          if (!limits.any(query, kQueries, key, kKeys)) continue;
          float s[kKeys / 8][4] = {}, dp[kKeys / 8][4] = {};
          products(batch, head, row_at, query, key, s, dp);
          to_gradients<true, true, true>(
              p, limits, of, query + row, key, limits.all(query, kQueries, key, kKeys),
              [&](int h, int) { return stats[h]; }, s, dp);
#pragma unroll
          for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[n][i] += dp[n][i];
          }
        }
      }
    }
  }

#pragma unroll
  for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      totals[(row + lane_of_warp() / 4 + i / 2 * 8) * kKeys + n * 8 + lane_of_warp() % 4 * 2 +
             i % 2] = sums[n][i];
  }
  __syncthreads();
  const int rows_of_sum = size[2] == 1 ? kQueries : 1, keys_of_sum = size[3] == 1 ? kKeys : 1;
  for (int i = threadIdx.x; i < kQueries * kKeys; i += kThreads) {
    const int r = i / kKeys, c = i % kKeys;
    const int64_t query = query_tile * kQueries + r, key = key_tile * kKeys + c;
    if (query >= size[2] || key >= size[3]) continue;
    float sum = 0.0f;
    for (int y = 0; y < rows_of_sum; ++y)
      for (int x = 0; x < keys_of_sum; ++x) sum += totals[(r + y) * kKeys + c + x];
    store(b.dmask + ((mask_batch * size[1] + mask_head) * size[2] + query) * size[3] + key, sum);
  }
}

}  // namespace

int attention_dmask(const AttentionBackward& b, void* stream) {
  const int64_t* const size = b.dmask_size;
  const int64_t grid =
      size[0] * size[1] * ((size[2] + kQueries - 1) / kQueries) * ((size[3] + kKeys - 1) / kKeys);
  if (grid == 0) return 0;
  if (grid > kMostBlocks) return static_cast<int>(cudaErrorInvalidValue);
  const auto s = static_cast<cudaStream_t>(stream);
  const auto blocks = static_cast<unsigned>(grid);
  if (b.of.type == kBf16) {
    LLMOPS_LAUNCH(attention_dmask_kernel<__nv_bfloat16>, blocks, kThreads, 0, s, b);
  } else {
    LLMOPS_LAUNCH(attention_dmask_kernel<__half>, blocks, kThreads, 0, s, b);
  }
  return static_cast<int>(cudaGetLastError());
}

}  // namespace llmops::cuda
