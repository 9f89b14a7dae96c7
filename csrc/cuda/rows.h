// Tensors as rows, for launchers and bindings; plain C++, no CUDA.
#pragma once
#include <cstdint>

namespace llmops::cuda {

enum Type : int { kF32 = 0, kBf16 = 1, kF16 = 2, kBool = 3 };

// Division of a number below 2^63 by one that is known on the host: a multiplication and a shift,
// where a GPU's own 64-bit division is a call of a hundred instructions that also costs registers.
// Granlund and Montgomery, "Division by Invariant Integers using Multiplication", 1994.
struct Divisor {
  int64_t by = 1;
  uint64_t factor = 1;
  int shift = 0;

  Divisor() = default;
  explicit Divisor(int64_t divisor) : by(divisor) {
    while (shift < 63 && (uint64_t{1} << shift) < static_cast<uint64_t>(divisor)) ++shift;
    using Wide = unsigned __int128;
    const Wide rest = (uint64_t{1} << shift) - static_cast<uint64_t>(divisor);
    factor = static_cast<uint64_t>((rest << 64) / static_cast<uint64_t>(divisor)) + 1;
  }
};

// Elements [row][column] of a tensor of any strides. Row r is (a, b, c) with c = r % size_c and
// b = r / size_c % size_b; where one stride serves all rows it is stride_a, and the sizes are 1.
struct Rows {
  void* data = nullptr;  // null: there is none
  int type = kF32;
  int64_t stride_a = 0, stride_b = 0, stride_c = 0;
  int64_t step = 1;  // from column to column, 0 where it is broadcast
  Divisor size_b{}, size_c{};

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
