// dK and dV of attention. A block holds 64 keys and their values and walks over the queries that
// see them, head by head of their group, whose sum it takes in registers. With D over 128 two warps
// share 16 keys, and each sums half of the columns. Formula: csrc/cpu/attention.h; see
// attention_bwd.cu.
#include "attention_bwd_tile.h"

namespace llmops::cuda {
namespace {

template <int kDim>
struct KeyShape : BackwardShape<kDim> {
  using Base = BackwardShape<kDim>;
  static constexpr int kParts = kDim > 128 ? 2 : 1;  // warps that share 16 keys
  static constexpr int kThreads = 32 * kParts * Base::kHeld / 16;
  // Columns of a strip: registers hold the sums of dK and dV, and the modifiers want some too.
  template <bool kModified>
  static constexpr int kWidth = kModified || kDim > 128 ? 16 : 32;
  static constexpr int kStats = 3 * Base::kPassing;  // floats of a stage
  static constexpr int kBytes =
      4 * kDim * (Base::kHeld + Base::kStages * Base::kPassing) + 4 * Base::kStages * kStats;
};

template <class T, int kDim, bool kModified>
__global__ void __launch_bounds__(KeyShape<kDim>::kThreads, 1)
    attention_bwd_dkdv_kernel(AttentionBackward b) {
  using S = KeyShape<kDim>;
  constexpr int kPassing = S::kPassing, kColumns = kDim / S::kParts,
                kWidth = S::template kWidth<kModified>;
  using Held = SharedTile<T, S::kHeld, kDim>;
  using Passing = SharedTile<T, kPassing, kDim>;
  LLMOPS_DYNAMIC_SHARED(T, memory);
  const Attention& p = b.of;
  const Held k{memory}, v{memory + Held::kElements};
  T* const staged = v.data + Held::kElements;
  float* const stats = reinterpret_cast<float*>(staged + S::kStages * 2 * Passing::kElements);

  const auto blocks = static_cast<unsigned>((p.keys + S::kHeld - 1) / S::kHeld);
  const auto kv_heads = static_cast<unsigned>(p.kv_heads);
  const int first = static_cast<int>(blockIdx.x % blocks) * S::kHeld;
  const int kv_head = static_cast<int>(blockIdx.x / blocks % kv_heads);
  const int batch = static_cast<int>(blockIdx.x / blocks / kv_heads);
  const int group = static_cast<int>(p.heads / p.kv_heads);
  const int warp = threadIdx.x / 32, row = warp / S::kParts * 16;
  const int column = warp % S::kParts * kColumns;
  const Limits limits(p);
  const Span span = queries_of(p, first, S::kHeld);
  const int tiles = (max(span.end - span.begin, 0) + kPassing - 1) / kPassing;

  const auto passing = [&](int stage) { return Passing{staged + stage * 2 * Passing::kElements}; };
  const auto fetch = [&](int stage, int member, int query) {
    const int head = kv_head * group + member;
    const int64_t at = (batch * p.heads + head) * p.queries + query;
    const T* q = static_cast<const T*>(p.q) + batch * p.q_stride[0] + head * p.q_stride[1] +
                 query * p.q_stride[2];
    const T* grad = static_cast<const T*>(b.grad_out) + batch * b.grad_out_stride[0] +
                    head * b.grad_out_stride[1] + query * b.grad_out_stride[2];
    const int count = span.end - query;
    // A row without a key has no gradient, whatever its q and dout hold (0 * NaN is NaN). Where
    // only a limit decides, the span leaves such rows out.
    const auto there = [&](int r) {
      return r < count && (!kModified || !p.mask.data || load(b.row_lse + at + r) != INFINITY);
    };
    const Passing to = passing(stage);
    load_tile_where<S::kThreads>(to, q, p.q_stride[2], there, static_cast<int>(p.dim), p.wide_q,
                                 threadIdx.x);
    load_tile_where<S::kThreads>(Passing{to.data + Passing::kElements}, grad, b.grad_out_stride[2],
                                 there, static_cast<int>(p.dim_v), b.wide_grad, threadIdx.x);
    for (int i = threadIdx.x; i < kPassing; i += S::kThreads) {
      float* const own = stats + stage * S::kStats + i;
      cp_async_4(own, b.row_lse + at + i, i < count);
      cp_async_4(own + kPassing, b.row_delta + at + i, i < count);
      if (kModified) cp_async_4(own + 2 * kPassing, b.row_norm + at + i, i < count);
    }
    cp_async_commit();
  };

  float dk[kColumns / 8][4] = {}, dv[kColumns / 8][4] = {};
  if (tiles > 0) {
    // Nor is a key read that no query sees.
    const auto seen = [&](int r) {
      return first + r < p.keys && limits.any(0, static_cast<int>(p.queries), first + r, 1);
    };
    const T* from = static_cast<const T*>(p.k) + batch * p.k_stride[0] + kv_head * p.k_stride[1];
    load_tile_where<S::kThreads>(k, from + first * p.k_stride[2], p.k_stride[2], seen,
                                 static_cast<int>(p.dim), b.wide_k, threadIdx.x);
    from = static_cast<const T*>(p.v) + batch * p.v_stride[0] + kv_head * p.v_stride[1];
    load_tile_where<S::kThreads>(v, from + first * p.v_stride[2], p.v_stride[2], seen,
                                 static_cast<int>(p.dim_v), b.wide_v, threadIdx.x);
    fetch(0, 0, span.begin);
  }
  int stage = 0;
#pragma unroll 1
  for (int member = 0; member < group; ++member) {  // the group's sum, in this order
    const ScoreHead of(p, batch, kv_head * group + member);
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
      const int query = span.begin + tile * kPassing;
      const bool last = tile + 1 == tiles;
      const bool more = !last || member + 1 < group;
      const auto fetch_next = [&](int to) {
        if (more) fetch(to, last ? member + 1 : member, last ? span.begin : query + kPassing);
      };
      cp_async_wait<0>();
      __syncthreads();  // this tile is there for all, and nobody uses the other stage any more
      if (S::kStages > 1) fetch_next(1 - stage);
      const Passing q = passing(stage), grad{q.data + Passing::kElements};
      const float* const own = stats + stage * S::kStats;
#pragma unroll 1
      for (int at = 0; at < kPassing && query + at < span.end; at += kWidth) {
        const int key = first + row;
        if (key >= p.keys || !limits.any(query + at, kWidth, key, 16)) continue;
        float s[kWidth / 8][4] = {}, dp[kWidth / 8][4] = {};
        multiply_rows(s, k, row, q, at);
        multiply_rows(dp, v, row, grad, at);
        to_gradients<kModified, false, false>(
            p, limits, of, query + at, key, limits.all(query + at, kWidth, key, 16),
            [&](int, int c) {
              return RowStats{own[at + c], own[kPassing + at + c],
                              kModified ? own[2 * kPassing + at + c] : 1.0f};
            },
            s, dp);
        add_products(dv, s, grad, at, column);
        add_products(dk, dp, q, at, column);
      }
      if (S::kStages > 1) {
        stage = 1 - stage;
      } else {
        __syncthreads();  // nobody uses the tile any more
        fetch_next(0);
      }
    }
  }

