// cross_entropy: forward and backward as raw operators. llmops.ops.cross_entropy owns the public
// schema, the checks and autograd; what is checked here keeps memory safe whoever calls.
//
// Rows are the leading dimensions of logits [..., C]; a class dimension that is not dense is
// gathered a few rows at a time.
#include "cpu/cross_entropy.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstring>
#include <tuple>

#include "elementwise.h"
#include "ids.h"
#include "schemas.h"

namespace llmops {
namespace {

constexpr const char* kName = "llmops.cross_entropy";

enum class Reduction : int64_t { none = 0, mean = 1, sum = 2 };

// What both passes are given.
struct Loss {
  Tensor x;  // [..., C]
  DenseIds target;
  const float* weight;  // [C] or null
  int64_t ignore_index;
  double smoothing, z_loss;
  Reduction reduction;
  int64_t classes;

  Loss(const Tensor& x_in, const Tensor& target_in, const std::optional<Tensor>& weight_in,
       int64_t ignore, double label_smoothing, double z, int64_t how)
      : x(x_in),
        target(target_in, kName, "target"),
        weight(nullptr),
        ignore_index(ignore),
        smoothing(label_smoothing),
        z_loss(z),
        reduction(static_cast<Reduction>(how)),
        classes(x_in.dim() > 0 ? x_in.size(-1) : 0) {
    std::vector<int64_t> rows = shape_of(x);
    LLMOPS_CHECK(!rows.empty(), kName, ": input must be [..., C]");
    rows.pop_back();
    LLMOPS_CHECK(shape_of(target_in) == rows, kName, ": target must have input's leading shape");
    LLMOPS_CHECK(how >= 0 && how <= 2, kName, ": reduction must be 0, 1 or 2");
    if (weight_in.has_value()) {
      LLMOPS_CHECK(weight_in->dim() == 1 && weight_in->size(0) == classes &&
                       weight_in->scalar_type() == ScalarType::Float && weight_in->is_contiguous(),
                   kName, ": weight must be float32 [C], contiguous");
      weight = static_cast<const float*>(weight_in->data_ptr());
    }
  }
  double weight_of(int64_t t) const { return weight ? weight[t] : 1.0; }
  bool valid(int64_t t) const { return t >= 0 && t < classes; }

  [[noreturn]] void fail(int64_t t) const {
    const std::string range = classes > 0 ? message(" (0 to ", classes - 1, ")") : "";
    throw std::out_of_range(message(kName, ": target holds ", t, ", but input has ", classes,
                                    " classes", range, "; ignore_index is ", ignore_index));
  }
};

// f(row, logits of the row, dense) for all rows, in parallel.
template <class F>
void for_logits(const Tensor& x, const F& f) {
  const int64_t n = x.size(-1), step = x.stride(-1), size = element_size(x.scalar_type());
  const auto* data = static_cast<const char*>(x.data_ptr());
  if (x.is_contiguous() && n > 0) {
    // No row index, whose vectors would show in a call of one row.
    parallel_rows(x.numel() / n, n, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) f(r, data + r * n * size);
    });
    return;
  }
  std::vector<int64_t> sizes = shape_of(x);
  sizes.pop_back();
  const RowIndex index(sizes, {leading_strides(x)});
  if (step == 1 || n <= 1) {
    parallel_rows(index.rows(), n, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) f(r, data + index.offset(0, r) * size);
    });
    return;
  }
  // Classes apart in memory, neighbouring rows mostly side by side: as many rows as share cache
  // lines.
  constexpr int64_t kTile = 8;
  const int64_t tiles = (index.rows() + kTile - 1) / kTile;
  parallel_rows(tiles, kTile * n, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<char[]> rows(new char[kTile * n * size]);
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t first = tile * kTile;
      const int64_t count = index.rows() - first < kTile ? index.rows() - first : kTile;
      const char* from[kTile];
      for (int64_t r = 0; r < count; ++r) from[r] = data + index.offset(0, first + r) * size;
      for (int64_t c = 0; c < n; ++c)
        for (int64_t r = 0; r < count; ++r)
          std::memcpy(rows.get() + (r * n + c) * size, from[r] + c * step * size, size);
      for (int64_t r = 0; r < count; ++r) f(first + r, rows.get() + r * n * size);
    }
  });
}

double read(const Tensor& t, int64_t i) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return static_cast<const float*>(t.data_ptr())[i];
    case ScalarType::Double:
      return static_cast<const double*>(t.data_ptr())[i];
    case ScalarType::BFloat16:
      return static_cast<float>(static_cast<const c10::BFloat16*>(t.data_ptr())[i]);
    default:
      return static_cast<float>(static_cast<const c10::Half*>(t.data_ptr())[i]);
  }
}
void write(const Tensor& t, int64_t i, double value) {
  const float x = static_cast<float>(value);
  switch (t.scalar_type()) {
    case ScalarType::Float:
      static_cast<float*>(t.data_ptr())[i] = x;
      break;
    case ScalarType::BFloat16:
      static_cast<c10::BFloat16*>(t.data_ptr())[i] = x;
      break;
    default:
      static_cast<c10::Half*>(t.data_ptr())[i] = x;
  }
}

