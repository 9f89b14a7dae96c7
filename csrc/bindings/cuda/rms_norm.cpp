// rms_norm and add_rms_norm: the CUDA kernels as raw operators, with the signatures of the CPU's.
#include "norm.h"

namespace llmops {
namespace {

using Parameter = std::optional<Tensor>;
const Parameter no_bias;

CudaNorm rms_norm_of(const Parameter& weight, double eps, int64_t dims, double offset) {
  return {"llmops.rms_norm", false, weight, no_bias, dims, eps, offset};
}

Tensor rms_norm_fwd_cuda(const Tensor& x, const Parameter& weight, double eps, int64_t dims,
                         double weight_offset) {
  return std::get<0>(
      norm_forward_cuda(rms_norm_of(weight, eps, dims, weight_offset), x, std::nullopt));
}

std::tuple<Tensor, Tensor> add_rms_norm_fwd_cuda(const Tensor& x, const Tensor& residual,
                                                 const Parameter& weight, double eps, int64_t dims,
                                                 double weight_offset) {
  return norm_forward_cuda(rms_norm_of(weight, eps, dims, weight_offset), x, residual);
}

std::tuple<Tensor, Tensor, Tensor> rms_norm_bwd_cuda(const Tensor& dy, const Tensor& h,
                                                     const Parameter& dh, const Parameter& weight,
                                                     double eps, int64_t dims, double weight_offset,
                                                     bool need_h, bool need_x, bool need_weight) {
  const auto [own, x, w, b] = norm_backward_cuda(rms_norm_of(weight, eps, dims, weight_offset), dy,
                                                 h, dh, need_h, need_x, need_weight);
  return {own, x, w};
}

}  // namespace

LLMOPS_CUDA_SCHEMAS(m) { define(m, kRmsNormSchemas); }
LLMOPS_CUDA_KERNELS(m) {
  m.impl("rms_norm_fwd", TORCH_BOX(&rms_norm_fwd_cuda));
  m.impl("add_rms_norm_fwd", TORCH_BOX(&add_rms_norm_fwd_cuda));
  m.impl("rms_norm_bwd", TORCH_BOX(&rms_norm_bwd_cuda));
}

}  // namespace llmops
