#include "norm.h"

#include <memory>

namespace llmops {
namespace {

// Outputs larger than the last-level cache would only push out what is still wanted; the write past
// it also saves reading the line first. 32 MiB: one core complex of common servers. What sysconf
// reports is the whole socket's, which one thread cannot use.
constexpr int64_t kStreamFromBytes = 32 << 20;

// Partial sums of the parameter gradients: their number depends on the shape alone, so that the
// result does not depend on the number of threads.
constexpr int64_t kMaxChunks = 64;

// A tensor as rows of its last `dims` dimensions flattened, each row dense.
struct Rows {
  Tensor tensor;
  std::vector<int64_t> strides;  // of the leading dimensions
  char* data;
  int64_t size;  // of an element, in bytes
};

bool trailing_dense(const Tensor& t, int64_t dims) {
  int64_t expected = 1;
  for (int64_t d = t.dim() - 1; d >= t.dim() - dims; --d) {
    if (t.size(d) == 1) continue;
    if (t.stride(d) != expected) return false;
    expected *= t.size(d);
  }
  return true;
}

Rows rows_of(const Tensor& t, int64_t dims) {
  Tensor dense = t.is_contiguous() || trailing_dense(t, dims) ? t : torch::stable::contiguous(t);
  auto* data = static_cast<char*>(dense.data_ptr());
  return {dense, leading_strides(dense, dims), data, element_size(dense.scalar_type())};
}

// weight or bias in fp32, with the offset: the tensor's own memory, or `storage`.
const float* widened(const std::optional<Tensor>& t, int64_t n, float offset, const char* name,
                     std::unique_ptr<float[]>& storage) {
  if (!t.has_value()) {
    storage.reset(new float[n]);
    for (int64_t i = 0; i < n; ++i) storage[i] = offset;
    return storage.get();
  }
  LLMOPS_CHECK(t->numel() == n && t->is_contiguous(), name,
               ": weight and bias must be dense and have ", n, " elements as a row has, got ",
               t->numel());
  const cpu::DType type = kernel_dtype(t->scalar_type(), name);
  if (type == cpu::DType::f32 && offset == 0.0f) return static_cast<const float*>(t->data_ptr());
  storage.reset(new float[n]);
  LLMOPS_CPU_CALL(norm_widen)(type, n, t->data_ptr(), offset, storage.get());
  return storage.get();
}

// What a call needs to know of its rows, with the parameters in fp32.
struct Setup {
  cpu::NormParams p{};
  std::unique_ptr<float[]> weight_storage, bias_storage;

  Setup(const char* name, const Tensor& x, const NormAffine& affine) {
    LLMOPS_CHECK(affine.dims >= 1 && affine.dims <= x.dim(), name, ": ", affine.dims,
                 " normalized dimensions do not fit an input of ", x.dim(), " dimensions");
    p.n = 1;
    for (int64_t d = x.dim() - affine.dims; d < x.dim(); ++d) p.n *= x.size(d);
    p.x_type = p.residual_type = p.h_type = kernel_dtype(x.scalar_type(), name);
    p.eps = static_cast<float>(affine.eps);
    const float offset =
        affine.weight.has_value() ? static_cast<float>(affine.weight_offset) : 1.0f;
    p.weight = widened(affine.weight, p.n, offset, name, weight_storage);
    if (affine.centered) p.bias = widened(affine.bias, p.n, 0.0f, name, bias_storage);
  }
};

}  // namespace

std::tuple<Tensor, Tensor> norm_forward(const NormKernels& kernels, const Tensor& x_in,
                                        const std::optional<Tensor>& residual_in,
                                        const NormAffine& affine) {
  Setup setup(kernels.name, x_in, affine);
  cpu::NormParams& p = setup.p;
  const Rows x = rows_of(x_in, affine.dims);
  const std::vector<int64_t> shape = shape_of(x_in);
  const Tensor y = new_output(x_in, shape);
  Tensor h = x_in;
  std::optional<Rows> residual;
  if (residual_in.has_value()) {
    LLMOPS_CHECK(shape_of(*residual_in) == shape, kernels.name,
                 ": residual must have the shape of x");
    const ScalarType type = residual_in->scalar_type();
    LLMOPS_CHECK(type == x_in.scalar_type() || type == ScalarType::Float, kernels.name,
                 ": residual must be float32 or have x's dtype, got ", dtype_name(type));
    p.residual_type = p.h_type = kernel_dtype(type, kernels.name);
    residual = rows_of(*residual_in, affine.dims);
    h = new_output(*residual_in, shape);
  }
  const int64_t count = x_in.numel();
  if (count == 0) return {y, h};
  const int64_t h_size = residual ? residual->size : 0;
  p.stream = count * (x.size > h_size ? x.size : h_size) > kStreamFromBytes;

  std::vector<int64_t> sizes(shape.begin(), shape.end() - affine.dims);
  std::vector<std::vector<int64_t>> strides = {x.strides};
  if (residual) strides.push_back(residual->strides);
  const RowIndex index(sizes, strides);
  const int64_t n = p.n;
  auto* y_data = static_cast<char*>(y.data_ptr());
  auto* h_data = residual ? static_cast<char*>(h.data_ptr()) : nullptr;
  parallel_rows(index.rows(), n, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end;) {
      cpu::NormForwardRows rows{};
      rows.count = index.run(row, end);
      rows.x = x.data + index.offset(0, row) * x.size;
      rows.x_step = index.step(0) * x.size;
      rows.y = y_data + row * n * x.size;
      rows.y_step = n * x.size;
      if (residual) {
        rows.residual = residual->data + index.offset(1, row) * h_size;
        rows.residual_step = index.step(1) * h_size;
        rows.h = h_data + row * n * h_size;
        rows.h_step = n * h_size;
      }
      kernels.forward(p, rows);
      row += rows.count;
    }
  });
  return {y, h};
}

