// Attention over tiles with an online softmax: O(T) memory, no T x T buffer in either direction.
//   s[t,j] = cap(scale * q[t] . k[j]) - slope * |d| + mask[t,j],  d = j - (t + Tk - Tq),
//            -inf where masked, d > right (0 if causal) or d < -left;  cap(x) = c tanh(x / c)
//   lse[t] = log(exp(sink) + sum_j exp(s[t,j])),  out[t] = sum_j exp(s[t,j] - lse[t]) z[t,j] v[j],
//            z = 1, or with dropout Bernoulli(1 - p) / (1 - p)
//   backward: P = exp(s - lse), dS = P * (z * (dout . v) - delta), delta = dout . out - dlse;
//   dv = (P * z)^T dout, dmask = dS, dsink = -sum_t exp(sink - lse) delta, and with
//   dX = dS * cap'(.):  dk = scale * dX^T q, dq = scale * dX k
// Dao et al. 2022, 2023. Grouped-query heads: query head h reads key/value head h / (Hq / Hkv).
#pragma once
#include "isa.h"

namespace llmops::cpu {

enum class ScoreMask : int { none = 0, boolean = 1, additive = 2 };

constexpr int64_t kAttentionLanes = 64;      // query rows of one block, one per vector lane
constexpr int64_t kAttentionDecodeRows = 8;  // up to here a (batch, kv head) is served by decode

// The work is cut into tasks by shape alone, so that results do not depend on the thread count.
// The query rows of one (batch, kv head) are numbered head * Tq + t over its group of heads.
struct AttentionPlan {
  bool decode;         // rows <= kAttentionDecodeRows: attention_decode, one block
  bool packed;         // blocks of 64 rows run across the heads of a group (short queries)
  int64_t blocks;      // query blocks per (batch, kv head)
  int64_t splits;      // parts the keys are split into, merged by log-sum-exp
  int64_t first_key;   // where the first part begins: what no query's window reaches is left out
  int64_t split_keys;  // keys per part
  int64_t parts;       // backward: independent sums for dk and dv per (batch, kv head)
};

// One sequence of a batch of unequal ones (packed, or in a KV cache), or any item of an equal
// batch.
struct AttentionSequence {
  int64_t query_start, queries;  // its rows of q, out and lse
  int64_t key_start, keys;       // its rows of k and v
  // Row r of a paged cache is row r % page of block pages[r / page]; null: not paged.
  const int64_t* pages;
  AttentionPlan plan;
  int64_t partial;  // rows that the partial results of earlier sequences take
};

// One piece of the work of unequal sequences.
struct AttentionTask {
  int64_t group;  // batch * Hkv + kv head
  int64_t index;  // query block; in the backward, part
  int64_t split;
};

// Which scores' values lose their weight: the element (batch, head, query, key) is dropped where
// its 32 random bits (attention_dropout.h) are below `below`. `scale`, of what is kept, is
// 1 / (1 - p), and 0 for p = 1. 0 is no dropout at all: `active` says so.
struct AttentionDropout {
  bool active;
  uint32_t below;
  float scale;
  uint64_t seed;
};

// Strides in elements. The last dimension of q, k, v and of every output is dense.
struct AttentionParams {
  DType type;
  ScoreMask mask_kind;
  DType mask_type;
  float scale;
  // Query t at position x = t + Tk - Tq sees keys x - left to x + right; -1: without bound. A
  // causal limit is right = 0.
  int64_t left, right;
  float softcap;        // c, or 0
  const float* slopes;  // ALiBi [B, Hq], or null
  int64_t slope_stride[2];
  const float* sinks;  // [Hq], contiguous, or null
  AttentionDropout dropout;
  int64_t batch, heads, kv_heads, queries, keys, dim, dim_v;  // the most queries, the most keys
  const void *q, *k, *v;  // [B, Hq, Tq, D], [B, Hkv, Tk, D], [B, Hkv, Tk, Dv]
  const void* mask;       // broadcast to [B, Hq, Tq, Tk] by its strides
  int64_t q_stride[3], k_stride[3], v_stride[3], mask_stride[4];
  void* out;  // [B, Hq, Tq, Dv]
  int64_t out_stride[3];
  float* lse;  // [B, Hq, Tq], the last dimension dense
  int64_t lse_stride[2];
  float* partial;  // [B * Hkv, splits, rows, Dv + 1]: out, then lse; splits > 1
  AttentionPlan plan;
  // Unequal sequences [B] and their tasks; null: all alike, by `plan`. Packed ones have batch
  // strides of 0.
  const AttentionSequence* sequences;
  const AttentionTask* tasks;
  int64_t page;  // keys of a page, where sequences have pages
};

struct AttentionGradParams {
  AttentionParams fwd;    // out and lse are read
  const void* grad_out;   // [B, Hq, Tq, Dv]
  const float* grad_lse;  // [B, Hq, Tq] or null
  int64_t grad_out_stride[3], grad_lse_stride[3];
  void *dq, *dk, *dv;
  int64_t dq_stride[3], dk_stride[3], dv_stride[3];
  float* partial;  // [B * Hkv, parts, Tk, padded D + padded Dv]; parts > 1
  float* dsink;    // [B, Hq, Tq], what each row adds to its head's gradient, or null
  float* dmask;    // fp32, the mask's own sizes, contiguous: strides below, or null
  int64_t dmask_size[4], dmask_stride[4];
};

}  // namespace llmops::cpu

