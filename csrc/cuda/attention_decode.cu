// Attention of few queries, and the merge of its parts. Formula: csrc/cpu/attention.h
//
// A block has 16 query rows (the heads of a group and their tokens) and a part of the keys, which
// it walks over as attention.cu does; but its warps share the rows and each takes 16 keys of every
// tile, for the time is that of reading K and V once. Their sums are merged through shared memory
// at the end. Where the keys are split among blocks, each writes its part in fp32 with its
// log-sum-exp, and a second launch merges: out = sum_s exp(lse_s - lse) out_s. How they are split
// depends on the shape alone. Dao et al., "Flash-Decoding", 2023.
#include "attention_tile.h"

namespace llmops::cuda {
namespace {

constexpr int kRows = 16;

template <int kDim>
struct Shape {
  static constexpr int kWarps = kDim <= 128 ? 4 : 2, kThreads = 32 * kWarps;
  static constexpr int kKeys = 16 * kWarps;
  static constexpr int kBytes = 2 * kDim * (kRows + 4 * kKeys);
  static_assert(kBytes <= 99 << 10, "what a block may have on every GPU from sm_80 on");
  // The warps' sums take the place of the tiles.
  static_assert(kWarps * kRows * (kDim + 2) * 4 <= 2 * kDim * 4 * kKeys, "");
};

template <class T, int kDim, bool kModified>
__global__ void __launch_bounds__(Shape<kDim>::kThreads, 1) attention_decode_kernel(Attention p) {
  using S = Shape<kDim>;
  constexpr int kKeys = S::kKeys, kThreads = S::kThreads, kWarps = S::kWarps;
  using QTile = SharedTile<T, kRows, kDim>;
  LLMOPS_DYNAMIC_SHARED(T, memory);
  const QTile q{memory};
  const KeyStages<T, kKeys, kDim> staged{memory + QTile::kElements};
  const int warp = threadIdx.x / 32, lane = lane_of_warp();
  const auto splits = static_cast<unsigned>(p.splits);
  const int split = static_cast<int>(blockIdx.x % splits);
  QueryBlock b = query_block<kRows>(p, blockIdx.x / splits);
  b.begin = static_cast<int>(b.begin + split * p.split_keys);
  b.end = min(b.end, static_cast<int>(b.begin + p.split_keys));
  LaneRows<1, kModified> rows;
  rows.set(p, b, 0);
  Attend<T, kDim, 1, 16, kModified> sums;
  sums.clear(p, b, 0, warp == 0 && split == 0);
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
    sums.step(p, rows, q, 0, k, v, 16 * warp, key + 16 * warp);
    stage = 1 - stage;
  }

  __syncthreads();                                              // the tiles are done with
  float* const values = reinterpret_cast<float*>(staged.data);  // [warps, rows, dim]
  float* const tops = values + kWarps * kRows * kDim;           // [warps, rows]
  float* const totals = tops + kWarps * kRows;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int at = warp * kRows + lane / 4 + 8 * h;
    const float total = quad_sum(sums.total[0][h]);
    if (lane % 4 == 0) {
      tops[at] = sums.top_logit(p, 0, h);
      totals[at] = total;
    }
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      float* to = values + at * kDim + 8 * n + lane % 4 * 2;
      to[0] = sums.out[0][n][2 * h], to[1] = sums.out[0][n][2 * h + 1];
    }
  }
  __syncthreads();
  const int64_t all = p.batch * p.heads * p.queries;
  const float keep = kModified && p.dropout.active ? p.dropout.scale : 1.0f;
  const int dim_v = static_cast<int>(p.dim_v);
  for (int i = threadIdx.x; i < kRows * kDim; i += kThreads) {
    const int row = i / kDim, column = i % kDim;
    if (b.first + row >= b.last) break;
    float top = tops[row], total = 0.0f, value = 0.0f;
#pragma unroll
    for (int w = 1; w < kWarps; ++w) top = fmaxf(top, tops[w * kRows + row]);
    const float shift = top == -INFINITY ? 0.0f : top;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float weight = exp2_approx((tops[w * kRows + row] - shift) * kLog2e);
      total = fmaf(weight, totals[w * kRows + row], total);
      value = fmaf(weight, values[(w * kRows + row) * kDim + column], value);
    }
    value = total == 0.0f ? 0.0f : value / total * keep;
    const RowPlace at = row_place(p, b, b.first + row);
    const int64_t place = lse_place(p, b.batch, at);
    if (column == 0) {
      float* lse = p.splits > 1 ? p.partial_lse + split * all : p.lse;
      store(lse + place, total == 0.0f ? -INFINITY : shift + logf(total));
    }
    if (column >= dim_v) continue;
    if (p.splits > 1) {
      store(p.partial_out + (split * all + place) * dim_v + column, value);
    } else {
      T* out = static_cast<T*>(p.out) + b.batch * p.out_stride[0] + at.head * p.out_stride[1] +
               at.token * p.out_stride[2];
      store(out + column, from_float<T>(value));
    }
  }
}

