// attention: the CUDA kernels as raw operators, with the signatures of the CPU's.
#include "cuda/attention.h"

#include "../attention_checks.h"
#include "common.h"

namespace llmops {
namespace {

constexpr const char* kElse = "; use backend=\"triton\"";

// Whether rows of t can be moved in 16-byte accesses.
bool wide(const Tensor& t) {
  bool fits = t.size(3) % 8 == 0 && reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0;
  for (int64_t d = 0; d < 3; ++d) fits = fits && (t.size(d) <= 1 || t.stride(d) % 8 == 0);
  return fits;
}

std::tuple<Tensor, Tensor> attention_fwd_cuda(const Tensor& q_in, const Tensor& k_in,
                                              const Tensor& v_in, const std::optional<Tensor>& mask,
                                              bool causal, double scale, int64_t window_left,
                                              int64_t window_right,
                                              const std::optional<Tensor>& alibi_slopes,
                                              double softcap, const std::optional<Tensor>& sinks,
                                              double dropout_p, const std::optional<Tensor>& seed) {
  Launcher launcher(q_in, kAttentionName);
  const Tensor q = heads_dense(q_in, "q"), k = heads_dense(k_in, "k"), v = heads_dense(v_in, "v");
  cuda::Attention p{};
  LLMOPS_CHECK(q.scalar_type() == ScalarType::BFloat16 || q.scalar_type() == ScalarType::Half,
               kAttentionName, ": the CUDA kernels take bfloat16 and float16, got ",
               dtype_name(q.scalar_type()), kElse);
  p.type = static_cast<int>(kernel_dtype(q.scalar_type(), kAttentionName));
  read_heads(q, k, v, scale, false, p);
  LLMOPS_CHECK(p.dim <= cuda::kAttentionDim && p.dim_v <= cuda::kAttentionDim, kAttentionName,
               ": the CUDA kernels take a head dim up to ", cuda::kAttentionDim, ", got ", p.dim,
               " and ", p.dim_v, kElse);
  read_modifiers({window_left, window_right, alibi_slopes, softcap, sinks, dropout_p, seed}, causal,
                 p);
  LLMOPS_CHECK(p.keys < cuda::kAttentionTokens &&
                   p.heads * p.queries < cuda::kAttentionTokens * (p.kv_heads > 0 ? p.kv_heads : 1),
               kAttentionName, ": the CUDA kernels take fewer than 2^29 keys, and query rows of a ",
               "key/value head, got ", p.keys, " and ", p.heads, " x ", p.queries, kElse);
  if (alibi_slopes.has_value()) p.slopes = static_cast<float*>(launcher.data(*alibi_slopes));
  if (sinks.has_value()) p.sinks = static_cast<float*>(launcher.data(*sinks));
  if (p.dropout.active) p.dropout.seed = static_cast<uint64_t*>(launcher.data(*seed));
  if (mask.has_value()) {
    read_mask(*mask, p);
    p.mask.data = launcher.data(*mask);
    p.mask.type = mask->scalar_type() == ScalarType::Bool
                      ? static_cast<int>(cuda::kBool)
                      : static_cast<int>(kernel_dtype(mask->scalar_type(), kAttentionName));
  }
  Tensor out = new_heads(q_in, p.dim_v, q.scalar_type());
  Tensor lse = new_output(q, {q.size(0), q.size(1), q.size(2)}, ScalarType::Float);
  if (lse.numel() == 0) return {out, lse};
  p.q = launcher.data(q), p.k = launcher.data(k), p.v = launcher.data(v);
  p.out = launcher.data(out), p.lse = static_cast<float*>(launcher.data(lse));
  read_strides(out, p.out_stride);
  p.wide_q = wide(q), p.wide_kv = wide(k) && wide(v), p.wide_out = wide(out);
  cuda::plan_attention(p);
  std::optional<Tensor> partial_out, partial_lse;
  if (p.splits > 1) {
    partial_out = new_output(q, {p.splits * lse.numel() * p.dim_v}, ScalarType::Float);
    partial_lse = new_output(q, {p.splits * lse.numel()}, ScalarType::Float);
    p.partial_out = static_cast<float*>(launcher.data(*partial_out));
    p.partial_lse = static_cast<float*>(launcher.data(*partial_lse));
  }
  launcher.check(cuda::attention_fwd(p, launcher.stream()));
  return {out, lse};
}

}  // namespace

LLMOPS_CUDA_SCHEMAS(m) {
  m.def(
      "attention_fwd(Tensor q, Tensor k, Tensor v, Tensor? mask, bool causal, float scale, "
      "int window_left=-1, int window_right=-1, Tensor? alibi_slopes=None, float softcap=0.0, "
      "Tensor? sinks=None, float dropout_p=0.0, Tensor? seed=None) -> (Tensor, Tensor)");
}
LLMOPS_CUDA_KERNELS(m) { m.impl("attention_fwd", TORCH_BOX(&attention_fwd_cuda)); }

}  // namespace llmops
