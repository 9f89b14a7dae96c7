// merge_attention: the CPU kernels as raw operators; llmops.ops.merge_attention is the front door.
#include "cpu/merge_attention.h"

#include <tuple>

#include "common.h"

namespace llmops {
namespace {

constexpr const char* kName = "llmops.merge_attention";

// Leading sizes of out [..., D], and the checks that out and lse [...] agree.
std::vector<int64_t> rows_of(const Tensor& out, const Tensor& lse) {
  LLMOPS_CHECK(out.dim() >= 1 && lse.scalar_type() == ScalarType::Float, kName,
               ": out must be [..., D] and lse float32");
  std::vector<int64_t> sizes = shape_of(out);
  sizes.pop_back();
  LLMOPS_CHECK(shape_of(lse) == sizes, kName,
               ": lse must have out's shape less the last dimension");
  return sizes;
}

const char* data(const Tensor& t) { return static_cast<const char*>(t.data_ptr()); }

std::tuple<Tensor, Tensor> merge_attention_fwd_cpu(const Tensor& out_a, const Tensor& lse_a,
                                                   const Tensor& out_b, const Tensor& lse_b) {
  const std::vector<int64_t> sizes = rows_of(out_a, lse_a);
  LLMOPS_CHECK(shape_of(out_b) == shape_of(out_a) && out_b.scalar_type() == out_a.scalar_type() &&
                   rows_of(out_b, lse_b) == sizes,
               kName, ": both parts must agree in shape and dtype");
  const Tensor a = last_dim_dense(out_a), b = last_dim_dense(out_b);
  const cpu::DType type = kernel_dtype(a.scalar_type(), kName);
  Tensor out = new_output(a, shape_of(a));
  Tensor lse = new_output(a, sizes, ScalarType::Float);
  if (lse.numel() == 0) return {out, lse};
  const RowIndex index(sizes, {leading_strides(a), leading_strides(b), leading_strides(lse_a, 0),
                               leading_strides(lse_b, 0)});
  const int64_t n = a.size(-1), size = element_size(a.scalar_type());
  const char *a_data = data(a), *b_data = data(b);
  const auto* la = static_cast<const float*>(lse_a.data_ptr());
  const auto* lb = static_cast<const float*>(lse_b.data_ptr());
  auto* out_data = static_cast<char*>(out.data_ptr());
  auto* lse_data = static_cast<float*>(lse.data_ptr());
  const auto kernel = LLMOPS_CPU_CALL(merge_attention_fwd_row);
  parallel_rows(index.rows(), n, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      kernel(type, n, a_data + index.offset(0, r) * size, la[index.offset(2, r)],
             b_data + index.offset(1, r) * size, lb[index.offset(3, r)], out_data + r * n * size,
             lse_data + r);
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> merge_attention_bwd_cpu(
    const Tensor& grad_out, const Tensor& grad_lse, const Tensor& out_a, const Tensor& lse_a,
    const Tensor& out_b, const Tensor& lse_b) {
  const std::vector<int64_t> sizes = rows_of(out_a, lse_a);
  LLMOPS_CHECK(shape_of(out_b) == shape_of(out_a) && out_b.scalar_type() == out_a.scalar_type() &&
                   rows_of(out_b, lse_b) == sizes && shape_of(grad_out) == shape_of(out_a) &&
                   grad_out.scalar_type() == out_a.scalar_type() &&
                   rows_of(grad_out, grad_lse) == sizes,
               kName, ": both parts and the gradients must agree in shape and dtype");
  const Tensor a = last_dim_dense(out_a), b = last_dim_dense(out_b), g = last_dim_dense(grad_out);
  const cpu::DType type = kernel_dtype(a.scalar_type(), kName);
  Tensor da = new_output(a, shape_of(a)), db = new_output(a, shape_of(a));
  Tensor dla = new_output(a, sizes, ScalarType::Float);
  Tensor dlb = new_output(a, sizes, ScalarType::Float);
  if (dla.numel() == 0) return {da, dla, db, dlb};
  const RowIndex index(
      sizes, {leading_strides(a), leading_strides(b), leading_strides(g), leading_strides(lse_a, 0),
              leading_strides(lse_b, 0), leading_strides(grad_lse, 0)});
  const int64_t n = a.size(-1), size = element_size(a.scalar_type());
  const char *a_data = data(a), *b_data = data(b), *g_data = data(g);
  const auto* la = static_cast<const float*>(lse_a.data_ptr());
  const auto* lb = static_cast<const float*>(lse_b.data_ptr());
  const auto* gl = static_cast<const float*>(grad_lse.data_ptr());
  auto* da_data = static_cast<char*>(da.data_ptr());
  auto* db_data = static_cast<char*>(db.data_ptr());
  auto* dla_data = static_cast<float*>(dla.data_ptr());
  auto* dlb_data = static_cast<float*>(dlb.data_ptr());
  const auto kernel = LLMOPS_CPU_CALL(merge_attention_bwd_row);
  parallel_rows(index.rows(), n, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      kernel(type, n, a_data + index.offset(0, r) * size, la[index.offset(3, r)],
             b_data + index.offset(1, r) * size, lb[index.offset(4, r)],
             g_data + index.offset(2, r) * size, gl[index.offset(5, r)], da_data + r * n * size,
             dla_data + r, db_data + r * n * size, dlb_data + r);
  });
  return {da, dla, db, dlb};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(llmops_cpu, m) {
  m.def(
      "merge_attention_fwd(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> "
      "(Tensor, Tensor)");
  m.def(
      "merge_attention_bwd(Tensor grad_out, Tensor grad_lse, Tensor out_a, Tensor lse_a, "
      "Tensor out_b, Tensor lse_b) -> (Tensor, Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(llmops_cpu, CPU, m) {
  m.impl("merge_attention_fwd", TORCH_BOX(&merge_attention_fwd_cpu));
  m.impl("merge_attention_bwd", TORCH_BOX(&merge_attention_bwd_cpu));
}

}  // namespace llmops
