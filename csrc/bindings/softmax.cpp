// softmax: the CPU kernels as raw operators. llmops.ops.softmax owns the public schema, the checks
// and autograd; what is checked here keeps memory safe whoever calls.
#include "cpu/softmax.h"

#include <memory>

#include "common.h"
#include "schemas.h"

namespace llmops {
namespace {

using cpu::MaskKind;
using Strides = std::vector<std::vector<int64_t>>;

std::vector<int64_t> leading_sizes(const Tensor& x) {
  std::vector<int64_t> sizes = shape_of(x);
  sizes.pop_back();
  return sizes;
}

// mask: broadcastable to x from the right; its strides along x's dimensions, 0 where it broadcasts.
std::vector<int64_t> broadcast_strides(const Tensor& mask, const Tensor& x) {
  LLMOPS_CHECK(mask.dim() <= x.dim(), "llmops.softmax: mask has more dimensions than x");
  std::vector<int64_t> strides(x.dim(), 0);
  const int64_t shift = x.dim() - mask.dim();
  for (int64_t d = 0; d < mask.dim(); ++d) {
    if (mask.size(d) == 1) continue;
    LLMOPS_CHECK(mask.size(d) == x.size(d + shift), "llmops.softmax: mask size ", mask.size(d),
                 " in dimension ", d, " does not broadcast to ", x.size(d + shift));
    strides[d + shift] = mask.stride(d);
  }
  return strides;
}

// x [..., n] over its last dimension.
Tensor softmax_fwd_cpu(const Tensor& x_in, double scale, const std::optional<Tensor>& mask_in,
                       bool causal, std::optional<ScalarType> dtype) {
  LLMOPS_CHECK(x_in.dim() >= (causal ? 2 : 1), "llmops.softmax: x has ", x_in.dim(),
               " dimensions, too few");
  const Tensor x = last_dim_dense(x_in);
  cpu::SoftmaxParams p{};
  p.x_type = kernel_dtype(x.scalar_type(), "llmops.softmax");
  const ScalarType out_type = dtype.value_or(x.scalar_type());
  p.y_type = kernel_dtype(out_type, "llmops.softmax");
  p.n = x.size(-1);
  p.scale = static_cast<float>(scale);
  p.zero_if_empty = causal || mask_in.has_value();
  Tensor y = new_output_like(x, out_type);

  std::optional<Tensor> mask;
  const char* mask_data = nullptr;
  int64_t mask_size = 0;
  // None for contiguous rows, nor for a single one: its dozen small vectors would be a sixth of the
  // time of that.
  std::optional<RowIndex> index;
  const int64_t count = x.numel();
  const bool single = count == p.n;
  if (mask_in.has_value()) {
    mask = last_dim_dense(*mask_in);
    const bool boolean = mask->scalar_type() == ScalarType::Bool;
    p.mask_kind = boolean ? MaskKind::boolean : MaskKind::additive;
    if (!boolean) p.mask_type = kernel_dtype(mask->scalar_type(), "llmops.softmax: mask");
    std::vector<int64_t> mask_strides = broadcast_strides(*mask, x);
    p.mask_step = mask_strides.back() != 0;
    mask_strides.pop_back();
    if (!single)
      index.emplace(leading_sizes(x),
                    Strides{leading_strides(x), leading_strides(y), mask_strides});
    mask_data = static_cast<const char*>(mask->data_ptr());
    mask_size = element_size(mask->scalar_type());
  } else if (!single && !x.is_contiguous()) {
    index.emplace(leading_sizes(x), Strides{leading_strides(x), leading_strides(y)});
  }
  if (count == 0) return y;

  const int64_t queries = causal ? x.size(-2) : 1, n = p.n;
  const auto at = [&](size_t tensor, int64_t row) {
    return index ? index->offset(tensor, row) : row * n;
  };
  const auto* x_data = static_cast<const char*>(x.data_ptr());
  auto* y_data = static_cast<char*>(y.data_ptr());
  const int64_t x_size = element_size(x.scalar_type()), y_size = element_size(out_type);
  const auto kernel = LLMOPS_CPU_CALL(softmax_fwd_row);
  parallel_rows(count / n, n, [&](int64_t begin, int64_t end) {
    // fp32 results hold the intermediate exponentials themselves.
    const bool own = p.mask_kind != MaskKind::none || p.y_type != cpu::DType::f32;
    const std::unique_ptr<float[]> scratch(own ? new float[n] : nullptr);
    for (int64_t r = begin; r < end; ++r) {
      // Bottom-right alignment: the last query sees every key.
      int64_t valid = causal ? r % queries + 1 + n - queries : n;
      valid = valid < 0 ? 0 : valid;
      const cpu::SoftmaxRow row{
          x_data + at(0, r) * x_size,
          mask_data ? mask_data + at(2, r) * mask_size : nullptr,
          y_data + at(1, r) * y_size,
      };
      kernel(p, row, valid, scratch.get());
    }
  });
  return y;
}

// The call without options: four defaults that the dispatcher need not look up and convert.
Tensor softmax_plain_cpu(const Tensor& x) {
  return softmax_fwd_cpu(x, 1.0, std::nullopt, false, std::nullopt);
}

Tensor softmax_bwd_cpu(const Tensor& grad_in, const Tensor& y_in, double scale, ScalarType x_type) {
  LLMOPS_CHECK(shape_of(grad_in) == shape_of(y_in) && grad_in.scalar_type() == y_in.scalar_type() &&
                   y_in.dim() >= 1,
               "llmops.softmax_bwd: grad and y must agree in shape and dtype");
  const Tensor grad = last_dim_dense(grad_in), y = last_dim_dense(y_in);
  const cpu::DType y_type = kernel_dtype(y.scalar_type(), "llmops.softmax_bwd");
  const cpu::DType dx_type = kernel_dtype(x_type, "llmops.softmax_bwd");
  Tensor dx = new_output(y, shape_of(y), x_type);
  if (dx.numel() == 0) return dx;
  const int64_t n = y.size(-1);
  const RowIndex index(leading_sizes(y),
                       {leading_strides(y), leading_strides(grad), leading_strides(dx)});
  const auto* y_data = static_cast<const char*>(y.data_ptr());
  const auto* grad_data = static_cast<const char*>(grad.data_ptr());
  auto* dx_data = static_cast<char*>(dx.data_ptr());
  const int64_t y_size = element_size(y.scalar_type()), dx_size = element_size(x_type);
  const bool stream = past_caches(dx.numel() * (2 * y_size + dx_size));
  const auto kernel = LLMOPS_CPU_CALL(softmax_bwd_row);
  parallel_rows(index.rows(), n, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      kernel(y_type, dx_type, n, static_cast<float>(scale), stream,
             y_data + index.offset(0, r) * y_size, grad_data + index.offset(1, r) * y_size,
             dx_data + index.offset(2, r) * dx_size);
  });
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(llmops_cpu, m) {
  define(m, kSoftmaxSchemas);
  m.def("softmax_fwd.plain(Tensor x) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(llmops_cpu, CPU, m) {
  m.impl("softmax_fwd", TORCH_BOX(&softmax_fwd_cpu));
  m.impl("softmax_fwd.plain", TORCH_BOX(&softmax_plain_cpu));
  m.impl("softmax_bwd", TORCH_BOX(&softmax_bwd_cpu));
}

}  // namespace llmops
