// layer_norm and add_layer_norm: the CUDA kernels as raw operators, with the signatures of the
// CPU's.
#include "norm.h"

namespace llmops {
namespace {

using Parameter = std::optional<Tensor>;

CudaNorm layer_norm_of(const Parameter& weight, const Parameter& bias, double eps, int64_t dims) {
  return {"llmops.layer_norm", true, weight, bias, dims, eps, 0.0};
}

Tensor layer_norm_fwd_cuda(const Tensor& x, const Parameter& weight, const Parameter& bias,
                           double eps, int64_t dims) {
  return std::get<0>(norm_forward_cuda(layer_norm_of(weight, bias, eps, dims), x, std::nullopt));
}

std::tuple<Tensor, Tensor> add_layer_norm_fwd_cuda(const Tensor& x, const Tensor& residual,
                                                   const Parameter& weight, const Parameter& bias,
                                                   double eps, int64_t dims) {
  return norm_forward_cuda(layer_norm_of(weight, bias, eps, dims), x, residual);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_bwd_cuda(
    const Tensor& dy, const Tensor& h, const Parameter& dh, const Parameter& weight,
    const Parameter& bias, double eps, int64_t dims, bool need_h, bool need_x, bool need_params) {
  return norm_backward_cuda(layer_norm_of(weight, bias, eps, dims), dy, h, dh, need_h, need_x,
                            need_params);
}

}  // namespace

LLMOPS_CUDA_SCHEMAS(m) { define(m, kLayerNormSchemas); }
LLMOPS_CUDA_KERNELS(m) {
  m.impl("layer_norm_fwd", TORCH_BOX(&layer_norm_fwd_cuda));
  m.impl("add_layer_norm_fwd", TORCH_BOX(&add_layer_norm_fwd_cuda));
  m.impl("layer_norm_bwd", TORCH_BOX(&layer_norm_bwd_cuda));
}

}  // namespace llmops
