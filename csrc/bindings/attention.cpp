// attention: the CPU kernels as raw operators. llmops.ops.attention owns the public schema, the
// checks and autograd; what is checked here keeps memory safe whoever calls.
#include "attention.h"

#include "attention_checks.h"
#include "attention_plan.h"
#include "schemas.h"
#include "scratch.h"

namespace llmops {
namespace {

using cpu::AttentionParams;
using cpu::ScoreMask;

constexpr const char* kName = kAttentionName;

// Everything but the outputs. q, k, v have a dense last dimension.
AttentionParams make_params(const Tensor& q, const Tensor& k, const Tensor& v,
                            const std::optional<Tensor>& mask, bool causal, double scale,
                            const AttentionModifiers& modifiers, UnequalSequences* unequal) {
  AttentionParams p{};
  p.type = kernel_dtype(q.scalar_type(), kName);
  read_heads(q, k, v, scale, unequal && unequal->page > 0, p);
  p.q = q.data_ptr(), p.k = k.data_ptr(), p.v = v.data_ptr();
  p.lse_stride[0] = p.heads * p.queries, p.lse_stride[1] = p.queries;
  if (unequal) {
    p.batch = static_cast<int64_t>(unequal->sequences.size());
    p.sequences = unequal->sequences.data();
    p.page = unequal->page;
    p.queries = p.keys = 0;
    for (const auto& sequence : unequal->sequences) {
      p.queries = std::max(p.queries, sequence.queries);
      p.keys = std::max(p.keys, sequence.keys);
    }
    if (unequal->packed) p.q_stride[0] = p.k_stride[0] = p.v_stride[0] = p.lse_stride[0] = 0;
  }
  read_modifiers(modifiers, causal, p);
  if (modifiers.alibi_slopes.has_value())
    p.slopes = static_cast<const float*>(modifiers.alibi_slopes->data_ptr());
  if (modifiers.sinks.has_value()) p.sinks = static_cast<const float*>(modifiers.sinks->data_ptr());
  if (p.dropout.active) p.dropout.seed = *static_cast<const uint64_t*>(modifiers.seed->data_ptr());
  if (mask.has_value()) {
    const bool boolean = mask->scalar_type() == ScalarType::Bool;
    p.mask_kind = boolean ? ScoreMask::boolean : ScoreMask::additive;
    if (!boolean) p.mask_type = kernel_dtype(mask->scalar_type(), "llmops.attention: mask");
    p.mask = mask->data_ptr();
    read_mask(*mask, p);
  }
  return p;
}

}  // namespace

std::tuple<Tensor, Tensor> attention_forward(const Tensor& q_in, const Tensor& k_in,
                                             const Tensor& v_in, const std::optional<Tensor>& mask,
                                             bool causal, double scale,
                                             const AttentionModifiers& modifiers,
                                             UnequalSequences* unequal) {
  const Tensor q = heads_dense(q_in, "q"), k = heads_dense(k_in, "k"), v = heads_dense(v_in, "v");
  AttentionParams p = make_params(q, k, v, mask, causal, scale, modifiers, unequal);
  Tensor out = new_heads(q_in, p.dim_v, q.scalar_type());
  Tensor lse = new_output(q, {q.size(0), q.size(1), q.size(2)}, ScalarType::Float);
  if (lse.numel() == 0) return {out, lse};
  p.out = out.data_ptr();
  p.lse = static_cast<float*>(lse.data_ptr());
  read_strides(out, p.out_stride);
  if (unequal && unequal->packed) p.out_stride[0] = 0;
  const Totals all = make_plans(p, unequal);
  const int64_t heads = p.heads / p.kv_heads;
  const int64_t partial_rows = plan_partial(p, unequal, [&](const cpu::AttentionSequence& s) {
    return s.plan.splits > 1 ? s.plan.splits * heads * s.queries : 0;
  });
  std::optional<Tensor> partial;
  if (partial_rows > 0) {
    partial = new_output(q, {partial_rows * (p.dim_v + 1)}, ScalarType::Float);
    p.partial = static_cast<float*>(partial->data_ptr());
  }
  const int64_t tasks = plan_tasks(
      p, unequal,
      [](const cpu::AttentionPlan& plan, int64_t group, std::vector<cpu::AttentionTask>* list) {
        if (list) {
          for (int64_t block = plan.blocks; block-- > 0;)
            for (int64_t split = 0; split < plan.splits; ++split)
              list->push_back({group, block, split});
        }
        return plan.blocks * plan.splits;
      });
  const auto tiles = LLMOPS_CPU_CALL(attention_fwd), decode = LLMOPS_CPU_CALL(attention_decode);
  const auto is_decode = [&](int64_t task) {
    return unequal ? p.sequences[p.tasks[task].group / p.kv_heads].plan.decode : p.plan.decode;
  };
  int64_t bytes = 0;
  if (unequal || !p.plan.decode) bytes = LLMOPS_CPU_CALL(attention_fwd_scratch)(p);
  if (unequal || p.plan.decode)
    bytes = std::max(bytes, LLMOPS_CPU_CALL(attention_decode_scratch)(p));
  parallel_tasks(tasks, worth_threads(p, all), [&](int64_t task) {
    const Scratch scratch(bytes);
    (is_decode(task) ? decode : tiles)(p, task, scratch.data());
  });
  if (partial_rows > 0) {
    const auto combine = LLMOPS_CPU_CALL(attention_combine);
    parallel_rows(p.batch * p.heads * p.queries, p.dim_v * div_up(partial_rows, p.batch * p.heads),
                  [&](int64_t begin, int64_t end) { combine(p, begin, end); });
  }
  return {out, lse};
}

namespace {

// dsinks [Hq] from what each row adds, [B, Hq, Tq].
Tensor sum_rows_of_heads(const Tensor& rows) {
  const int64_t batch = rows.size(0), heads = rows.size(1), queries = rows.size(2);
  Tensor sums = new_output(rows, {heads}, ScalarType::Float);
  const float* from = static_cast<const float*>(rows.data_ptr());
  for (int64_t h = 0; h < heads; ++h) {
    double sum = 0.0;
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t t = 0; t < queries; ++t) sum += from[(b * heads + h) * queries + t];
    static_cast<float*>(sums.data_ptr())[h] = static_cast<float>(sum);
  }
  return sums;
}

}  // namespace