// What the mean divides by: the sum of the targets' weights, and for the z-loss their number.
struct Counted {
  double weights = 0.0, rows = 0.0;

  explicit Counted(const Loss& loss) {
    for (int64_t r = 0; r < loss.target.count(); ++r) {
      const int64_t t = loss.target.data()[r];
      if (t == loss.ignore_index || !loss.valid(t)) continue;
      weights += loss.weight_of(t);
      rows += 1.0;
    }
  }
};

// x [..., C], target [...] -> loss [...] or a scalar, and the rows' log-sum-exp in fp64, 0 where
// the target is ignored.
std::tuple<Tensor, Tensor> cross_entropy_fwd_cpu(const Tensor& x, const Tensor& target,
                                                 const std::optional<Tensor>& weight,
                                                 int64_t ignore_index, double label_smoothing,
                                                 double z_loss, int64_t reduction,
                                                 std::optional<ScalarType> loss_type) {
  const Loss loss(x, target, weight, ignore_index, label_smoothing, z_loss, reduction);
  const cpu::DType type = kernel_dtype(x.scalar_type(), kName);
  const ScalarType dtype = loss_type.value_or(x.scalar_type());
  kernel_dtype(dtype, "llmops.cross_entropy: dtype");
  const std::vector<int64_t> shape = shape_of(target);
  const bool rowwise = loss.reduction == Reduction::none;
  Tensor out = new_output(x, rowwise ? shape : std::vector<int64_t>{}, dtype);
  Tensor lse = new_output(x, shape, ScalarType::Double);
  auto* lse_data = static_cast<double*>(lse.data_ptr());
  const int64_t rows = target.numel();
  const std::unique_ptr<double[]> losses(new double[rows > 0 ? rows : 1]);
  const bool smooth = label_smoothing > 0.0;
  std::atomic<bool> bad{false};
  const auto kernel = LLMOPS_CPU_CALL(cross_entropy_fwd_row);
  for_logits(x, [&](int64_t r, const void* logits) {
    const int64_t t = loss.target.data()[r];
    lse_data[r] = losses[r] = 0.0;
    if (t == ignore_index) return;
    if (!loss.valid(t)) {
      bad.store(true, std::memory_order_relaxed);
      return;
    }
    const cpu::CrossEntropyRow row = kernel(type, loss.classes, logits, t, smooth, loss.weight);
    lse_data[r] = row.lse;
    losses[r] = row.nll * loss.weight_of(t);
    if (smooth) {
      losses[r] = (1.0 - label_smoothing) * losses[r] +
                  label_smoothing / static_cast<double>(loss.classes) * row.smooth;
    }
  });
  if (bad.load()) {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t t = loss.target.data()[r];
      if (t != ignore_index && !loss.valid(t)) loss.fail(t);
    }
  }
  // One thread, in order: the same bits for any number of threads.
  double total = 0.0, squares = 0.0;
  for (int64_t r = 0; r < rows; ++r) {
    const double square = z_loss != 0.0 ? lse_data[r] * lse_data[r] : 0.0;
    if (rowwise) write(out, r, losses[r] + z_loss * square);
    total += losses[r];
    squares += square;
  }
  if (rowwise) return {out, lse};
  if (loss.reduction == Reduction::mean) {
    const Counted counted(loss);
    total /= counted.weights;
    squares /= counted.rows;
  }
  write(out, 0, z_loss != 0.0 ? total + z_loss * squares : total);
  return {out, lse};
}

