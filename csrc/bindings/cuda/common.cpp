#include "common.h"

#include <algorithm>

namespace llmops {
namespace {

struct Walk {
  std::vector<int64_t> sizes, strides;
};

// Neighbours that one stride serves are merged, sizes of 1 dropped.
Walk merged(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
  Walk walk;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] == 1) continue;
    if (!walk.sizes.empty() && walk.strides.back() == sizes[d] * strides[d]) {
      walk.sizes.back() *= sizes[d];
      walk.strides.back() = strides[d];
    } else {
      walk.sizes.push_back(sizes[d]);
      walk.strides.push_back(strides[d]);
    }
  }
  return walk;
}

int type_of(const Tensor& t, const char* name) {
  if (t.scalar_type() == ScalarType::Bool) return cuda::kBool;
  return static_cast<int>(kernel_dtype(t.scalar_type(), name));
}

bool dense_tail(const Tensor& t, int64_t dims) {
  int64_t dense = 1;
  for (int64_t d = t.dim(); d-- > t.dim() - dims;) {
    if (t.size(d) != 1 && t.stride(d) != dense) return false;
    dense *= t.size(d);
  }
  return true;
}

}  // namespace

void* Launcher::data(const Tensor& t) {
#if defined(LLMOPS_CUDA_SIM)
  int64_t last = 0;
  for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
  cuda_sim::allow(t.data_ptr(), t.numel() ? (last + 1) * element_size(t.scalar_type()) : 0);
#endif
  return t.data_ptr();
}

Rows Launcher::strided_rows(const Tensor& t, const std::vector<int64_t>& sizes,
                            const std::vector<int64_t>& strides, int64_t step) {
  const Walk walk = merged(sizes, strides);
  const size_t dims = walk.sizes.size();
  Rows rows{data(t), type_of(t, name_)};
  rows.step = step;
  // No row to be found, and no Divisor of 0.
  if (std::find(sizes.begin(), sizes.end(), 0) != sizes.end()) return rows;
  LLMOPS_CHECK(dims <= 3, name_, ": more than three strides from row to row");
  if (dims > 0) rows.stride_a = walk.strides[0];
  // Two dimensions are a and c, one is a alone.
  if (dims > 1)
    rows.size_c = cuda::Divisor(walk.sizes[dims - 1]), rows.stride_c = walk.strides[dims - 1];
  if (dims > 2) rows.size_b = cuda::Divisor(walk.sizes[1]), rows.stride_b = walk.strides[1];
  return rows;
}

Rows Launcher::rows(const Tensor& t, int64_t dims) {
  std::vector<int64_t> sizes = shape_of(t);
  sizes.resize(sizes.size() - dims);
  if (dense_tail(t, dims)) {
    const std::vector<int64_t> strides = leading_strides(t, dims);
    if (merged(sizes, strides).sizes.size() <= 3) return strided_rows(t, sizes, strides, 1);
  }
  kept_.push_back(torch::stable::contiguous(t));
  return strided_rows(kept_.back(), sizes, leading_strides(kept_.back(), dims), 1);
}

Rows Launcher::broadcast_rows(const Tensor& t, const Tensor& x, const char* what) {
  LLMOPS_CHECK(t.dim() <= x.dim(), name_, ": ", what, " has more dimensions than x");
  const std::vector<int64_t> sizes = shape_of(x);
  const int64_t shift = x.dim() - t.dim();
  const auto strides_of = [&](const Tensor& from) {
    std::vector<int64_t> strides(sizes.size(), 0);
    // Of its own: t's copy has as many dimensions as x.
    const int64_t missing = x.dim() - from.dim();
    for (int64_t d = 0; d < from.dim(); ++d)
      if (from.size(d) != 1) strides[d + missing] = from.stride(d);
    return strides;
  };
  for (int64_t d = 0; d < t.dim(); ++d)
    LLMOPS_CHECK(t.size(d) == 1 || t.size(d) == sizes[d + shift], name_, ": ", what, " size ",
                 t.size(d), " in dimension ", d, " does not broadcast to ", sizes[d + shift]);
  const std::vector<int64_t> leading(sizes.begin(), sizes.end() - 1);
  std::vector<int64_t> strides = strides_of(t);
  Tensor from = t;
  if (merged(leading, {strides.begin(), strides.end() - 1}).sizes.size() > 3) {
    // As a tensor of its own in x's shape: a broadcast that three strides cannot walk is rare.
    kept_.push_back(new_output(t, sizes, t.scalar_type()));
    from = kept_.back();
    torch::stable::copy_(from, t);
    strides = strides_of(from);
  }
  return strided_rows(from, leading, {strides.begin(), strides.end() - 1}, strides.back());
}

}  // namespace llmops
