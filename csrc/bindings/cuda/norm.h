// What the CUDA bindings of rms_norm and layer_norm share; norm.cpp has it.
#pragma once
#include <tuple>

#include "common.h"

namespace llmops {

struct CudaNorm {
  const char* name;  // for errors
  bool centered;
  const std::optional<Tensor>& weight;
  const std::optional<Tensor>& bias;
  int64_t dims;
  double eps, weight_offset;
};

// (y, h); without a residual h is x itself.
std::tuple<Tensor, Tensor> norm_forward_cuda(const CudaNorm& norm, const Tensor& x,
                                             const std::optional<Tensor>& residual);

// dh, dx (dh in dy's dtype), dweight, dbias; of no elements where not needed.
std::tuple<Tensor, Tensor, Tensor, Tensor> norm_backward_cuda(const CudaNorm& norm,
                                                              const Tensor& dy, const Tensor& h,
                                                              const std::optional<Tensor>& dh_in,
                                                              bool need_h, bool need_x,
                                                              bool need_params);

}  // namespace llmops
