// cross_entropy: the CUDA kernels as raw operators, with the signatures of the CPU's. A class
// dimension that is not dense is copied.
#include "cuda/cross_entropy.h"

#include <tuple>

#include "common.h"

namespace llmops {
namespace {

// What both passes are given; lse is set by the caller.
struct CudaLoss {
  Launcher launcher;
  Tensor target;
  cuda::CrossEntropy p{};

  CudaLoss(const char* name, const Tensor& x, const Tensor& target_in,
           const std::optional<Tensor>& weight, int64_t ignore_index, double smoothing,
           double z_loss, int64_t reduction)
      : launcher(x, name), target(torch::stable::contiguous(target_in)) {
    std::vector<int64_t> rows = shape_of(x);
    LLMOPS_CHECK(!rows.empty(), name, ": input must be [..., C]");
    p.n = rows.back();
    rows.pop_back();
    LLMOPS_CHECK(shape_of(target) == rows, name, ": target must have input's leading shape");
    LLMOPS_CHECK(
        target.scalar_type() == ScalarType::Long || target.scalar_type() == ScalarType::Int, name,
        ": target must be int64 or int32");
    LLMOPS_CHECK(reduction >= 0 && reduction <= 2, name, ": reduction must be 0, 1 or 2");
    kernel_dtype(x.scalar_type(), name);
    p.rows = target.numel();
    p.target = launcher.data(target);
    p.target_64 = target.scalar_type() == ScalarType::Long;
    p.ignore_index = ignore_index;
    p.smoothing = smoothing;
    p.uniform = p.n > 0 ? smoothing / static_cast<double>(p.n) : 0.0;
    p.z_loss = z_loss;
    p.reduction = static_cast<int>(reduction);
    if (weight.has_value()) {
      LLMOPS_CHECK(weight->dim() == 1 && weight->size(0) == p.n &&
                       weight->scalar_type() == ScalarType::Float && weight->is_contiguous(),
                   name, ": weight must be float32 [C], contiguous");
      p.weight = static_cast<const float*>(launcher.data(*weight));
    }
    p.x = launcher.rows(x);
    p.wide = p.x.wide(p.n);
  }
  bool rowwise() const { return p.reduction == cuda::kNone; }
  // One number of each row, or one, as a row of its own.
  Rows flat(const Tensor& t) {
    const int type = static_cast<int>(kernel_dtype(t.scalar_type(), launcher.name()));
    return {launcher.data(t), type};
  }
};

std::tuple<Tensor, Tensor> cross_entropy_fwd_cuda(const Tensor& x, const Tensor& target,
                                                  const std::optional<Tensor>& weight,
                                                  int64_t ignore_index, double smoothing,
                                                  double z_loss, int64_t reduction,
                                                  std::optional<ScalarType> dtype) {
  CudaLoss loss("llmops.cross_entropy", x, target, weight, ignore_index, smoothing, z_loss,
                reduction);
  const std::vector<int64_t> shape = shape_of(target);
  Tensor out = new_output(x, loss.rowwise() ? shape : std::vector<int64_t>{},
                          dtype.value_or(x.scalar_type()));
  Tensor lse = new_output(x, shape, ScalarType::Double);
  std::optional<Tensor> losses;
  loss.p.lse = static_cast<double*>(loss.launcher.data(lse));
  cuda::CrossEntropyForward p{};
  if (!loss.rowwise()) {
    losses = new_output(x, shape, ScalarType::Double);
    p.losses = static_cast<double*>(loss.launcher.data(*losses));
  }
  p.of = loss.p;
  p.loss = loss.flat(out);
  loss.launcher.check(cuda::cross_entropy_fwd(p, loss.launcher.stream()));
  return {out, lse};
}

void backward(CudaLoss& loss, const Tensor& grad_in, const std::optional<Tensor>& grad_lse_in,
              const Tensor& lse_in, const Tensor& dx) {
  const char* name = loss.launcher.name();
  const Tensor grad = torch::stable::contiguous(grad_in), lse = torch::stable::contiguous(lse_in);
  LLMOPS_CHECK(grad.numel() == (loss.rowwise() ? loss.p.rows : 1) && lse.numel() == loss.p.rows &&
                   lse.scalar_type() == ScalarType::Double,
               name, ": grad must be of the loss's shape, lse float64 per row");
  if (dx.numel() == 0) return;
  cuda::CrossEntropyBackward p{};
  std::optional<Tensor> grad_lse;
  if (grad_lse_in.has_value()) {
    grad_lse = torch::stable::contiguous(*grad_lse_in);
    LLMOPS_CHECK(grad_lse->numel() == loss.p.rows && grad_lse->scalar_type() == ScalarType::Double,
                 name, ": grad_lse must be as lse");
    p.grad_lse = static_cast<const double*>(loss.launcher.data(*grad_lse));
  }
  const Tensor scales = new_output(dx, {3}, ScalarType::Double);
  loss.p.lse = static_cast<double*>(loss.launcher.data(lse));
  p.of = loss.p;
  p.grad = loss.flat(grad);
  p.scales = static_cast<double*>(loss.launcher.data(scales));
  p.dx = loss.launcher.rows(dx);
  p.of.wide = loss.p.wide && p.dx.wide(loss.p.n);
  loss.launcher.check(cuda::cross_entropy_bwd(p, loss.launcher.stream()));
}

Tensor cross_entropy_bwd_cuda(const Tensor& grad, const std::optional<Tensor>& grad_lse,
                              const Tensor& x, const Tensor& target,
                              const std::optional<Tensor>& weight, const Tensor& lse,
                              int64_t ignore_index, double smoothing, double z_loss,
                              int64_t reduction) {
  CudaLoss loss("llmops.cross_entropy_bwd", x, target, weight, ignore_index, smoothing, z_loss,
                reduction);
  Tensor dx = new_output(x, shape_of(x));
  backward(loss, grad, grad_lse, lse, dx);
  return dx;
}

// The same over x itself. Not for autograd: for a caller whose own logits x are.
void cross_entropy_bwd_in_place_cuda(const Tensor& grad, Tensor x, const Tensor& target,
                                     const std::optional<Tensor>& weight, const Tensor& lse,
                                     int64_t ignore_index, double smoothing, double z_loss,
                                     int64_t reduction, const std::optional<Tensor>& grad_lse) {
  LLMOPS_CHECK(x.is_contiguous(), "llmops.cross_entropy_bwd_: x must be contiguous");
  CudaLoss loss("llmops.cross_entropy_bwd_", x, target, weight, ignore_index, smoothing, z_loss,
                reduction);
  backward(loss, grad, grad_lse, lse, x);
}

}  // namespace

LLMOPS_CUDA_SCHEMAS(m) { define(m, kCrossEntropySchemas); }
LLMOPS_CUDA_KERNELS(m) {
  m.impl("cross_entropy_fwd", TORCH_BOX(&cross_entropy_fwd_cuda));
  m.impl("cross_entropy_bwd", TORCH_BOX(&cross_entropy_bwd_cuda));
  m.impl("cross_entropy_bwd_", TORCH_BOX(&cross_entropy_bwd_in_place_cuda));
}

}  // namespace llmops
