// attention's gradients: the CUDA kernels as a raw operator, with the signature of the CPU's.
#include "cuda/attention_bwd.h"

#include "attention.h"

namespace llmops {
namespace {

using Gradients = std::tuple<Tensor, Tensor, Tensor, std::optional<Tensor>, std::optional<Tensor>>;

float* floats(Launcher& launcher, const Tensor& t) { return static_cast<float*>(launcher.data(t)); }

Gradients attention_bwd_cuda(const Tensor& grad_out_in, const std::optional<Tensor>& grad_lse,
                             const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
                             const std::optional<Tensor>& mask, const Tensor& out_in,
                             const Tensor& lse_in, bool causal, double scale, bool need_mask_grad,
                             int64_t window_left, int64_t window_right,
                             const std::optional<Tensor>& alibi_slopes, double softcap,
                             const std::optional<Tensor>& sinks, double dropout_p,
                             const std::optional<Tensor>& seed) {
  Launcher launcher(q_in, kAttentionName);
  const Tensor q = heads_dense(q_in, "q"), k = heads_dense(k_in, "k"), v = heads_dense(v_in, "v");
  const Tensor out = heads_dense(out_in, "out"), grad_out = heads_dense(grad_out_in, "grad_out");
  const Tensor lse = lse_in.is_contiguous() ? lse_in : torch::stable::contiguous(lse_in);
  cuda::AttentionBackward b{};
  cuda::Attention& p = b.of;
  p = read_attention(launcher, q, k, v, mask, causal, scale,
                     {window_left, window_right, alibi_slopes, softcap, sinks, dropout_p, seed});
  const std::vector<int64_t> lse_shape = {p.batch, p.heads, p.queries};
  const std::vector<int64_t> out_shape = {p.batch, p.heads, p.queries, p.dim_v};
  LLMOPS_CHECK(shape_of(out) == out_shape && shape_of(grad_out) == out_shape &&
                   out.scalar_type() == q.scalar_type() &&
                   grad_out.scalar_type() == q.scalar_type(),
               kAttentionName, ": out and grad_out must be [B, Hq, Tq, Dv] in q's dtype");
  LLMOPS_CHECK(shape_of(lse) == lse_shape && lse.scalar_type() == ScalarType::Float, kAttentionName,
               ": lse must be float32 [B, Hq, Tq]");
  p.out = launcher.data(out), p.lse = floats(launcher, lse);
  read_strides(out, p.out_stride);
  p.wide_out = wide(out);
  b.grad_out = launcher.data(grad_out);
  read_strides(grad_out, b.grad_out_stride);
  b.wide_grad = wide(grad_out), b.wide_k = wide(k), b.wide_v = wide(v);
  if (grad_lse.has_value()) {
    LLMOPS_CHECK(shape_of(*grad_lse) == lse_shape && grad_lse->scalar_type() == ScalarType::Float,
                 kAttentionName, ": grad_lse must be float32 [B, Hq, Tq]");
    b.grad_lse = floats(launcher, *grad_lse);
    read_strides(*grad_lse, b.grad_lse_stride);
  }
  const Tensor dq = new_heads(q_in, p.dim, q.scalar_type());
  const Tensor dk = new_heads(k_in, p.dim, q.scalar_type());
  const Tensor dv = new_heads(v_in, p.dim_v, q.scalar_type());
  b.dq = launcher.data(dq), b.dk = launcher.data(dk), b.dv = launcher.data(dv);
  read_strides(dq, b.dq_stride);
  read_strides(dk, b.dk_stride);
  read_strides(dv, b.dv_stride);
  const bool modified = cuda::attention_bwd_modified(p);
  // Of each row its log-sum-exp, delta, norm and part of dsinks.
  const int64_t rows = p.batch * p.heads * p.queries;
  const Tensor of_rows = new_output(q, {4, rows}, ScalarType::Float);
  b.row_lse = floats(launcher, of_rows);
  b.row_delta = b.row_lse + rows;
  if (modified) b.row_norm = b.row_lse + 2 * rows;
  std::optional<Tensor> dsinks, dmask;
  if (sinks.has_value()) {
    dsinks = new_output(q, {p.heads}, ScalarType::Float);
    b.dsinks = floats(launcher, *dsinks);
    b.row_sink = b.row_lse + 3 * rows;
  }
  if (need_mask_grad) {
    LLMOPS_CHECK(mask.has_value() && p.mask.type != cuda::kBool, kAttentionName,
                 ": only a floating-point mask has a gradient");
    dmask = new_output(q, shape_of(*mask), ScalarType::Float);
    const int64_t shift = 4 - mask->dim();
    for (int64_t d = 0; d < 4; ++d) b.dmask_size[d] = d < shift ? 1 : mask->size(d - shift);
    if (dmask->numel() > 0) b.dmask = floats(launcher, *dmask);
  }
  Gradients gradients{dq, dk, dv, dmask, dsinks};
  if (rows == 0) {  // of a group without heads there is nothing to load
    for (Tensor zero : {dk, dv}) torch::stable::zero_(zero);
    for (std::optional<Tensor> zero : {dmask, dsinks})
      if (zero.has_value()) torch::stable::zero_(*zero);
    return gradients;
  }
  launcher.check(cuda::attention_bwd(b, launcher.stream()));
  return gradients;
}

}  // namespace

LLMOPS_CUDA_KERNELS(m) { m.impl("attention_bwd", TORCH_BOX(&attention_bwd_cuda)); }

}  // namespace llmops
