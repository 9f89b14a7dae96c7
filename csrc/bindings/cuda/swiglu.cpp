// swiglu and geglu, of two tensors or of one fused projection: the CUDA kernels as raw operators,
// with the signatures of the CPU's.
#include "activation.h"

namespace llmops {
namespace {

// The halves of x's last dimension, as views.
std::tuple<Tensor, Tensor> halves(const Tensor& x, const char* name) {
  LLMOPS_CHECK(x.dim() >= 1 && x.size(-1) % 2 == 0, name,
               ": a fused projection needs an even last dimension");
  const int64_t n = x.size(-1) / 2, last = x.dim() - 1;
  return {torch::stable::narrow(const_cast<Tensor&>(x), last, 0, n),
          torch::stable::narrow(const_cast<Tensor&>(x), last, n, n)};
}

void check_pair(const Tensor& gate, const Tensor& up, const char* name) {
  LLMOPS_CHECK(same_shape(gate, up) && gate.scalar_type() == up.scalar_type(), name,
               ": gate and up must agree in shape and dtype");
}

Tensor glu(const Tensor& gate_in, const std::optional<Tensor>& up_in, int activation,
           const char* name) {
  Launcher launcher(gate_in, name);
  const auto [gate, up] =
      up_in.has_value() ? std::make_tuple(gate_in, *up_in) : halves(gate_in, name);
  check_pair(gate, up, name);
  Tensor y = new_output(gate, shape_of(gate));
  if (y.numel() == 0) return y;
  ActivationRows rows(launcher, shape_of(gate), gate.is_contiguous() && up.is_contiguous());
  cuda::ActivationForward p{};
  p.rows = rows.rows;
  p.n = rows.n;
  p.gate = rows.of(gate);
  p.up = rows.of(up);
  p.y = rows.of(y);
  p.activation = activation;
  p.wide = p.gate.wide(p.n) && p.up.wide(p.n) && p.y.wide(p.n);
  launcher.check(cuda::activation_fwd(p, launcher.stream()));
  return y;
}

// Into dgate and dup.
void glu_gradients(const Tensor& grad, const Tensor& gate, const Tensor& up, const Tensor& dgate,
                   const Tensor& dup, int64_t code, const char* name) {
  Launcher launcher(gate, name);
  check_pair(gate, up, name);
  LLMOPS_CHECK(same_shape(grad, gate), name, ": grad must have the shape of the result");
  const int activation = activation_code(code, name);
  if (gate.numel() == 0) return;
  const bool flat = grad.is_contiguous() && gate.is_contiguous() && up.is_contiguous() &&
                    dgate.is_contiguous() && dup.is_contiguous();
  ActivationRows rows(launcher, shape_of(gate), flat);
  cuda::ActivationBackward p{};
  p.rows = rows.rows;
  p.n = rows.n;
  p.dy = rows.of(grad);
  p.gate = rows.of(gate);
  p.up = rows.of(up);
  p.dgate = rows.of(dgate);
  p.dup = rows.of(dup);
  p.activation = activation;
  p.wide =
      p.dy.wide(p.n) && p.gate.wide(p.n) && p.up.wide(p.n) && p.dgate.wide(p.n) && p.dup.wide(p.n);
  launcher.check(cuda::activation_bwd(p, launcher.stream()));
}

Tensor swiglu_cuda(const Tensor& gate, const std::optional<Tensor>& up) {
  return glu(gate, up, cuda::kSilu, "llmops.swiglu");
}

Tensor geglu_cuda(const Tensor& gate, const std::optional<Tensor>& up, bool tanh) {
  return glu(gate, up, tanh ? cuda::kGeluTanh : cuda::kGelu, "llmops.geglu");
}

std::tuple<Tensor, Tensor> glu_bwd_cuda(const Tensor& grad, const Tensor& gate, const Tensor& up,
                                        int64_t code) {
  Tensor dgate = new_output(gate, shape_of(gate)), dup = new_output(up, shape_of(up));
  glu_gradients(grad, gate, up, dgate, dup, code, "llmops.glu_bwd");
  return {dgate, dup};
}

Tensor glu_bwd_fused_cuda(const Tensor& grad, const Tensor& x, int64_t code) {
  const char* name = "llmops.glu_bwd_fused";
  Tensor dx = new_output(x, shape_of(x));
  const auto [gate, up] = halves(x, name);
  const auto [dgate, dup] = halves(dx, name);
  glu_gradients(grad, gate, up, dgate, dup, code, name);
  return dx;
}

}  // namespace

LLMOPS_CUDA_SCHEMAS(m) { define(m, kSwigluSchemas); }
LLMOPS_CUDA_KERNELS(m) {
  m.impl("swiglu", TORCH_BOX(&swiglu_cuda));
  m.impl("geglu", TORCH_BOX(&geglu_cuda));
  m.impl("glu_bwd", TORCH_BOX(&glu_bwd_cuda));
  m.impl("glu_bwd_fused", TORCH_BOX(&glu_bwd_fused_cuda));
}

}  // namespace llmops
