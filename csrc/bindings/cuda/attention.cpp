// attention: the CUDA kernels as raw operators, with the signatures of the CPU's.
#include "cuda/attention.h"

#include "attention.h"

namespace llmops {
namespace {

std::tuple<Tensor, Tensor> attention_fwd_cuda(const Tensor& q_in, const Tensor& k_in,
                                              const Tensor& v_in, const std::optional<Tensor>& mask,
                                              bool causal, double scale, int64_t window_left,
                                              int64_t window_right,
                                              const std::optional<Tensor>& alibi_slopes,
                                              double softcap, const std::optional<Tensor>& sinks,
                                              double dropout_p, const std::optional<Tensor>& seed) {
  Launcher launcher(q_in, kAttentionName);
  const Tensor q = heads_dense(q_in, "q"), k = heads_dense(k_in, "k"), v = heads_dense(v_in, "v");
  cuda::Attention p =
      read_attention(launcher, q, k, v, mask, causal, scale,
                     {window_left, window_right, alibi_slopes, softcap, sinks, dropout_p, seed});
  Tensor out = new_heads(q_in, p.dim_v, q.scalar_type());
  Tensor lse = new_output(q, {q.size(0), q.size(1), q.size(2)}, ScalarType::Float);
  if (lse.numel() == 0) return {out, lse};
  p.out = launcher.data(out), p.lse = static_cast<float*>(launcher.data(lse));
  read_strides(out, p.out_stride);
  p.wide_out = wide(out);
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

LLMOPS_CUDA_SCHEMAS(m) { define(m, kAttentionSchemas); }
LLMOPS_CUDA_KERNELS(m) { m.impl("attention_fwd", TORCH_BOX(&attention_fwd_cuda)); }

}  // namespace llmops
