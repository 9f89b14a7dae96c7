// What the CUDA bindings of attention share: the arguments as the kernels take them.
#pragma once
#include "../attention_checks.h"
#include "common.h"
#include "cuda/attention.h"

namespace llmops {

constexpr const char* kAttentionElse = "; use backend=\"triton\"";

// Whether rows of t can be moved in 16-byte accesses.
inline bool wide(const Tensor& t) {
  bool fits = t.size(3) % 8 == 0 && reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0;
  for (int64_t d = 0; d < 3; ++d) fits = fits && (t.size(d) <= 1 || t.stride(d) % 8 == 0);
  return fits;
}

// All but the outputs and the plan. q, k and v have a dense last dimension.
inline cuda::Attention read_attention(Launcher& launcher, const Tensor& q, const Tensor& k,
                                      const Tensor& v, const std::optional<Tensor>& mask,
                                      bool causal, double scale, const AttentionModifiers& m) {
  cuda::Attention p{};
  LLMOPS_CHECK(q.scalar_type() == ScalarType::BFloat16 || q.scalar_type() == ScalarType::Half,
               kAttentionName, ": the CUDA kernels take bfloat16 and float16, got ",
               dtype_name(q.scalar_type()), kAttentionElse);
  p.type = static_cast<int>(kernel_dtype(q.scalar_type(), kAttentionName));
  read_heads(q, k, v, scale, false, p);
  LLMOPS_CHECK(p.dim <= cuda::kAttentionDim && p.dim_v <= cuda::kAttentionDim, kAttentionName,
               ": the CUDA kernels take a head dim up to ", cuda::kAttentionDim, ", got ", p.dim,
               " and ", p.dim_v, kAttentionElse);
  read_modifiers(m, causal, p);
  LLMOPS_CHECK(p.keys < cuda::kAttentionTokens &&
                   p.heads * p.queries < cuda::kAttentionTokens * (p.kv_heads > 0 ? p.kv_heads : 1),
               kAttentionName, ": the CUDA kernels take fewer than 2^29 keys, and query rows of a ",
               "key/value head, got ", p.keys, " and ", p.heads, " x ", p.queries, kAttentionElse);
  if (m.alibi_slopes.has_value()) p.slopes = static_cast<float*>(launcher.data(*m.alibi_slopes));
  if (m.sinks.has_value()) p.sinks = static_cast<float*>(launcher.data(*m.sinks));
  if (p.dropout.active) p.dropout.seed = static_cast<uint64_t*>(launcher.data(*m.seed));
  if (mask.has_value()) {
    read_mask(*mask, p);
    p.mask.data = launcher.data(*mask);
    p.mask.type = mask->scalar_type() == ScalarType::Bool
                      ? static_cast<int>(cuda::kBool)
                      : static_cast<int>(kernel_dtype(mask->scalar_type(), kAttentionName));
  }
  p.q = launcher.data(q), p.k = launcher.data(k), p.v = launcher.data(v);
  p.wide_q = wide(q), p.wide_kv = wide(k) && wide(v);
  return p;
}

}  // namespace llmops
