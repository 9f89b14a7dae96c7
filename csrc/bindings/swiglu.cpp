// swiglu and geglu: forward and backward as raw operators, of two tensors or of one fused
// projection. llmops.ops.swiglu owns the public schema, the checks and autograd; what is checked
// here keeps memory safe whoever calls.
#include "cpu/swiglu.h"

#include "elementwise.h"
#include "schemas.h"

namespace llmops {
namespace {

using cpu::Activation;

// gate and up, or the two halves of the last dimension where up is not given.
struct Operands {
  Tensor gate, up;
  std::vector<int64_t> sizes, gate_strides, up_strides;
  const char *gate_data, *up_data;
  cpu::DType type;
  int64_t size;

  Operands(const Tensor& gate_in, const std::optional<Tensor>& up_in, const char* name)
      : gate(last_dim_dense(gate_in)),
        up(up_in.has_value() ? last_dim_dense(*up_in) : gate),
        sizes(shape_of(gate)),
        gate_strides(strides_of(gate)),
        up_strides(strides_of(up)),
        gate_data(static_cast<const char*>(gate.data_ptr())),
        up_data(static_cast<const char*>(up.data_ptr())),
        type(kernel_dtype(gate.scalar_type(), name)),
        size(element_size(gate.scalar_type())) {
    if (up_in.has_value()) {
      LLMOPS_CHECK(sizes == shape_of(up) && gate.scalar_type() == up.scalar_type(), name,
                   ": gate and up must agree in shape and dtype");
    } else {
      LLMOPS_CHECK(!sizes.empty() && sizes.back() % 2 == 0, name,
                   ": a fused projection needs an even last dimension");
      sizes.back() /= 2;
      up_data += sizes.back() * size;
    }
  }
};

Tensor glu(const Tensor& gate, const std::optional<Tensor>& up, Activation kind, const char* name) {
  if (up.has_value() && gate.is_contiguous() && up->is_contiguous()) {
    // The short way for a call of a few microseconds: no strides to look at.
    const cpu::DType type = kernel_dtype(gate.scalar_type(), name);
    LLMOPS_CHECK(same_shape(gate, *up) && gate.scalar_type() == up->scalar_type(), name,
                 ": gate and up must agree in shape and dtype");
    Tensor y = new_output_like(gate, gate.scalar_type());
    const int64_t size = element_size(gate.scalar_type()), total = gate.numel();
    const auto *gate_data = static_cast<const char*>(gate.data_ptr()),
               *up_data = static_cast<const char*>(up->data_ptr());
    auto* to = static_cast<char*>(y.data_ptr());
    const bool stream = past_caches(total * size);
    const auto kernel = LLMOPS_CPU_CALL(glu_fwd);
    for_flat_runs(total, [&](int64_t n, int64_t at) {
      kernel(kind, type, n, gate_data + at * size, up_data + at * size, to + at * size, stream);
    });
    return y;
  }
  const Operands in(gate, up, name);
  Tensor y = new_output(in.gate, in.sizes);
  auto* to = static_cast<char*>(y.data_ptr());
  const bool stream = past_caches(y.numel() * in.size);
  const auto kernel = LLMOPS_CPU_CALL(glu_fwd);
  for_runs(in.sizes, {in.gate_strides, in.up_strides, strides_of(y)},
           [&](int64_t n, const int64_t* at) {
             kernel(kind, in.type, n, in.gate_data + at[0] * in.size, in.up_data + at[1] * in.size,
                    to + at[2] * in.size, stream);
           });
  return y;
}

// dgate and dup are fresh; in the fused form they are the halves of one tensor.
void glu_gradients(const Tensor& grad_in, const Operands& in, Activation kind, const Tensor& dgate,
                   const Tensor& dup, bool fused, const char* name) {
  LLMOPS_CHECK(shape_of(grad_in) == in.sizes && grad_in.scalar_type() == in.gate.scalar_type(),
               name, ": grad must have the shape and dtype of the result");
  const Tensor grad = last_dim_dense(grad_in);
  const auto* grad_data = static_cast<const char*>(grad.data_ptr());
  auto* gate_out = static_cast<char*>(dgate.data_ptr());
  auto* up_out = static_cast<char*>(dup.data_ptr()) + (fused ? in.sizes.back() * in.size : 0);
  const auto kernel = LLMOPS_CPU_CALL(glu_bwd);
  for_runs(in.sizes,
           {strides_of(grad), in.gate_strides, in.up_strides, strides_of(dgate), strides_of(dup)},
           [&](int64_t n, const int64_t* at) {
             kernel(kind, in.type, n, grad_data + at[0] * in.size, in.gate_data + at[1] * in.size,
                    in.up_data + at[2] * in.size, gate_out + at[3] * in.size,
                    up_out + at[4] * in.size);
           });
}

Activation activation(int64_t code, const char* name) {
  LLMOPS_CHECK(code >= 0 && code <= 2, name, ": no activation has code ", code);
  return static_cast<Activation>(code);
}

Tensor swiglu_cpu(const Tensor& gate, const std::optional<Tensor>& up) {
  return glu(gate, up, Activation::silu, "llmops.swiglu");
}

Tensor geglu_cpu(const Tensor& gate, const std::optional<Tensor>& up, bool tanh) {
  return glu(gate, up, tanh ? Activation::gelu_tanh : Activation::gelu, "llmops.geglu");
}

std::tuple<Tensor, Tensor> glu_bwd_cpu(const Tensor& grad, const Tensor& gate, const Tensor& up,
                                       int64_t code) {
  const char* name = "llmops.glu_bwd";
  const Operands in(gate, up, name);
  Tensor dgate = new_output(in.gate, in.sizes), dup = new_output(in.gate, in.sizes);
  glu_gradients(grad, in, activation(code, name), dgate, dup, false, name);
  return {dgate, dup};
}

Tensor glu_bwd_fused_cpu(const Tensor& grad, const Tensor& x, int64_t code) {
  const char* name = "llmops.glu_bwd_fused";
  const Operands in(x, std::nullopt, name);
  Tensor dx = new_output(in.gate, shape_of(in.gate));
  glu_gradients(grad, in, activation(code, name), dx, dx, true, name);
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(llmops_cpu, m) { define(m, kSwigluSchemas); }
STABLE_TORCH_LIBRARY_IMPL(llmops_cpu, CPU, m) {
  m.impl("swiglu", TORCH_BOX(&swiglu_cpu));
  m.impl("geglu", TORCH_BOX(&geglu_cpu));
  m.impl("glu_bwd", TORCH_BOX(&glu_bwd_cpu));
  m.impl("glu_bwd_fused", TORCH_BOX(&glu_bwd_fused_cpu));
}

}  // namespace llmops
