// Merging attention over disjoint sets of keys by their log-sum-exp:
//   lse = log sum_s exp(lse[s]),  out = sum_s exp(lse[s] - lse) out[s]
// Lanes run along a row's elements. A part that saw no key (lse -inf) weighs nothing, whatever its
// row holds; where none did, zeros and -inf.
#include "attention.h"

#include "attention_tile.h"
#include "simd.h"

namespace llmops::cpu::LLMOPS_ISA {

void attention_combine(const AttentionParams& p, int64_t begin, int64_t end) {
  const int64_t heads = p.heads / p.kv_heads, rows = heads * p.queries, width = p.dim_v + 1;
  for (int64_t r = begin; r < end; ++r) {
    const int64_t group = r / rows, row = r % rows;
    const int64_t batch = group / p.kv_heads, token = row % p.queries;
    const int64_t head = group % p.kv_heads * heads + row / p.queries;
    const float* part = p.partial + (group * p.plan.splits * rows + row) * width;
    const int64_t stride = rows * width;
    float top = -kInf;
    for (int64_t s = 0; s < p.plan.splits; ++s) {
      const float lse = part[s * stride + p.dim_v];
      top = lse > top ? lse : top;
    }
    const float shift = top == -kInf ? 0.0f : top;
    float sum = 0.0f;
    for (int64_t s = 0; s < p.plan.splits; ++s)
      sum += exp_scalar(part[s * stride + p.dim_v] - shift);
    p.lse[(batch * p.heads + head) * p.queries + token] =
        sum == 0.0f ? -kInf : shift + __builtin_logf(sum);
    const int64_t at = batch * p.out_stride[0] + head * p.out_stride[1] + token * p.out_stride[2];
    LLMOPS_DISPATCH(p.type, T, {
      T* out = static_cast<T*>(p.out) + at;
      for (int64_t d = 0; d < p.dim_v; d += W) {
        Vec acc = zero();
        for (int64_t s = 0; s < p.plan.splits; ++s) {
          const float lse = part[s * stride + p.dim_v];
          if (lse == -kInf) continue;
          acc = fma(set1(exp_scalar(lse - shift) / sum),
                    load_some(part + s * stride + d, p.dim_v - d), acc);
        }
        store_some(out + d, acc, p.dim_v - d);
      }
    });
  }
}

}  // namespace llmops::cpu::LLMOPS_ISA
