#include "norm.h"

#include <initializer_list>
#include <memory>

#include "scratch.h"

namespace llmops {
namespace {

// Partial sums of the parameter gradients: their number depends on the shape alone, so that the
// result does not depend on the number of threads.
constexpr int64_t kMaxChunks = 64;

// A tensor as rows of its last `dims` dimensions flattened, each row dense.
struct Rows {
  Tensor tensor;
  char* data;
  int64_t size;  // of an element, in bytes
  bool contiguous;

  Rows(const Tensor& t, int64_t dims) : tensor(t), contiguous(t.is_contiguous()) {
    if (!contiguous && !trailing_dense(t, dims)) {
      tensor = torch::stable::contiguous(t);
      contiguous = true;
    }
    data = static_cast<char*>(tensor.data_ptr());
    size = element_size(tensor.scalar_type());
  }

 private:
  static bool trailing_dense(const Tensor& t, int64_t dims) {
    int64_t expected = 1;
    for (int64_t d = t.dim() - 1; d >= t.dim() - dims; --d) {
      if (t.size(d) == 1) continue;
      if (t.stride(d) != expected) return false;
      expected *= t.size(d);
    }
    return true;
  }
};

// Where the rows of several tensors of one shape lie. Contiguous ones, which is nearly always, need
// no index and no allocation: at decode sizes these would show.
class RowWalk {
 public:
  RowWalk(std::initializer_list<const Rows*> all, int64_t dims, int64_t rows, int64_t n)
      : rows_(rows), n_(n) {
    bool contiguous = true;
    for (const Rows* r : all) contiguous = contiguous && (!r || r->contiguous);
    if (contiguous) return;
    std::vector<std::vector<int64_t>> strides;
    std::vector<int64_t> sizes;
    for (const Rows* r : all) {
      if (!r) continue;
      strides.push_back(leading_strides(r->tensor, dims));
      if (sizes.empty()) sizes = shape_of(r->tensor);
    }
    sizes.resize(sizes.size() - dims);
    index_.emplace(sizes, strides);
  }
  // Rows from `row` on, before `end`, that lie one step apart in every tensor.
  int64_t run(int64_t row, int64_t end) const { return index_ ? index_->run(row, end) : end - row; }
  char* at(const Rows& rows, size_t k, int64_t row) const {
    return rows.data + (index_ ? index_->offset(k, row) : row * n_) * rows.size;
  }
  int64_t step(const Rows& rows, size_t k) const {
    return (index_ ? index_->step(k) : n_) * rows.size;
  }
  int64_t rows() const { return rows_; }

 private:
  int64_t rows_, n_;
  std::optional<RowIndex> index_;
};

// Rows of n floats for a call, taken when first asked for. Of one row in bf16 three blocks from the
// heap were a tenth of the time.
class FloatRows {
 public:
  enum Which : int64_t { kWeight, kBias, kFirstChunk, kCount };
  float* row(Which which, int64_t n) {
    const int64_t padded = (n + 15) / 16 * 16;
    if (!memory_) memory_.emplace(kCount * padded * static_cast<int64_t>(sizeof(float)));
    return static_cast<float*>(memory_->data()) + which * padded;
  }