AttentionGradients attention_backward(const Tensor& grad_out_in,
                                      const std::optional<Tensor>& grad_lse, const Tensor& q_in,
                                      const Tensor& k_in, const Tensor& v_in,
                                      const std::optional<Tensor>& mask, const Tensor& out_in,
                                      const Tensor& lse_in, bool causal, double scale,
                                      bool need_mask_grad, const AttentionModifiers& modifiers,
                                      UnequalSequences* unequal) {
  const Tensor q = heads_dense(q_in, "q"), k = heads_dense(k_in, "k"), v = heads_dense(v_in, "v");
  const Tensor out = heads_dense(out_in, "out"), grad_out = heads_dense(grad_out_in, "grad_out");
  const Tensor lse = lse_in.is_contiguous() ? lse_in : torch::stable::contiguous(lse_in);
  cpu::AttentionGradParams g{};
  AttentionParams& p = g.fwd;
  p = make_params(q, k, v, mask, causal, scale, modifiers, unequal);
  const std::vector<int64_t> out_shape = {q.size(0), q.size(1), q.size(2), p.dim_v};
  LLMOPS_CHECK(shape_of(out) == out_shape && shape_of(grad_out) == out_shape &&
                   out.scalar_type() == q.scalar_type() &&
                   grad_out.scalar_type() == q.scalar_type(),
               kName, ": out and grad_out must be [B, Hq, Tq, Dv] in q's dtype");
  const std::vector<int64_t> lse_shape = {q.size(0), q.size(1), q.size(2)};
  LLMOPS_CHECK(shape_of(lse) == lse_shape && lse.scalar_type() == ScalarType::Float, kName,
               ": lse must be float32 [B, Hq, Tq]");
  p.out = out.data_ptr();
  p.lse = static_cast<float*>(lse.data_ptr());
  read_strides(out, p.out_stride);
  g.grad_out = grad_out.data_ptr();
  read_strides(grad_out, g.grad_out_stride);
  if (grad_lse.has_value()) {
    LLMOPS_CHECK(shape_of(*grad_lse) == lse_shape && grad_lse->scalar_type() == ScalarType::Float,
                 kName, ": grad_lse must be float32 [B, Hq, Tq]");
    g.grad_lse = static_cast<const float*>(grad_lse->data_ptr());
    read_strides(*grad_lse, g.grad_lse_stride);
  }
  Tensor dq = new_heads(q_in, p.dim, q.scalar_type());
  Tensor dk = new_heads(k_in, p.dim, q.scalar_type());
  Tensor dv = new_heads(v_in, p.dim_v, q.scalar_type());
  g.dq = dq.data_ptr(), g.dk = dk.data_ptr(), g.dv = dv.data_ptr();
  read_strides(dq, g.dq_stride);
  read_strides(dk, g.dk_stride);
  read_strides(dv, g.dv_stride);

  if (unequal && unequal->packed) {
    for (int64_t* stride : {p.out_stride, g.grad_out_stride, g.grad_lse_stride, g.dq_stride,
                            g.dk_stride, g.dv_stride})
      stride[0] = 0;
  }

  const Totals all = make_plans(p, unequal);
  const int64_t partial_keys = plan_partial(p, unequal, [](const cpu::AttentionSequence& s) {
    return s.plan.parts > 1 ? s.plan.parts * s.keys : 0;
  });
  std::optional<Tensor> partial;
  if (partial_keys > 0) {
    const int64_t width = LLMOPS_CPU_CALL(attention_bwd_width)(p);
    partial = new_output(q, {partial_keys * width}, ScalarType::Float);
    g.partial = static_cast<float*>(partial->data_ptr());
  }
  const int64_t tasks = plan_tasks(
      p, unequal,
      [](const cpu::AttentionPlan& plan, int64_t group, std::vector<cpu::AttentionTask>* list) {
        for (int64_t part = 0; list && part < plan.parts; ++part) list->push_back({group, part, 0});
        return plan.parts;
      });
  std::optional<Tensor> dsink;
  if (p.sinks) {
    dsink = new_output(q, lse_shape, ScalarType::Float);
    g.dsink = static_cast<float*>(dsink->data_ptr());
  }
  const auto kernel = LLMOPS_CPU_CALL(attention_bwd);
  const int64_t bytes = LLMOPS_CPU_CALL(attention_bwd_scratch)(g);
  const bool threads = worth_threads(p, all);
  parallel_tasks(tasks, threads, [&](int64_t task) {
    const Scratch scratch(bytes);
    kernel(g, task, scratch.data());
  });
  if (partial_keys > 0) {
    const auto combine = LLMOPS_CPU_CALL(attention_bwd_combine);
    const int64_t keys = p.batch * p.kv_heads * p.keys;
    parallel_rows(keys, (p.dim + p.dim_v) * div_up(partial_keys, keys),
                  [&](int64_t begin, int64_t end) { combine(g, begin, end); });
  }
  if (dsink.has_value()) dsink = sum_rows_of_heads(*dsink);
  if (!need_mask_grad) return {dq, dk, dv, std::nullopt, dsink};

  LLMOPS_CHECK(p.mask_kind == ScoreMask::additive, kName,
               ": only a floating-point mask has a gradient");
  Tensor dmask = new_output(q, shape_of(*mask), ScalarType::Float);
  if (dmask.numel() == 0) return {dq, dk, dv, dmask, dsink};
  const int64_t shift = 4 - mask->dim();
  for (int64_t d = 0; d < 4; ++d) {
    g.dmask_size[d] = d < shift ? 1 : mask->size(d - shift);
    g.dmask_stride[d] = d < shift ? 0 : dmask.stride(d - shift);
  }
  g.dmask = static_cast<float*>(dmask.data_ptr());
  const auto mask_kernel = LLMOPS_CPU_CALL(attention_dmask);
  const int64_t mask_bytes = LLMOPS_CPU_CALL(attention_dmask_scratch)(g);
  parallel_tasks(LLMOPS_CPU_CALL(attention_dmask_tasks)(g), threads, [&](int64_t task) {
    const Scratch scratch(mask_bytes);
    mask_kernel(g, task, scratch.data());
  });
  return {dq, dk, dv, dmask, dsink};
}

