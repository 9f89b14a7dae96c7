// rms_norm and add_rms_norm: the CPU kernels as raw operators. llmops.ops.rms_norm owns the public
// schema, the checks and autograd; what is checked here keeps memory safe whoever calls.
#include "cpu/rms_norm.h"

#include "norm.h"
#include "schemas.h"

namespace llmops {
namespace {

NormKernels kernels() {
  return {"llmops.rms_norm", LLMOPS_CPU_CALL(rms_norm_fwd), LLMOPS_CPU_CALL(rms_norm_bwd)};
}

Tensor rms_norm_fwd_cpu(const Tensor& x, const std::optional<Tensor>& weight, double eps,
                        int64_t dims, double weight_offset) {
  const NormAffine affine{weight, std::nullopt, false, dims, eps, weight_offset};
  return std::get<0>(norm_forward(kernels(), x, std::nullopt, affine));
}

std::tuple<Tensor, Tensor> add_rms_norm_fwd_cpu(const Tensor& x, const Tensor& residual,
                                                const std::optional<Tensor>& weight, double eps,
                                                int64_t dims, double weight_offset) {
  const NormAffine affine{weight, std::nullopt, false, dims, eps, weight_offset};
  return norm_forward(kernels(), x, residual, affine);
}

std::tuple<Tensor, Tensor, Tensor> rms_norm_bwd_cpu(const Tensor& dy, const Tensor& h,
                                                    const std::optional<Tensor>& dh,
                                                    const std::optional<Tensor>& weight, double eps,
                                                    int64_t dims, double weight_offset, bool need_h,
                                                    bool need_x, bool need_weight) {
  const NormAffine affine{weight, std::nullopt, false, dims, eps, weight_offset};
  NormGradients g = norm_backward(kernels(), dy, h, dh, affine, need_h, need_x, need_weight);
  return {g.dh, g.dx, g.dweight};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(llmops_cpu, m) { define(m, kRmsNormSchemas); }
STABLE_TORCH_LIBRARY_IMPL(llmops_cpu, CPU, m) {
  m.impl("rms_norm_fwd", TORCH_BOX(&rms_norm_fwd_cpu));
  m.impl("add_rms_norm_fwd", TORCH_BOX(&add_rms_norm_fwd_cpu));
  m.impl("rms_norm_bwd", TORCH_BOX(&rms_norm_bwd_cpu));
}

}  // namespace llmops