NormGradients norm_backward(const NormKernels& kernels, const Tensor& dy_in, const Tensor& h_in,
                            const std::optional<Tensor>& dh_in, const NormAffine& affine,
                            bool need_h, bool need_x, bool need_params) {
  Setup setup(kernels.name, h_in, affine);
  cpu::NormParams& p = setup.p;
  const std::vector<int64_t> shape = shape_of(h_in);
  const ScalarType x_type = dy_in.scalar_type(), h_type = h_in.scalar_type();
  LLMOPS_CHECK(shape_of(dy_in) == shape && (x_type == h_type || h_type == ScalarType::Float),
               kernels.name,
               ": the gradient must have its input's shape, and its dtype or a 16-bit one");
  LLMOPS_CHECK(!dh_in.has_value() || (shape_of(*dh_in) == shape && dh_in->scalar_type() == h_type),
               kernels.name, ": the sum's gradient must have its shape and dtype");
  p.x_type = kernel_dtype(x_type, kernels.name);
  need_x = need_x && x_type != h_type;
  need_h = need_h || need_x;  // the kernel writes dx beside dh
  const bool need_bias = need_params && affine.centered;

  const std::vector<int64_t> none = {0};
  NormGradients out;
  out.dh = new_output(h_in, need_h ? shape : none);
  out.dx = new_output(dy_in, need_x ? shape : none);
  const std::vector<int64_t> row_shape(shape.end() - affine.dims, shape.end());
  const ScalarType param_type = affine.weight.has_value() ? affine.weight->scalar_type()
                                : affine.bias.has_value() ? affine.bias->scalar_type()
                                                          : h_type;
  out.dweight = new_output(h_in, need_params ? row_shape : none, param_type);
  out.dbias = new_output(h_in, need_bias ? row_shape : none, param_type);

  const int64_t n = p.n;
  if (n == 0) return out;
  const Rows dy = rows_of(dy_in, affine.dims), h = rows_of(h_in, affine.dims);
  std::vector<int64_t> sizes(shape.begin(), shape.end() - affine.dims);
  std::vector<std::vector<int64_t>> strides = {dy.strides, h.strides};
  std::optional<Rows> sum_grad;
  if (dh_in.has_value()) {
    sum_grad = rows_of(*dh_in, affine.dims);
    strides.push_back(sum_grad->strides);
  }
  const RowIndex index(sizes, strides);
  const int64_t count = index.rows();
  auto* dh_data = static_cast<char*>(out.dh.data_ptr());
  auto* dx_data = static_cast<char*>(out.dx.data_ptr());
  const auto run = [&](int64_t begin, int64_t end, float* dweight, float* dbias) {
    for (int64_t row = begin; row < end;) {
      cpu::NormBackwardRows rows{};
      rows.count = index.run(row, end);
      rows.dy = dy.data + index.offset(0, row) * dy.size;
      rows.dy_step = index.step(0) * dy.size;
      rows.h = h.data + index.offset(1, row) * h.size;
      rows.h_step = index.step(1) * h.size;
      if (sum_grad) {
        rows.dh_in = sum_grad->data + index.offset(2, row) * h.size;
        rows.dh_in_step = index.step(2) * h.size;
      }
      rows.dh_step = n * h.size;
      rows.dx_step = n * dy.size;
      if (need_h) rows.dh = dh_data + row * rows.dh_step;
      if (need_x) rows.dx = dx_data + row * rows.dx_step;
      rows.dweight = dweight;
      rows.dbias = dbias;
      kernels.backward(p, rows);
      row += rows.count;
    }
  };
  if (!need_params) {
    parallel_rows(count, n, [&](int64_t begin, int64_t end) { run(begin, end, nullptr, nullptr); });
    return out;
  }
  int64_t chunks = count * n / kSerialElements;
  chunks = chunks < 1 ? 1 : (chunks > kMaxChunks ? kMaxChunks : chunks);
  if (chunks > count) chunks = count > 0 ? count : 1;
  // [chunks, n] each; zeros.
  const std::unique_ptr<float[]> dweight(new float[chunks * n]());
  const std::unique_ptr<float[]> dbias(need_bias ? new float[chunks * n]() : nullptr);
  parallel_tasks(chunks, chunks > 1, [&](int64_t chunk) {
    run(count * chunk / chunks, count * (chunk + 1) / chunks, dweight.get() + chunk * n,
        need_bias ? dbias.get() + chunk * n : nullptr);
  });
  const cpu::DType type = kernel_dtype(param_type, kernels.name);
  LLMOPS_CPU_CALL(norm_reduce)(type, chunks, n, dweight.get(), out.dweight.data_ptr());
  if (need_bias) LLMOPS_CPU_CALL(norm_reduce)(type, chunks, n, dbias.get(), out.dbias.data_ptr());
  return out;
}

}  // namespace llmops
