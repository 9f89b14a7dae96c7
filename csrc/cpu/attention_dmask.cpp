// Gradient of an additive mask: dmask = dS summed over the dimensions the mask broadcasts along.
// A pass of its own, since no forward or backward of a model without a learned mask needs it.
//
// One task is one tile of the mask, 48 keys by 64 queries (or the whole of a broadcast dimension);
// it recomputes S and dP, in fp32, for every batch, head and block that falls on the tile, in a
// fixed order, and writes each element once. 4 * Tq * Tk * D flops per head.
#include "attention.h"

#include "attention_dropout.h"
#include "attention_grad.h"
#include "attention_score.h"
#include "attention_tile.h"
#include "simd.h"

namespace llmops::cpu::LLMOPS_ISA {
namespace {

struct Scratch {
  float *q, *g, *s, *dp, *k, *v, *bias, *sum;
  void* zeros;
  GradLanes lanes;
};

LLMOPS_INLINE Scratch layout(const AttentionParams& p, Arena& arena) {
  const int64_t dim = round_up(p.dim, W), dim_v = round_up(p.dim_v, W);
  Scratch s{};
  s.q = arena.take<float>(dim * kLanes);
  s.g = arena.take<float>(dim_v * kLanes);
  s.s = arena.take<float>(kGradKeys * kLanes);
  s.dp = arena.take<float>(kGradKeys * kLanes);
  s.sum = arena.take<float>(kGradKeys * kLanes);
  s.k = arena.take<float>(kGradKeys * dim);
  s.v = arena.take<float>(kGradKeys * dim_v);
  s.bias = arena.take<float>(mask_scratch(kGradKeys));
  s.zeros = arena.take<float>(dim > dim_v ? dim : dim_v);
  s.lanes = take_grad_lanes(p, arena);
  return s;
}

struct Range {
  int64_t begin, end;
};
// What of `count` (in steps of `step`) falls on tile `index` of a dimension of the mask.
LLMOPS_INLINE Range tile_range(int64_t mask_size, int64_t index, int64_t step, int64_t count) {
  if (mask_size <= 1) return {0, count};
  return {index * step, min64(count, (index + 1) * step)};
}
LLMOPS_INLINE int64_t tile_count(int64_t mask_size, int64_t step) {
  return mask_size <= 1 ? 1 : (mask_size + step - 1) / step;
}

// S and dP of one block of queries and keys, and their dS added to the tile's sums.
template <class T>
LLMOPS_OUTLINE void add_block(const AttentionGradParams& g, const QueryBlock& block,
                              const Scratch& s, int64_t key, int keys) {
  const AttentionParams& p = g.fwd;
  const int64_t dim = round_up(p.dim, W), dim_v = round_up(p.dim_v, W);
  int visible[kBlockVecs];
  for (int j = 0; j < block.vecs; ++j) visible[j] = clamp_int(block.vec_limit[j] - key, 0, keys);
  widen_rows(row_at(static_cast<const T*>(p.k), p.k_stride, block.batch, block.kv_head, key),
             p.k_stride[2], keys, p.dim, s.k, dim);
  widen_rows(row_at(static_cast<const T*>(p.v), p.v_stride, block.batch, block.kv_head, key),
             p.v_stride[2], keys, p.dim_v, s.v, dim_v);
  scores<false>(cells(s.k, dim * 4, 4), s.q, p.dim, keys, block.vecs, visible, s.s, nullptr);
  modify_scores<kModified>(p, block, key, keys, visible, s.s, s.bias, nullptr, nullptr);
  if (s.lanes.keep) dropout_weights(p, block, key, visible, s.lanes.keep);
  scores<false>(cells(s.v, dim_v * 4, 4), s.g, p.dim_v, keys, block.vecs, visible, s.dp, nullptr);
  for (int j = 0; j < block.vecs; ++j) {
    grad_lanes<true, false>(s.lanes, s.s, s.dp, j, visible[j], keys, set1(kLog2e),
                            [&](int k, int count, Vec, Vec ds0, Vec, Vec ds1) {
                              float* sum = s.sum + k * kLanes + j * W;
                              store(sum, load(sum) + ds0);
                              if (count == 2) store(sum + kLanes, load(sum + kLanes) + ds1);
                            });
  }
}

template <class T>
LLMOPS_OUTLINE void run(const AttentionGradParams& g, int64_t task, void* scratch) {
  AttentionParams p = g.fwd;
  p.plan.packed = false;  // blocks of one head each: a mask may tell heads apart
  Arena arena{static_cast<char*>(scratch)};
  const Scratch s = layout(p, arena);
  __builtin_memset(s.zeros, 0, round_up(max64(p.dim, p.dim_v), W) * 4);
  for (int64_t i = 0; i < kGradKeys * kLanes; i += W) store(s.sum + i, zero());

  const int64_t key_tiles = tile_count(g.dmask_size[3], kGradKeys);
  const int64_t query_tiles = tile_count(g.dmask_size[2], kLanes);
  const int64_t key_tile = task % key_tiles, query_tile = task / key_tiles % query_tiles;
  const int64_t plane = task / key_tiles / query_tiles;
  const int64_t mask_head = plane % g.dmask_size[1], mask_batch = plane / g.dmask_size[1];

  const int64_t heads_per_group = p.heads / p.kv_heads;
  const int64_t blocks_per_head = (p.queries + kLanes - 1) / kLanes;
  const Range batches = tile_range(g.dmask_size[0], mask_batch, 1, p.batch);
  const Range heads = tile_range(g.dmask_size[1], mask_head, 1, p.heads);
  const Range blocks = tile_range(g.dmask_size[2], query_tile, 1, blocks_per_head);
  const Range keys = tile_range(g.dmask_size[3], key_tile, kGradKeys, p.keys);
  QueryBlock block;
  for (int64_t b = batches.begin; b < batches.end; ++b) {
    for (int64_t h = heads.begin; h < heads.end; ++h) {
      for (int64_t i = blocks.begin; i < blocks.end; ++i) {
        begin_block(p, b * p.kv_heads + h / heads_per_group,
                    h % heads_per_group * blocks_per_head + i, block);
        if (block.end <= keys.begin || block.begin >= keys.end) continue;
        const T *q[kLanes], *grad[kLanes];
        begin_grad_block<T, true>(g, block, static_cast<const T*>(s.zeros), s.lanes, q, grad);
        pack_lanes(q, block.count, p.dim, split_scale(p.scale).query, s.q);
        pack_lanes(grad, block.count, p.dim_v, 1.0f, s.g);
        for (int64_t key = keys.begin; key < min64(keys.end, block.end); key += kGradKeys)
          add_block<T>(g, block, s, key, static_cast<int>(min64(kGradKeys, keys.end - key)));
      }
    }
  }

  const bool one_query = g.dmask_size[2] <= 1, one_key = g.dmask_size[3] <= 1;
  const int rows = clamp_int(keys.end - keys.begin, 0, kGradKeys);
  const int lanes = clamp_int(p.queries - blocks.begin * kLanes, 0, kLanes);
  if (one_query) {  // sum over lanes, into lane 0
    for (int k = 0; k < rows; ++k) {
      Vec sum = zero();
      for (int j = 0; j < kBlockVecs; ++j) sum = sum + load(s.sum + k * kLanes + j * W);
      s.sum[k * kLanes] = reduce_add(sum);
    }
  }
  if (one_key) {  // sum over rows, into row 0
    for (int k = 1; k < rows; ++k)
      for (int j = 0; j < kBlockVecs; ++j)
        store(s.sum + j * W, load(s.sum + j * W) + load(s.sum + k * kLanes + j * W));
  }
  float* out = g.dmask + mask_batch * g.dmask_stride[0] + mask_head * g.dmask_stride[1] +
               query_tile * kLanes * g.dmask_stride[2] + key_tile * kGradKeys * g.dmask_stride[3];
  for (int i = 0; i < (one_query ? 1 : lanes); ++i)
    for (int k = 0; k < (one_key ? 1 : rows); ++k)
      out[i * g.dmask_stride[2] + k * g.dmask_stride[3]] = s.sum[k * kLanes + i];
}

}  // namespace

int64_t attention_dmask_scratch(const AttentionGradParams& g) {
  Arena arena{nullptr};
  layout(g.fwd, arena);
  return arena.next - static_cast<char*>(nullptr);
}

int64_t attention_dmask_tasks(const AttentionGradParams& g) {
  return g.dmask_size[0] * g.dmask_size[1] * tile_count(g.dmask_size[2], kLanes) *
         tile_count(g.dmask_size[3], kGradKeys);
}

void attention_dmask(const AttentionGradParams& g, int64_t task, void* scratch) {
  LLMOPS_DISPATCH(g.fwd.type, T, (run<T>(g, task, scratch)));
}

}  // namespace llmops::cpu::LLMOPS_ISA