namespace {

std::tuple<Tensor, Tensor> attention_fwd_cpu(const Tensor& q, const Tensor& k, const Tensor& v,
                                             const std::optional<Tensor>& mask, bool causal,
                                             double scale, int64_t window_left,
                                             int64_t window_right,
                                             const std::optional<Tensor>& alibi_slopes,
                                             double softcap, const std::optional<Tensor>& sinks,
                                             double dropout_p, const std::optional<Tensor>& seed) {
  return attention_forward(
      q, k, v, mask, causal, scale,
      {window_left, window_right, alibi_slopes, softcap, sinks, dropout_p, seed}, nullptr);
}

AttentionGradients attention_bwd_cpu(const Tensor& grad_out, const std::optional<Tensor>& grad_lse,
                                     const Tensor& q, const Tensor& k, const Tensor& v,
                                     const std::optional<Tensor>& mask, const Tensor& out,
                                     const Tensor& lse, bool causal, double scale,
                                     bool need_mask_grad, int64_t window_left, int64_t window_right,
                                     const std::optional<Tensor>& alibi_slopes, double softcap,
                                     const std::optional<Tensor>& sinks, double dropout_p,
                                     const std::optional<Tensor>& seed) {
  return attention_backward(
      grad_out, grad_lse, q, k, v, mask, out, lse, causal, scale, need_mask_grad,
      {window_left, window_right, alibi_slopes, softcap, sinks, dropout_p, seed}, nullptr);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(llmops_cpu, m) { define(m, kAttentionSchemas); }
STABLE_TORCH_LIBRARY_IMPL(llmops_cpu, CPU, m) {
  m.impl("attention_fwd", TORCH_BOX(&attention_fwd_cpu));
  m.impl("attention_bwd", TORCH_BOX(&attention_bwd_cpu));
}

}  // namespace llmops
