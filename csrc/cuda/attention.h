// Attention on CUDA: an online softmax over tiles of keys, O(T) memory. Formula and modifiers:
// csrc/cpu/attention.h, whose names the members have.
//
// attention_fwd: blocks of queries, each over the keys it sees. attention_decode: few queries; each
// block takes a part of the keys and attention_combine merges the parts by their log-sum-exp.
#pragma once
#include "rows.h"

namespace llmops::cuda {

// Beyond it the scale is applied before the maximum is subtracted, which costs: a fused
// scale * (q . k) - maximum is off by what the maximum was rounded by, from 2^31 on a power of two
// that is out of range.
constexpr float kLargestPlainScale = 1024.0f;

// Drops the weight of (batch, head, query, key) where its 32 random bits are below `below`; what is
// kept counts `scale`.
struct AttentionDropout {
  bool active;
  uint32_t below;
  float scale;
  const uint64_t* seed;  // in device memory
};

// Strides in elements. The last dimension of q, k, v and out is dense.
struct Attention {
  int type;  // kBf16 or kF16
  float scale;
  // Query t at position x = t + Tk - Tq sees keys x - left to x + right; -1: without bound.
  int64_t left, right;
  int64_t batch, heads, kv_heads, queries, keys, dim, dim_v;
  const void *q, *k, *v;  // [B, Hq, Tq, D], [B, Hkv, Tk, D], [B, Hkv, Tk, Dv]
  void* out;              // [B, Hq, Tq, Dv]
  float* lse;             // [B, Hq, Tq], contiguous
  int64_t q_stride[3], k_stride[3], v_stride[3], out_stride[3];
  bool wide_q, wide_kv, wide_out;  // can be moved in 16-byte accesses

  float softcap;        // c, or 0
  const float* slopes;  // ALiBi [B, Hq], or null
  int64_t slope_stride[2];
  const float* sinks;  // [Hq], contiguous, or null
  Rows mask;           // broadcast to [B, Hq, Tq, Tk] by mask_stride; data null: none
  int64_t mask_stride[4];
  AttentionDropout dropout;

  // What a plan makes, below. The query rows of one (batch, kv head) are numbered head * Tq + t
  // over its group of heads; a block takes neighbouring ones.
  bool decode;
  bool packed;     // blocks of rows run across the heads of a group (short queries)
  int64_t blocks;  // of rows, per (batch, kv head)
  int64_t splits, split_keys;
  Divisor of_queries, of_heads;
  float *partial_out, *partial_lse;  // [splits, B, Hq, Tq, Dv] and [splits, B, Hq, Tq]; splits > 1
};

// The widest head that the kernels take, and the most rows and keys of one (batch, kv head).
constexpr int64_t kAttentionDim = 256;
constexpr int64_t kAttentionTokens = int64_t{1} << 29;

// Fills in the plan, by shapes alone; the sizes, strides and modifiers are there.
void plan_attention(Attention& p);
int attention_fwd(const Attention& p, void* stream);  // decode or not, merged where it is split

// The parts of attention_fwd.
int attention_decode(const Attention& p, void* stream);
int attention_combine(const Attention& p, void* stream);

}  // namespace llmops::cuda