// Bytes of scratch one running task needs.
LLMOPS_CPU_KERNEL(int64_t, attention_fwd_scratch, const llmops::cpu::AttentionParams&)
// task: [0, B * Hkv * blocks * splits), or an index of `tasks`.
LLMOPS_CPU_KERNEL(void, attention_fwd, const llmops::cpu::AttentionParams&, int64_t task,
                  void* scratch)
// The same for plan.decode. task: [0, B * Hkv * splits).
LLMOPS_CPU_KERNEL(int64_t, attention_decode_scratch, const llmops::cpu::AttentionParams&)
LLMOPS_CPU_KERNEL(void, attention_decode, const llmops::cpu::AttentionParams&, int64_t task,
                  void* scratch)
// Merges the partial results of rows [begin, end) of B * Hkv * rows; plan.splits > 1.
LLMOPS_CPU_KERNEL(void, attention_combine, const llmops::cpu::AttentionParams&, int64_t begin,
                  int64_t end)

// Backward: dq, dk and dv. task: [0, B * Hkv * plan.parts).
LLMOPS_CPU_KERNEL(int64_t, attention_bwd_scratch, const llmops::cpu::AttentionGradParams&)
LLMOPS_CPU_KERNEL(void, attention_bwd, const llmops::cpu::AttentionGradParams&, int64_t task,
                  void* scratch)
// Adds up the parts of dk and dv for rows [begin, end) of B * Hkv * Tk; plan.parts > 1.
LLMOPS_CPU_KERNEL(void, attention_bwd_combine, const llmops::cpu::AttentionGradParams&,
                  int64_t begin, int64_t end)
// Floats per key in AttentionGradParams::partial.
LLMOPS_CPU_KERNEL(int64_t, attention_bwd_width, const llmops::cpu::AttentionParams&)

// dmask. task: [0, tiles of the mask, 64 x 64 where neither dimension broadcasts).
LLMOPS_CPU_KERNEL(int64_t, attention_dmask_scratch, const llmops::cpu::AttentionGradParams&)
LLMOPS_CPU_KERNEL(int64_t, attention_dmask_tasks, const llmops::cpu::AttentionGradParams&)
LLMOPS_CPU_KERNEL(void, attention_dmask, const llmops::cpu::AttentionGradParams&, int64_t task,
                  void* scratch)
