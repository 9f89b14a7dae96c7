// gelu: the CUDA kernels as raw operators, with the signatures of the CPU's.
#include "activation.h"

namespace llmops {
namespace {

Tensor gelu_cuda(const Tensor& x, bool tanh) {
  Launcher launcher(x, "llmops.gelu");
  Tensor y = new_output(x, shape_of(x));
  if (y.numel() == 0) return y;
  ActivationRows rows(launcher, shape_of(x), x.is_contiguous());
  cuda::ActivationForward p{};
  p.rows = rows.rows;
  p.n = rows.n;
  p.gate = rows.of(x);
  p.up = Launcher::none();
  p.y = rows.of(y);
  p.activation = tanh ? cuda::kGeluTanh : cuda::kGelu;
  p.wide = p.gate.wide(p.n) && p.y.wide(p.n);
  launcher.check(cuda::activation_fwd(p, launcher.stream()));
  return y;
}

Tensor gelu_bwd_cuda(const Tensor& grad, const Tensor& x, bool tanh) {
  Launcher launcher(x, "llmops.gelu_bwd");
  LLMOPS_CHECK(same_shape(grad, x), launcher.name(), ": grad and x must agree in shape");
  Tensor dx = new_output(x, shape_of(x));
  if (dx.numel() == 0) return dx;
  ActivationRows rows(launcher, shape_of(x), x.is_contiguous() && grad.is_contiguous());
  cuda::ActivationBackward p{};
  p.rows = rows.rows;
  p.n = rows.n;
  p.dy = rows.of(grad);
  p.gate = rows.of(x);
  p.up = p.dup = Launcher::none();
  p.dgate = rows.of(dx);
  p.activation = tanh ? cuda::kGeluTanh : cuda::kGelu;
  p.wide = p.dy.wide(p.n) && p.gate.wide(p.n) && p.dgate.wide(p.n);
  launcher.check(cuda::activation_bwd(p, launcher.stream()));
  return dx;
}

}  // namespace

LLMOPS_CUDA_SCHEMAS(m) { define(m, kGeluSchemas); }
LLMOPS_CUDA_KERNELS(m) {
  m.impl("gelu", TORCH_BOX(&gelu_cuda));
  m.impl("gelu_bwd", TORCH_BOX(&gelu_bwd_cuda));
}

}  // namespace llmops