 private:
  std::optional<Scratch> memory_;
};

void check_shape(const Tensor& t, const Tensor& x, int64_t dims, const char* name) {
  const auto sizes = t.sizes(), all = x.sizes();
  bool fits = static_cast<int64_t>(sizes.size()) == dims;
  for (int64_t d = 0; fits && d < dims; ++d) fits = sizes[d] == all[all.size() - dims + d];
  LLMOPS_CHECK(fits, name, ": weight and bias must have the shape of x's last ", dims,
               " dimensions");
}

// weight or bias in fp32, with the offset: the tensor's own memory, or a row of `storage`.
const float* widened(const std::optional<Tensor>& t, const Tensor& x, int64_t dims, int64_t n,
                     float offset, const char* name, FloatRows& storage, FloatRows::Which which) {
  if (!t.has_value()) {
    float* out = storage.row(which, n);
    for (int64_t i = 0; i < n; ++i) out[i] = offset;
    return out;
  }
  check_shape(*t, x, dims, name);
  const cpu::DType type = kernel_dtype(t->scalar_type(), name);
  const bool dense = t->is_contiguous();
  if (type == cpu::DType::f32 && offset == 0.0f && dense)
    return static_cast<const float*>(t->data_ptr());
  const Tensor source = dense ? *t : torch::stable::contiguous(*t);
  float* out = storage.row(which, n);
  LLMOPS_CPU_CALL(norm_widen)(type, n, source.data_ptr(), offset, out);
  return out;
}

// What a call needs to know of its rows, with the parameters in fp32, or in the forward of a row or
// two as they are: there, to widen them first would be another row's work.
struct Setup {
  cpu::NormParams p{};
  FloatRows storage;

  Setup(const char* name, const Tensor& x, const NormAffine& affine, bool forward) {
    LLMOPS_CHECK(affine.dims >= 1 && affine.dims <= x.dim(), name, ": ", affine.dims,
                 " normalized dimensions do not fit an input of ", x.dim(), " dimensions");
    p.n = 1;
    for (int64_t d = x.dim() - affine.dims; d < x.dim(); ++d) p.n *= x.size(d);
    const ScalarType type = x.scalar_type();
    p.x_type = p.residual_type = p.h_type = kernel_dtype(type, name);
    p.eps = static_cast<float>(affine.eps);
    const bool centered = affine.centered;
    if (forward && p.x_type != cpu::DType::f32 && affine.weight_offset == 0.0 &&
        x.numel() <= 2 * p.n && readable(affine.weight, type) &&
        (!centered || readable(affine.bias, type))) {
      check_shape(*affine.weight, x, affine.dims, name);
      p.narrow_weight = affine.weight->data_ptr();
      if (centered) {
        check_shape(*affine.bias, x, affine.dims, name);
        p.narrow_bias = affine.bias->data_ptr();
      }
      return;
    }
    const float offset =
        affine.weight.has_value() ? static_cast<float>(affine.weight_offset) : 1.0f;
    p.weight =
        widened(affine.weight, x, affine.dims, p.n, offset, name, storage, FloatRows::kWeight);
    if (centered)
      p.bias = widened(affine.bias, x, affine.dims, p.n, 0.0f, name, storage, FloatRows::kBias);
  }

