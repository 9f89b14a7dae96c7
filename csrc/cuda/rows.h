// Tensors as rows, for launchers and bindings; plain C++, no CUDA.
#pragma once
#include <cstdint>

namespace llmops::cuda {

enum Type : int { kF32 = 0, kBf16 = 1, kF16 = 2, kBool = 3 };

// Elements [row][column] of a tensor of any strides. Row r is (a, b, c) with c = r % size_c and
// b = r / size_c % size_b; where one stride serves all rows it is stride_a, and the sizes are 1.
struct Rows {
  void* data;  // null: there is none
  int type;
  int64_t size_b, size_c, stride_a, stride_b, stride_c;
  int64_t step;  // from column to column, 0 where it is broadcast

  int64_t element_bytes() const { return type == kF32 ? 4 : (type == kBool ? 1 : 2); }
  // Whether all rows of n elements can be read eight elements at a time, by 16-byte accesses.
  bool wide(int64_t n) const {
    const int64_t size = element_bytes();
    const auto fits = [&](int64_t stride) { return stride * size % 16 == 0; };
    return !data || (n % 8 == 0 && step == 1 && reinterpret_cast<uintptr_t>(data) % 16 == 0 &&
                     fits(stride_a) && fits(stride_b) && fits(stride_c));
  }
};

}  // namespace llmops::cuda
