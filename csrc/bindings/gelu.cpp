// gelu: forward and backward as raw operators. llmops.ops.gelu owns the public schema, the checks
// and autograd; what is checked here keeps memory safe whoever calls.
#include "cpu/gelu.h"

#include "elementwise.h"
#include "schemas.h"

namespace llmops {
namespace {

Tensor gelu_cpu(const Tensor& x_in, bool tanh) {
  const cpu::DType type = kernel_dtype(x_in.scalar_type(), "llmops.gelu");
  const auto kind = tanh ? cpu::Activation::gelu_tanh : cpu::Activation::gelu;
  const int64_t size = element_size(x_in.scalar_type()), total = x_in.numel();
  const bool stream = past_caches(total * size);
  const auto kernel = LLMOPS_CPU_CALL(gelu_fwd);
  if (x_in.is_contiguous()) {
    // The short way for a call of a few microseconds: no strides to look at.
    Tensor y = new_output_like(x_in, x_in.scalar_type());
    const auto* from = static_cast<const char*>(x_in.data_ptr());
    auto* to = static_cast<char*>(y.data_ptr());
    for_flat_runs(total, [&](int64_t n, int64_t at) {
      kernel(kind, type, n, from + at * size, to + at * size, stream);
    });
    return y;
  }
  const Tensor x = last_dim_dense(x_in);
  const std::vector<int64_t> sizes = shape_of(x);
  Tensor y = new_output(x, sizes);
  const auto* from = static_cast<const char*>(x.data_ptr());
  auto* to = static_cast<char*>(y.data_ptr());
  for_runs(sizes, {strides_of(x), strides_of(y)}, [&](int64_t n, const int64_t* at) {
    kernel(kind, type, n, from + at[0] * size, to + at[1] * size, stream);
  });
  return y;
}

Tensor gelu_bwd_cpu(const Tensor& grad_in, const Tensor& x_in, bool tanh) {
  LLMOPS_CHECK(shape_of(grad_in) == shape_of(x_in) && grad_in.scalar_type() == x_in.scalar_type(),
               "llmops.gelu_bwd: grad and x must agree in shape and dtype");
  const Tensor grad = last_dim_dense(grad_in), x = last_dim_dense(x_in);
  const cpu::DType type = kernel_dtype(x.scalar_type(), "llmops.gelu_bwd");
  const std::vector<int64_t> sizes = shape_of(x);
  Tensor dx = new_output(x, sizes);
  const int64_t size = element_size(x.scalar_type());
  const auto kind = tanh ? cpu::Activation::gelu_tanh : cpu::Activation::gelu;
  const auto *grad_data = static_cast<const char*>(grad.data_ptr()),
             *from = static_cast<const char*>(x.data_ptr());
  auto* to = static_cast<char*>(dx.data_ptr());
  const auto kernel = LLMOPS_CPU_CALL(gelu_bwd);
  for_runs(
      sizes, {strides_of(grad), strides_of(x), strides_of(dx)}, [&](int64_t n, const int64_t* at) {
        kernel(kind, type, n, grad_data + at[0] * size, from + at[1] * size, to + at[2] * size);
      });
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(llmops_cpu, m) { define(m, kGeluSchemas); }
STABLE_TORCH_LIBRARY_IMPL(llmops_cpu, CPU, m) {
  m.impl("gelu", TORCH_BOX(&gelu_cpu));
  m.impl("gelu_bwd", TORCH_BOX(&gelu_bwd_cpu));
}

}  // namespace llmops