  const int key = first + row + lane_of_warp() / 4;
  T* to = static_cast<T*>(b.dk) + batch * b.dk_stride[0] + kv_head * b.dk_stride[1] +
          key * b.dk_stride[2];
  const auto if_there = [&](T* at, int own) { return own < p.keys ? at : nullptr; };
  store_rows(if_there(to, key), if_there(to + 8 * b.dk_stride[2], key + 8), dk, p.scale, column,
             static_cast<int>(p.dim));
  to = static_cast<T*>(b.dv) + batch * b.dv_stride[0] + kv_head * b.dv_stride[1] +
       key * b.dv_stride[2];
  store_rows(if_there(to, key), if_there(to + 8 * b.dv_stride[2], key + 8), dv, 1.0f, column,
             static_cast<int>(p.dim_v));
}

}  // namespace

int attention_bwd_dkdv(const AttentionBackward& b, void* stream) {
  int error = 0;
  with_backward_form(b.of, [&](auto type, auto dim, auto modified) {
    constexpr int kDim = decltype(dim)::value;
    error = launch_tiles<KeyShape<kDim>>(
        attention_bwd_dkdv_kernel<decltype(type), kDim, decltype(modified)::value != 0>, b.of.keys,
        b.of.batch * b.of.kv_heads, b, stream);
  });
  return error;
}

}  // namespace llmops::cuda
