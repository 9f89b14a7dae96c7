// dQ of attention. A block holds 64 queries and walks over the keys they see.
// Formula: csrc/cpu/attention.h; see attention_bwd.cu.
#include "attention_bwd_tile.h"

namespace llmops::cuda {
namespace {

template <int kDim>
struct QueryShape : BackwardShape<kDim> {
  using Base = BackwardShape<kDim>;
  static constexpr int kThreads = 32 * Base::kHeld / 16;
  template <bool kModified>
  static constexpr int kWidth = kModified || kDim > 128 ? 16 : 32;
  static constexpr int kBytes = 4 * kDim * (Base::kHeld + Base::kStages * Base::kPassing);
};

template <class T, int kDim, bool kModified>
__global__ void __launch_bounds__(QueryShape<kDim>::kThreads, 1)
    attention_bwd_dq_kernel(AttentionBackward b) {
  using S = QueryShape<kDim>;
  constexpr int kPassing = S::kPassing, kWidth = S::template kWidth<kModified>;
  using Held = SharedTile<T, S::kHeld, kDim>;
  using Passing = SharedTile<T, kPassing, kDim>;
  LLMOPS_DYNAMIC_SHARED(T, memory);
  const Attention& p = b.of;
  const Held q{memory}, grad{memory + Held::kElements};
  T* const staged = grad.data + Held::kElements;

  const auto blocks = static_cast<unsigned>((p.queries + S::kHeld - 1) / S::kHeld);
  const auto heads = static_cast<unsigned>(p.heads);
  // The last block of a head first: under a causal limit it has the most keys.
  const int first = static_cast<int>(blocks - 1 - blockIdx.x % blocks) * S::kHeld;
  const int head = static_cast<int>(blockIdx.x / blocks % heads);
  const int batch = static_cast<int>(blockIdx.x / blocks / heads);
  const int kv_head = head / static_cast<int>(p.heads / p.kv_heads);
  const int row = threadIdx.x / 32 * 16;
  const Limits limits(p);
  const Span span = keys_of(p, first, S::kHeld);

  const T* k_from = static_cast<const T*>(p.k) + batch * p.k_stride[0] + kv_head * p.k_stride[1];
  const T* v_from = static_cast<const T*>(p.v) + batch * p.v_stride[0] + kv_head * p.v_stride[1];
  const auto passing = [&](int stage) { return Passing{staged + stage * 2 * Passing::kElements}; };
  const auto fetch = [&](int stage, int key) {
    const Passing to = passing(stage);
    load_tile<S::kThreads>(to, k_from + key * p.k_stride[2], p.k_stride[2], span.end - key,
                           static_cast<int>(p.dim), b.wide_k, threadIdx.x);
    load_tile<S::kThreads>(Passing{to.data + Passing::kElements}, v_from + key * p.v_stride[2],
                           p.v_stride[2], span.end - key, static_cast<int>(p.dim_v), b.wide_v,
                           threadIdx.x);
    cp_async_commit();
  };

  const int query = first + row + lane_of_warp() / 4;  // the lane's, and 8 more
  const int64_t at = (batch * p.heads + head) * p.queries + query;
  RowStats stats[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const bool there = query + 8 * h < p.queries;
    stats[h].lse = there ? load(b.row_lse + at + 8 * h) : INFINITY;
    stats[h].delta = there ? load(b.row_delta + at + 8 * h) : 0.0f;
    stats[h].norm = kModified && there ? load(b.row_norm + at + 8 * h) : 1.0f;
  }
  float dq[kDim / 8][4] = {};
  if (span.begin < span.end) {
    const T* from = static_cast<const T*>(p.q) + batch * p.q_stride[0] + head * p.q_stride[1];
    load_tile<S::kThreads>(q, from + first * p.q_stride[2], p.q_stride[2], p.queries - first,
                           static_cast<int>(p.dim), p.wide_q, threadIdx.x);
    from = static_cast<const T*>(b.grad_out) + batch * b.grad_out_stride[0] +
           head * b.grad_out_stride[1];
    load_tile<S::kThreads>(grad, from + first * b.grad_out_stride[2], b.grad_out_stride[2],
                           p.queries - first, static_cast<int>(p.dim_v), b.wide_grad, threadIdx.x);
    fetch(0, span.begin);
  }
  const ScoreHead of(p, batch, head);
  int stage = 0;
#pragma unroll 1
  for (int key = span.begin; key < span.end; key += kPassing) {
    cp_async_wait<0>();
    __syncthreads();  // this tile is there for all, and nobody uses the other stage any more
    if (S::kStages > 1 && key + kPassing < span.end) fetch(1 - stage, key + kPassing);
    const Passing k = passing(stage), v{k.data + Passing::kElements};
#pragma unroll 1
    for (int n = 0; n < kPassing && key + n < span.end; n += kWidth) {
      if (first + row >= p.queries || !limits.any(first + row, 16, key + n, kWidth)) continue;
      float s[kWidth / 8][4] = {}, dp[kWidth / 8][4] = {};
      multiply_rows(s, q, row, k, n);
      multiply_rows(dp, grad, row, v, n);
      const bool whole = key + n + kWidth <= p.keys && limits.all(first + row, 16, key + n, kWidth);
      to_gradients<kModified, true, false>(
          p, limits, of, first + row, key + n, whole, [&](int h, int) { return stats[h]; }, s, dp);
      add_products(dq, dp, k, n, 0);
    }
    if (S::kStages > 1) {
      stage = 1 - stage;
    } else {
      __syncthreads();  // nobody uses the tile any more
      if (key + kPassing < span.end) fetch(0, key + kPassing);
    }
  }

  // A row without a key has no gradient, whatever its q holds.
#pragma unroll
  for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (stats[i / 2].lse == INFINITY) dq[n][i] = 0.0f;
  }
  T* const to = static_cast<T*>(b.dq) + batch * b.dq_stride[0] + head * b.dq_stride[1] +
                query * b.dq_stride[2];
  store_rows(query < p.queries ? to : nullptr,
             query + 8 < p.queries ? to + 8 * b.dq_stride[2] : nullptr, dq, p.scale, 0,
             static_cast<int>(p.dim));
}

}  // namespace

int attention_bwd_dq(const AttentionBackward& b, void* stream) {
  int error = 0;
  with_backward_form(b.of, [&](auto type, auto dim, auto modified) {
    constexpr int kDim = decltype(dim)::value;
    error = launch_tiles<QueryShape<kDim>>(
        attention_bwd_dq_kernel<decltype(type), kDim, decltype(modified)::value != 0>, b.of.queries,
        b.of.batch * b.of.heads, b, stream);
  });
  return error;
}

}  // namespace llmops::cuda
