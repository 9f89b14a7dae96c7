// What the CUDA bindings of gelu and swiglu share.
#pragma once
#include "common.h"
#include "cuda/activation.h"

namespace llmops {

// Tensors of one shape as [rows, n]: one row of all elements where each is contiguous. The second
// half of the last dimension begins `half` elements later.
class ActivationRows {
 public:
  int64_t rows, n;

  ActivationRows(Launcher& launcher, const std::vector<int64_t>& shape, bool contiguous)
      : launcher_(launcher), flat_(contiguous || shape.empty()) {
    int64_t count = 1;
    for (int64_t size : shape) count *= size;
    n = flat_ ? count : shape.back();
    rows = n > 0 ? count / n : 0;
  }
  Rows of(const Tensor& t) {
    if (!flat_) return launcher_.rows(t);
    Rows all = Launcher::none();
    all.data = launcher_.data(t);
    all.type = static_cast<int>(kernel_dtype(t.scalar_type(), launcher_.name()));
    return all;
  }

 private:
  Launcher& launcher_;
  bool flat_;
};

inline int activation_code(int64_t code, const char* name) {
  LLMOPS_CHECK(code >= 0 && code <= 2, name, ": no activation has code ", code);
  return static_cast<int>(code);
}

}  // namespace llmops