 private:
  static bool readable(const std::optional<Tensor>& t, ScalarType type) {
    return t.has_value() && t->scalar_type() == type && t->is_contiguous();
  }
};

}  // namespace

std::tuple<Tensor, Tensor> norm_forward(const NormKernels& kernels, const Tensor& x_in,
                                        const std::optional<Tensor>& residual_in,
                                        const NormAffine& affine) {
  Setup setup(kernels.name, x_in, affine, true);
  cpu::NormParams& p = setup.p;
  const Rows x(x_in, affine.dims);
  const Tensor y = new_output_like(x_in, x_in.scalar_type());
  Tensor h = x_in;
  std::optional<Rows> residual;
  if (residual_in.has_value()) {
    LLMOPS_CHECK(same_shape(*residual_in, x_in), kernels.name,
                 ": residual must have the shape of x");
    const ScalarType type = residual_in->scalar_type();
    LLMOPS_CHECK(type == x_in.scalar_type() || type == ScalarType::Float, kernels.name,
                 ": residual must be float32 or have x's dtype, got ", dtype_name(type));
    p.residual_type = p.h_type = kernel_dtype(type, kernels.name);
    residual.emplace(*residual_in, affine.dims);
    h = new_output_like(x_in, type);
  }
  const int64_t count = x_in.numel(), n = p.n;
  if (count == 0) return {y, h};
  const int64_t h_size = residual ? residual->size : 0;
  p.stream = past_caches(count * (x.size + h_size));

  const RowWalk walk({&x, residual ? &*residual : nullptr}, affine.dims, count / n, n);
  auto* y_data = static_cast<char*>(y.data_ptr());
  auto* h_data = residual ? static_cast<char*>(h.data_ptr()) : nullptr;
  const bool in_place = !residual;
  float* const first = in_place ? nullptr : setup.storage.row(FloatRows::kFirstChunk, n);
  parallel_rows(walk.rows(), n, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> own(in_place || begin == 0 ? nullptr : new float[n]);
    float* const scratch = begin == 0 ? first : own.get();
    for (int64_t row = begin; row < end;) {
      cpu::NormForwardRows rows{};
      rows.count = walk.run(row, end);
      rows.scratch = scratch;
      rows.x = walk.at(x, 0, row);
      rows.x_step = walk.step(x, 0);
      rows.y = y_data + row * n * x.size;
      rows.y_step = n * x.size;
      if (residual) {
        rows.residual = walk.at(*residual, 1, row);
        rows.residual_step = walk.step(*residual, 1);
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
  Setup setup(kernels.name, h_in, affine, false);
  cpu::NormParams& p = setup.p;
  const std::vector<int64_t> shape = shape_of(h_in);
  const ScalarType x_type = dy_in.scalar_type(), h_type = h_in.scalar_type();
  LLMOPS_CHECK(shape_of(dy_in) == shape && (x_type == h_type || h_type == ScalarType::Float),
               kernels.name, ": dy must have h's shape, and its dtype or a 16-bit one");
  LLMOPS_CHECK(!dh_in.has_value() || (shape_of(*dh_in) == shape && dh_in->scalar_type() == h_type),
               kernels.name, ": dh must have h's shape and dtype");
  p.x_type = kernel_dtype(x_type, kernels.name);
  need_x = need_x && x_type != h_type;
  need_h = need_h || need_x;  // the kernel writes dx beside dh
  const bool need_bias = need_params && affine.centered;

  const std::vector<int64_t> none = {0};
  const std::vector<int64_t> row_shape(shape.end() - affine.dims, shape.end());
  const auto type_of = [&](const std::optional<Tensor>& t) {
    return t.has_value() ? t->scalar_type() : ScalarType::Float;
  };
  NormGradients out{new_output(h_in, need_h ? shape : none),
                    new_output(dy_in, need_x ? shape : none),
                    new_output(h_in, need_params ? row_shape : none, type_of(affine.weight)),
                    new_output(h_in, need_bias ? row_shape : none, type_of(affine.bias))};
  const int64_t n = p.n;
  if (n == 0) return out;
  const Rows dy(dy_in, affine.dims), h(h_in, affine.dims);
  std::optional<Rows> dh;
  if (dh_in.has_value()) dh.emplace(*dh_in, affine.dims);
  const int64_t count = h_in.numel() / n;
  const RowWalk walk({&dy, &h, dh ? &*dh : nullptr}, affine.dims, count, n);
  auto* dh_data = static_cast<char*>(out.dh.data_ptr());
  auto* dx_data = static_cast<char*>(out.dx.data_ptr());
  const auto run = [&](int64_t begin, int64_t end, float* dweight, float* dbias) {
    for (int64_t row = begin; row < end;) {
      cpu::NormBackwardRows rows{};
      rows.count = walk.run(row, end);
      rows.dy = walk.at(dy, 0, row);
      rows.dy_step = walk.step(dy, 0);
      rows.h = walk.at(h, 1, row);
      rows.h_step = walk.step(h, 1);
      if (dh) {
        rows.dh_in = walk.at(*dh, 2, row);
        rows.dh_in_step = walk.step(*dh, 2);
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
  const auto reduce = LLMOPS_CPU_CALL(norm_reduce);
  reduce(kernel_dtype(out.dweight.scalar_type(), kernels.name), chunks, n, dweight.get(),
         out.dweight.data_ptr());
  if (need_bias)
    reduce(kernel_dtype(out.dbias.scalar_type(), kernels.name), chunks, n, dbias.get(),
           out.dbias.data_ptr());
  return out;
}

}  // namespace llmops