// Writes the gradient into dx: [..., C] with dense rows.
void backward(const Loss& loss, const Tensor& grad_in, const std::optional<Tensor>& grad_lse_in,
              const Tensor& lse_in, const Tensor& dx, bool stream) {
  const Tensor grad = torch::stable::contiguous(grad_in);
  const Tensor lse = torch::stable::contiguous(lse_in);
  const int64_t rows = loss.target.count();
  const bool rowwise = loss.reduction == Reduction::none;
  LLMOPS_CHECK(grad.numel() == (rowwise ? rows : 1) && lse.numel() == rows &&
                   lse.scalar_type() == ScalarType::Double,
               "llmops.cross_entropy_bwd: grad must be of the loss's shape, lse float64 per row");
  std::optional<Tensor> grad_lse;
  if (grad_lse_in.has_value()) {
    grad_lse = torch::stable::contiguous(*grad_lse_in);
    LLMOPS_CHECK(grad_lse->numel() == rows && grad_lse->scalar_type() == ScalarType::Double,
                 "llmops.cross_entropy_bwd: grad_lse must be as lse");
  }
  const cpu::DType type = kernel_dtype(loss.x.scalar_type(), "llmops.cross_entropy_bwd");
  double per_weight = 1.0, per_row = 1.0;
  if (loss.reduction == Reduction::mean) {
    const Counted counted(loss);
    per_weight = 1.0 / counted.weights;
    per_row = 1.0 / counted.rows;
  }
  const double uniform =
      loss.smoothing > 0.0 ? loss.smoothing / static_cast<double>(loss.classes) : 0.0;
  double all_weights = static_cast<double>(loss.classes);
  if (uniform != 0.0 && loss.weight) {
    all_weights = 0.0;
    for (int64_t c = 0; c < loss.classes; ++c) all_weights += loss.weight[c];
  }
  std::vector<int64_t> sizes = shape_of(dx);
  sizes.pop_back();
  const RowIndex to(sizes, {leading_strides(dx)});
  auto* dx_data = static_cast<char*>(dx.data_ptr());
  const auto* lse_data = static_cast<const double*>(lse.data_ptr());
  const int64_t size = element_size(dx.scalar_type());
  std::atomic<int64_t> bad{-1};
  const auto kernel = LLMOPS_CPU_CALL(cross_entropy_bwd_row);
  for_logits(loss.x, [&](int64_t r, const void* logits) {
    char* row = dx_data + to.offset(0, r) * size;
    const int64_t t = loss.target.data()[r];
    if (t == loss.ignore_index || !loss.valid(t)) {
      if (t != loss.ignore_index) bad.store(r, std::memory_order_relaxed);
      std::memset(row, 0, loss.classes * size);
      return;
    }
    const double g = read(grad, rowwise ? r : 0);
    cpu::CrossEntropyGrad at{};
    at.lse = lse_data[r];
    at.target = t;
    at.c = g * per_weight * uniform;
    double normalizer = 0.0;  // the gradient that comes through lse alone
    if (loss.z_loss != 0.0) normalizer = g * per_row * loss.z_loss * 2.0 * at.lse;
    if (grad_lse.has_value()) normalizer += static_cast<const double*>(grad_lse->data_ptr())[r];
    const double weight = loss.weight_of(t), toward = g * per_weight * (1.0 - loss.smoothing);
    const double spread = uniform != 0.0 ? all_weights : 0.0;
    at.a = toward * weight + at.c * spread + normalizer;
    at.rest = uniform != 0.0 ? at.c * (spread - weight) + normalizer : normalizer;
    kernel(type, loss.classes, logits, at, loss.weight, stream, row);
  });
  if (bad.load() >= 0) loss.fail(loss.target.data()[bad.load()]);
}

Tensor cross_entropy_bwd_cpu(const Tensor& grad, const std::optional<Tensor>& grad_lse,
                             const Tensor& x, const Tensor& target,
                             const std::optional<Tensor>& weight, const Tensor& lse,
                             int64_t ignore_index, double label_smoothing, double z_loss,
                             int64_t reduction) {
  const Loss loss(x, target, weight, ignore_index, label_smoothing, z_loss, reduction);
  Tensor dx = new_output(x, shape_of(x));
  backward(loss, grad, grad_lse, lse, dx, past_caches(dx.numel() * element_size(dx.scalar_type())));
  return dx;
}

// The same over x itself. Not for autograd: for a caller whose own logits x are.
void cross_entropy_bwd_inplace_cpu(const Tensor& grad, Tensor x, const Tensor& target,
                                   const std::optional<Tensor>& weight, const Tensor& lse,
                                   int64_t ignore_index, double label_smoothing, double z_loss,
                                   int64_t reduction, const std::optional<Tensor>& grad_lse) {
  LLMOPS_CHECK(x.is_contiguous(), "llmops.cross_entropy_bwd_: x must be contiguous");
  const Loss loss(x, target, weight, ignore_index, label_smoothing, z_loss, reduction);
  backward(loss, grad, grad_lse, lse, x, false);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(llmops_cpu, m) { define(m, kCrossEntropySchemas); }
STABLE_TORCH_LIBRARY_IMPL(llmops_cpu, CPU, m) {
  m.impl("cross_entropy_fwd", TORCH_BOX(&cross_entropy_fwd_cpu));
  m.impl("cross_entropy_bwd", TORCH_BOX(&cross_entropy_bwd_cpu));
  m.impl("cross_entropy_bwd_", TORCH_BOX(&cross_entropy_bwd_inplace_cpu));
}

}  // namespace llmops
