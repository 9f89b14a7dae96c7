// What the bindings of rms_norm and layer_norm share; norm.cpp has it.
#pragma once
#include <tuple>

#include "common.h"
#include "cpu/norm.h"

namespace llmops {

struct NormKernels {
  const char* name;  // for errors
  void (*forward)(const cpu::NormParams&, const cpu::NormForwardRows&);
  void (*backward)(const cpu::NormParams&, const cpu::NormBackwardRows&);
};

// The parameters, each over the last `dims` dimensions of x.
struct NormAffine {
  const std::optional<Tensor>& weight;
  const std::optional<Tensor>& bias;
  bool centered;  // layer_norm: has a bias slot even when there is no bias
  int64_t dims;
  double eps;
  double weight_offset;
};

// (y, h); without a residual h is x itself.
std::tuple<Tensor, Tensor> norm_forward(const NormKernels& kernels, const Tensor& x,
                                        const std::optional<Tensor>& residual,
                                        const NormAffine& affine);

struct NormGradients {
  Tensor dh;       // in h's dtype
  Tensor dx;       // dh in dy's dtype, where that differs and was asked for
  Tensor dweight;  // in the weight's dtype, its shape
  Tensor dbias;
};

// What is not needed comes back as a tensor of no elements.
NormGradients norm_backward(const NormKernels& kernels, const Tensor& dy, const Tensor& h,
                            const std::optional<Tensor>& dh_in, const NormAffine& affine,
                            bool need_h, bool need_x, bool need_params);

}  // namespace llmops
