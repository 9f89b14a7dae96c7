// layer_norm and add_layer_norm: the CPU kernels as raw operators. llmops.ops.layer_norm owns the
// public schema, the checks and autograd; what is checked here keeps memory safe whoever calls.
#include "cpu/layer_norm.h"

#include "norm.h"
#include "schemas.h"

namespace llmops {
namespace {

NormKernels kernels() {
  return {"llmops.layer_norm", LLMOPS_CPU_CALL(layer_norm_fwd), LLMOPS_CPU_CALL(layer_norm_bwd)};
}

Tensor layer_norm_fwd_cpu(const Tensor& x, const std::optional<Tensor>& weight,
                          const std::optional<Tensor>& bias, double eps, int64_t dims) {
  const NormAffine affine{weight, bias, true, dims, eps, 0.0};
  return std::get<0>(norm_forward(kernels(), x, std::nullopt, affine));
}

// The usual call, without defaults that the dispatcher looks up and converts.
Tensor layer_norm_plain_cpu(const Tensor& x, const std::optional<Tensor>& weight,
                            const std::optional<Tensor>& bias) {
  return layer_norm_fwd_cpu(x, weight, bias, 1e-5, 1);
}

std::tuple<Tensor, Tensor> add_layer_norm_fwd_cpu(const Tensor& x, const Tensor& residual,
                                                  const std::optional<Tensor>& weight,
                                                  const std::optional<Tensor>& bias, double eps,
                                                  int64_t dims) {
  const NormAffine affine{weight, bias, true, dims, eps, 0.0};
  return norm_forward(kernels(), x, residual, affine);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_bwd_cpu(const Tensor& dy, const Tensor& h,
                                                              const std::optional<Tensor>& dh,
                                                              const std::optional<Tensor>& weight,
                                                              const std::optional<Tensor>& bias,
                                                              double eps, int64_t dims, bool need_h,
                                                              bool need_x, bool need_params) {
  const NormAffine affine{weight, bias, true, dims, eps, 0.0};
  NormGradients g = norm_backward(kernels(), dy, h, dh, affine, need_h, need_x, need_params);
  return {g.dh, g.dx, g.dweight, g.dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(llmops_cpu, m) {
  define(m, kLayerNormSchemas);
  m.def("layer_norm_fwd.plain(Tensor x, Tensor? weight, Tensor? bias) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(llmops_cpu, CPU, m) {
  m.impl("layer_norm_fwd", TORCH_BOX(&layer_norm_fwd_cpu));
  m.impl("layer_norm_fwd.plain", TORCH_BOX(&layer_norm_plain_cpu));
  m.impl("add_layer_norm_fwd", TORCH_BOX(&add_layer_norm_fwd_cpu));
  m.impl("layer_norm_bwd", TORCH_BOX(&layer_norm_bwd_cpu));
}

}  // namespace llmops
