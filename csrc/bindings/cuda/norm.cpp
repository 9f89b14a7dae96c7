#include "norm.h"

#include "cuda/norm.h"

namespace llmops {
namespace {

int64_t row_length(const CudaNorm& norm, const Tensor& x) {
  LLMOPS_CHECK(norm.dims >= 1 && norm.dims <= x.dim(), norm.name, ": ", norm.dims,
               " normalized dimensions do not fit an input of ", x.dim(), " dimensions");
  int64_t n = 1;
  for (int64_t d = x.dim() - norm.dims; d < x.dim(); ++d) n *= x.size(d);
  return n;
}

Rows parameter(Launcher& launcher, const CudaNorm& norm, const std::optional<Tensor>& t,
               const Tensor& x) {
  if (!t.has_value()) return Launcher::none();
  bool fits = t->dim() == norm.dims;
  for (int64_t d = 0; fits && d < norm.dims; ++d)
    fits = t->size(d) == x.size(x.dim() - norm.dims + d);
  LLMOPS_CHECK(fits, norm.name, ": weight and bias must have the shape of x's last ", norm.dims,
               " dimensions");
  return launcher.rows(*t, norm.dims);
}

}  // namespace

std::tuple<Tensor, Tensor> norm_forward_cuda(const CudaNorm& norm, const Tensor& x,
                                             const std::optional<Tensor>& residual) {
  Launcher launcher(x, norm.name);
  cuda::NormForward p{};
  p.n = row_length(norm, x);
  kernel_dtype(x.scalar_type(), norm.name);
  const std::vector<int64_t> shape = shape_of(x);
  Tensor y = new_output(x, shape), h = x;
  if (residual.has_value()) {
    LLMOPS_CHECK(same_shape(*residual, x), norm.name, ": residual must have the shape of x");
    // What torch gives x + residual.
    h = new_output(
        x, shape, residual->scalar_type() == x.scalar_type() ? x.scalar_type() : ScalarType::Float);
  }
  if (x.numel() == 0) return {y, h};
  p.rows = x.numel() / p.n;
  p.x = launcher.rows(x, norm.dims);
  p.y = launcher.rows(y, norm.dims);
  p.residual = p.h = Launcher::none();
  if (residual.has_value()) {
    p.residual = launcher.rows(*residual, norm.dims);
    p.h = launcher.rows(h, norm.dims);
  }
  p.weight = parameter(launcher, norm, norm.weight, x);
  p.bias = parameter(launcher, norm, norm.bias, x);
  p.eps = static_cast<float>(norm.eps);
  p.offset = static_cast<float>(norm.weight_offset);
  p.centered = norm.centered;
  p.wide = p.x.wide(p.n) && p.y.wide(p.n) && p.residual.wide(p.n) && p.h.wide(p.n) &&
           p.weight.wide(p.n) && p.bias.wide(p.n);
  launcher.check(cuda::norm_fwd(p, launcher.stream()));
  return {y, h};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_backward_cuda(const CudaNorm& norm,
                                                              const Tensor& dy, const Tensor& h,
                                                              const std::optional<Tensor>& dh_in,
                                                              bool need_h, bool need_x,
                                                              bool need_params) {
  Launcher launcher(h, norm.name);
  cuda::NormBackward p{};
  p.n = row_length(norm, h);
  LLMOPS_CHECK(same_shape(dy, h) && (!dh_in.has_value() || same_shape(*dh_in, h)), norm.name,
               ": dy and dh must have h's shape");
  const std::vector<int64_t> shape = shape_of(h), none = {0};
  const std::vector<int64_t> row_shape(shape.end() - norm.dims, shape.end());
  const auto type_of = [](const std::optional<Tensor>& t) {
    return t.has_value() ? t->scalar_type() : ScalarType::Float;
  };
  const bool need_bias = need_params && norm.centered;
  Tensor dh = new_output(h, need_h ? shape : none), dx = new_output(dy, need_x ? shape : none);
  Tensor dweight = new_output(h, need_params ? row_shape : none, type_of(norm.weight));
  Tensor dbias = new_output(h, need_bias ? row_shape : none, type_of(norm.bias));
  if (h.numel() == 0) {
    torch::stable::zero_(dweight);
    torch::stable::zero_(dbias);
    return {dh, dx, dweight, dbias};
  }
  p.rows = h.numel() / p.n;
  p.dy = launcher.rows(dy, norm.dims);
  p.h = launcher.rows(h, norm.dims);
  p.dh_in = dh_in.has_value() ? launcher.rows(*dh_in, norm.dims) : Launcher::none();
  p.dh = need_h ? launcher.rows(dh, norm.dims) : Launcher::none();
  p.dx = need_x ? launcher.rows(dx, norm.dims) : Launcher::none();
  p.weight = parameter(launcher, norm, norm.weight, h);
  p.dweight = need_params ? launcher.rows(dweight, norm.dims) : Launcher::none();
  p.dbias = need_bias ? launcher.rows(dbias, norm.dims) : Launcher::none();
  p.eps = static_cast<float>(norm.eps);
  p.offset = static_cast<float>(norm.weight_offset);
  p.centered = norm.centered;
  p.wide = p.dy.wide(p.n) && p.h.wide(p.n) && p.dh_in.wide(p.n) && p.dh.wide(p.n) &&
           p.dx.wide(p.n) && p.weight.wide(p.n);
  std::optional<Tensor> sums;
  if (need_params) {
    const int64_t size = cuda::norm_bwd_programs(p) * p.n;
    sums = new_output(h, {need_bias ? 2 : 1, size}, ScalarType::Float);
    p.weight_sums = static_cast<float*>(launcher.data(*sums));
    if (need_bias) p.bias_sums = p.weight_sums + size;
  }
  launcher.check(cuda::norm_bwd(p, launcher.stream()));
  return {dh, dx, dweight, dbias};
}

}  // namespace llmops