constexpr int kCombineThreads = 128;

// A block per row of [B, Hq, Tq].
__global__ void __launch_bounds__(kCombineThreads, 1) attention_combine_kernel(Attention p) {
  const int64_t all = p.batch * p.heads * p.queries;
  const int splits = static_cast<int>(p.splits), dim_v = static_cast<int>(p.dim_v);
  for (int64_t place = blockIdx.x; place < all; place += gridDim.x) {
    float top = -INFINITY, total = 0.0f;
    for (int s = 0; s < splits; ++s) top = fmaxf(top, load(p.partial_lse + s * all + place));
    const float shift = top == -INFINITY ? 0.0f : top;
    for (int s = 0; s < splits; ++s)
      total += exp2_approx((load(p.partial_lse + s * all + place) - shift) * kLog2e);
    const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
    if (threadIdx.x == 0) store(p.lse + place, total == 0.0f ? -INFINITY : shift + logf(total));
    const int64_t plane = divided(place, p.of_queries), token = place - plane * p.queries;
    const int64_t batch = divided(plane, p.of_heads), head = plane - batch * p.heads;
    Rows out;
    out.data = p.out, out.type = p.type;
    const int64_t to = batch * p.out_stride[0] + head * p.out_stride[1] + token * p.out_stride[2];
    for (int column = threadIdx.x; column < dim_v; column += kCombineThreads) {
      float value = 0.0f;
      for (int s = 0; s < splits; ++s) {
        const int64_t at = s * all + place;
        const float weight = exp2_approx((load(p.partial_lse + at) - shift) * kLog2e);
        value = fmaf(weight, load(p.partial_out + at * dim_v + column), value);
      }
      set_element(out, to + column, value * inverse);
    }
  }
}

template <class T, int kDim, bool kModified>
int launch(const Attention& p, cudaStream_t stream) {
  using S = Shape<kDim>;
  const auto kernel = attention_decode_kernel<T, kDim, kModified>;
  if (const int error = allow_shared(kernel, S::kBytes)) return error;
  const int64_t grid = p.batch * p.kv_heads * p.blocks * p.splits;
  if (grid > kMostBlocks) return static_cast<int>(cudaErrorInvalidValue);
  LLMOPS_LAUNCH(kernel, static_cast<unsigned>(grid), S::kThreads, S::kBytes, stream, p);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace

int attention_decode(const Attention& p, void* stream) {
  int error = 0;
  with_attention_tile<false>(p, [&](auto type, auto dim, auto modified) {
    error = launch<decltype(type), decltype(dim)::value, decltype(modified)::value != 0>(
        p, static_cast<cudaStream_t>(stream));
  });
  return error;
}

int attention_combine(const Attention& p, void* stream) {
  LLMOPS_LAUNCH(attention_combine_kernel, grid_of(p.batch * p.heads * p.queries), kCombineThreads,
                0, static_cast<cudaStream_t>(stream), p);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace llmops::cuda
