// softmax: the CUDA kernels as raw operators. llmops.ops.softmax owns the public schema, the checks
// and autograd; what is checked here keeps memory safe whoever calls.
#include "cuda/softmax.h"

#include "common.h"

namespace llmops {
namespace {

// x [..., n] over its last dimension; y is contiguous.
Tensor softmax_fwd_cuda(const Tensor& x, double scale, const std::optional<Tensor>& mask,
                        bool causal, std::optional<ScalarType> dtype_in) {
  Launcher launcher(x, "llmops.softmax");
  LLMOPS_CHECK(x.dim() >= (causal ? 2 : 1), launcher.name(), ": x has ", x.dim(),
               " dimensions, too few");
  const ScalarType dtype = dtype_in.value_or(x.scalar_type());
  kernel_dtype(dtype, launcher.name());
  Tensor y = new_output(x, shape_of(x), dtype);
  if (y.numel() == 0) return y;
  cuda::SoftmaxForward p{};
  p.n = x.size(-1);
  p.rows = x.numel() / p.n;
  p.causal = causal;
  p.queries = cuda::Divisor(causal ? x.size(-2) : 1);
  p.scale = static_cast<float>(scale);
  p.x = launcher.rows(x);
  p.y = launcher.rows(y);
  p.mask = mask.has_value() ? launcher.broadcast_rows(*mask, x, "mask") : Launcher::none();
  p.wide = p.x.wide(p.n) && p.y.wide(p.n);
  launcher.check(cuda::softmax_fwd(p, launcher.stream()));
  return y;
}

Tensor softmax_bwd_cuda(const Tensor& grad, const Tensor& y, double scale, ScalarType x_type) {
  Launcher launcher(y, "llmops.softmax_bwd");
  LLMOPS_CHECK(shape_of(grad) == shape_of(y) && y.dim() >= 1, launcher.name(),
               ": grad and y must agree in shape");
  kernel_dtype(x_type, launcher.name());
  Tensor dx = new_output(y, shape_of(y), x_type);
  if (dx.numel() == 0) return dx;
  cuda::SoftmaxBackward p{};
  p.n = y.size(-1);
  p.rows = y.numel() / p.n;
  p.scale = static_cast<float>(scale);
  p.dy = launcher.rows(grad);
  p.y = launcher.rows(y);
  p.dx = launcher.rows(dx);
  p.wide = p.dy.wide(p.n) && p.y.wide(p.n) && p.dx.wide(p.n);
  launcher.check(cuda::softmax_bwd(p, launcher.stream()));
  return dx;
}

}  // namespace

LLMOPS_CUDA_SCHEMAS(m) { define(m, kSoftmaxSchemas); }
LLMOPS_CUDA_KERNELS(m) {
  m.impl("softmax_fwd", TORCH_BOX(&softmax_fwd_cuda));
  m.impl("softmax_bwd", TORCH_BOX(&softmax_bwd_cuda));
}

}  // namespace llmops
