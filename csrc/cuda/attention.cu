// Attention forward. Formula: csrc/cpu/attention.h
//
// A block of four warps holds 64 or 128 query rows in shared memory and walks over the keys they
// see: tiles of K and V come by cp.async into two stages, one being filled while the other is used,
// with one barrier per tile. A warp holds 16 or 32 rows: scores by mma of ldmatrix fragments, an
// online softmax in registers, and the weights, rounded, are the fragments of the product with V.
// Tiles that no row sees are not loaded; a warp skips those its own rows do not see, and compares
// positions only in tiles that a limit cuts. Heads of a group share K and V by their addresses;
// short queries of a group are packed into one block. fp32 scores, sums and log-sum-exp.
// 4 Tq Tk D flops per head. Dao et al., "FlashAttention", 2022; Dao, "FlashAttention-2", 2023.
#include "attention.h"

#include "attention_tile.h"

namespace llmops::cuda {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;

// Two tiles of 16 rows to a warp halve what is read of K and V from shared memory; the modified
// form has no registers for that.
template <int kDim, bool kModified>
struct Shape {
  static constexpr int kTiles = kDim <= 128 && !kModified ? 2 : 1;
  static constexpr int kRows = 16 * kTiles * kWarps;
  static constexpr int kKeys = kDim <= 64 ? 64 : 32;
  static constexpr int kBytes = 2 * kDim * (kRows + 4 * kKeys);
  static_assert(kBytes <= 99 << 10, "what a block may have on every GPU from sm_80 on");
};

template <class T, int kDim, bool kModified>
__global__ void __launch_bounds__(kThreads, 1) attention_fwd_kernel(Attention p) {
  using S = Shape<kDim, kModified>;
  constexpr int kKeys = S::kKeys, kTiles = S::kTiles;
  using QTile = SharedTile<T, S::kRows, kDim>;
  LLMOPS_DYNAMIC_SHARED(T, memory);
  const QTile q{memory};
  const KeyStages<T, kKeys, kDim> staged{memory + QTile::kElements};
  const QueryBlock b = query_block<S::kRows>(p, blockIdx.x);
  const int row = threadIdx.x / 32 * 16 * kTiles;  // the warp's first
  LaneRows<kTiles, kModified> rows;
  rows.set(p, b, row);
  Attend<T, kDim, kTiles, kKeys, kModified> sums;
  sums.clear(p, b, row, true);
  if (b.begin < b.end) {
    load_queries<kThreads>(q, p, b);
    staged.template fetch<kThreads>(p, b, 0, b.begin);
  }
  int stage = 0;
#pragma unroll 1
  for (int key = b.begin; key < b.end; key += kKeys) {
    cp_async_wait<0>();
    __syncthreads();  // this tile is there for all, and nobody uses the other stage any more
    if (key + kKeys < b.end) staged.template fetch<kThreads>(p, b, 1 - stage, key + kKeys);
    const auto k = staged.k(stage), v = staged.v(stage);
    sums.step(p, rows, q, row, k, v, 0, key);
    stage = 1 - stage;
  }

  // Rounded into this warp's rows of q, which only it reads, and from there in whole chunks.
  const int lane = lane_of_warp();
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float lse, weight;
      sums.finish(p, t, h, lse, weight);
      const int own = row + 16 * t + 8 * h + lane / 4;
      if (lane % 4 == 0 && b.first + own < b.last)
        store(p.lse + lse_place(p, b.batch, row_place(p, b, b.first + own)), lse);
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        *reinterpret_cast<uint32_t*>(q.at(own, n) + lane % 4 * 2) =
            pack(sums.out[t][n][2 * h] * weight, sums.out[t][n][2 * h + 1] * weight, T{});
      }
    }
  }
  __syncwarp();
  T* out = static_cast<T*>(p.out) + b.batch * p.out_stride[0];
  for (int i = lane; i < 16 * kTiles * QTile::kChunks; i += 32) {
    const int own = row + i / QTile::kChunks, column = i % QTile::kChunks * 8;
    if (b.first + own >= b.last || column >= p.dim_v) continue;
    const RowPlace at = row_place(p, b, b.first + own);
    T* to = out + at.head * p.out_stride[1] + at.token * p.out_stride[2] + column;
    const T* from = q.at(own, column / 8);
    if (p.wide_out) {
      store(reinterpret_cast<uint4*>(to), *reinterpret_cast<const uint4*>(from));
    } else {
      for (int j = 0; j < 8 && column + j < p.dim_v; ++j) store(to + j, from[j]);
    }
  }
}

template <class T, int kDim, bool kModified>
int launch(const Attention& p, cudaStream_t stream) {
  using S = Shape<kDim, kModified>;
  const auto kernel = attention_fwd_kernel<T, kDim, kModified>;
  if (const int error = allow_shared(kernel, S::kBytes)) return error;
  const int64_t grid = p.batch * p.kv_heads * p.blocks;
  if (grid > kMostBlocks) return static_cast<int>(cudaErrorInvalidValue);
  LLMOPS_LAUNCH(kernel, static_cast<unsigned>(grid), kThreads, S::kBytes, stream, p);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace

void plan_attention(Attention& p) {
  p.of_queries = Divisor(p.queries > 0 ? p.queries : 1);
  p.of_heads = Divisor(p.heads > 0 ? p.heads : 1);
  p.splits = 1;
  if (p.batch * p.heads * p.queries == 0) return;
  const int64_t heads = p.heads / p.kv_heads, rows = heads * p.queries;
  const int64_t dim = p.dim > p.dim_v ? p.dim : p.dim_v;
  const int64_t held = dim <= 128 && !attention_modified(p) ? 128 : 64;
  const auto up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  // Too few blocks of whole rows to fill a GPU, and keys to split instead.
  const int64_t wanted = 264;
  p.decode = rows <= 16 || (rows <= 64 && p.batch * p.kv_heads < wanted / 4 && p.keys >= 1024);
  p.packed = p.decode || (heads > 1 && p.queries < held);
  p.blocks = p.packed ? up(rows, p.decode ? 16 : held) : heads * up(p.queries, held);
  p.split_keys = p.keys;
  if (!p.decode) return;
  const int64_t reach = p.queries + p.left;
  const int64_t seen = p.left < 0 || reach > p.keys ? p.keys : reach;
  const int64_t least = 256;  // keys of a part, at least
  p.splits = up(wanted, p.batch * p.kv_heads * p.blocks);
  if (p.splits > seen / least) p.splits = seen / least;
  if (p.splits <= 1) {
    p.splits = 1;
    return;
  }
  p.split_keys = up(up(seen, p.splits), 64) * 64;
  p.splits = up(seen, p.split_keys);
}

int attention_fwd(const Attention& p, void* stream) {
  if (p.batch * p.heads * p.queries == 0) return 0;
  if (p.decode) {
    const int error = attention_decode(p, stream);
    return error || p.splits == 1 ? error : attention_combine(p, stream);
  }
  int error = 0;
  with_attention_tile<true>(p, [&](auto type, auto dim, auto modified) {
    error = launch<decltype(type), decltype(dim)::value, decltype(modified)::value != 0>(
        p, static_cast<cudaStream_t>(stream));
  });
  return error;
}

}  // namespace llmops::cuda
