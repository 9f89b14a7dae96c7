// Merging attention over disjoint sets of keys by their log-sum-exp:
//   lse = log sum_s exp(lse[s]),  out = sum_s exp(lse[s] - lse) out[s]
// Lanes run along a row's elements. A part that saw no key (lse -inf) weighs nothing, whatever its
// row holds; where none did, zeros and -inf.
#include "merge_attention.h"

#include "attention.h"

#include "attention_score.h"
#include "attention_tile.h"
#include "simd.h"

namespace llmops::cpu::LLMOPS_ISA {

void attention_combine(const AttentionParams& p, int64_t begin, int64_t end) {
  const int64_t heads = p.heads / p.kv_heads, rows = heads * p.queries, width = p.dim_v + 1;
  for (int64_t r = begin; r < end; ++r) {
    const int64_t group = r / rows, batch = group / p.kv_heads;
    const int64_t token = r % p.queries, group_head = r % rows / p.queries;
    const int64_t head = group % p.kv_heads * heads + group_head;
    const AttentionSequence sequence = sequence_of(p, batch);
    const int64_t splits = sequence.plan.splits;
    if (token >= sequence.queries || splits == 1) continue;
    const int64_t start = partial_start(p, sequence, group, splits * heads * sequence.queries);
    const float* part = p.partial + (start + group_head * sequence.queries + token) * width;
    const int64_t stride = heads * sequence.queries * width;
    float top = -kInf;
    for (int64_t s = 0; s < splits; ++s) {
      const float lse = part[s * stride + p.dim_v];
      top = lse > top ? lse : top;
    }
    const float shift = top == -kInf ? 0.0f : top;
    float sum = 0.0f;
    for (int64_t s = 0; s < splits; ++s) sum += exp_scalar(part[s * stride + p.dim_v] - shift);
    p.lse[lse_at(p, sequence, batch, head, token)] =
        sum == 0.0f ? -kInf : shift + __builtin_logf(sum);
    LLMOPS_DISPATCH(p.type, T, {
      T* out =
          row_at(static_cast<T*>(p.out), p.out_stride, batch, head, sequence.query_start + token);
      for (int64_t d = 0; d < p.dim_v; d += W) {
        Vec acc = zero();
        for (int64_t s = 0; s < splits; ++s) {
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

namespace {

struct Weights {
  float a, b, lse;
};
LLMOPS_INLINE Weights weights(float lse_a, float lse_b) {
  const float top = lse_a > lse_b ? lse_a : (lse_b == lse_b ? lse_b : lse_a);
  const float shift = top == -kInf ? 0.0f : top;
  const float a = exp_scalar(lse_a - shift), b = exp_scalar(lse_b - shift), sum = a + b;
  if (sum == 0.0f) return {0.0f, 0.0f, -kInf};
  return {a / sum, b / sum, shift + __builtin_logf(sum)};
}
// weight * x, and 0 for weight 0 whatever x holds.
LLMOPS_INLINE Vec weighted(Vec x, float weight) {
  return weight == 0.0f ? zero() : x * set1(weight);
}

}  // namespace

void merge_attention_fwd_row(DType type, int64_t n, const void* out_a, float lse_a,
                             const void* out_b, float lse_b, void* out, float* lse) {
  const Weights w = weights(lse_a, lse_b);
  *lse = w.lse;
  LLMOPS_DISPATCH(type, T, {
    const T *a = static_cast<const T*>(out_a), *b = static_cast<const T*>(out_b);
    for (int64_t d = 0; d < n; d += W)
      store_some(static_cast<T*>(out) + d,
                 weighted(load_some(a + d, n - d), w.a) + weighted(load_some(b + d, n - d), w.b),
                 n - d);
  });
}

void merge_attention_bwd_row(DType type, int64_t n, const void* out_a, float lse_a,
                             const void* out_b, float lse_b, const void* grad_out, float grad_lse,
                             void* grad_a, float* grad_lse_a, void* grad_b, float* grad_lse_b) {
  const Weights w = weights(lse_a, lse_b);
  LLMOPS_DISPATCH(type, T, {
    const T *a = static_cast<const T*>(out_a), *b = static_cast<const T*>(out_b);
    const T* grad = static_cast<const T*>(grad_out);
    Vec difference = zero();  // sum of grad * (a - b)
    for (int64_t d = 0; d < n; d += W) {
      const Vec g = load_some(grad + d, n - d);
      store_some(static_cast<T*>(grad_a) + d, weighted(g, w.a), n - d);
      store_some(static_cast<T*>(grad_b) + d, weighted(g, w.b), n - d);
      if (w.a == 0.0f || w.b == 0.0f) continue;
      difference = fma(g, load_some(a + d, n - d) - load_some(b + d, n - d), difference);
    }
    // out = a w_a + b w_b and w_a + w_b = 1, so a - out = w_b (a - b).
    const float both = w.a * w.b * reduce_add(difference);
    *grad_lse_a = w.a == 0.0f ? 0.0f : both + w.a * grad_lse;
    *grad_lse_b = w.b == 0.0f ? 0.0f : w.b * grad_lse - both;
  });
}

}  // namespace llmops::cpu::LLMOPS_ISA
