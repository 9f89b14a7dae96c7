// How elementwise kernels walk tensors of any strides: rows of the last dimension, or, where every
// tensor is contiguous, runs of all elements.
#pragma once
#include "common.h"

namespace llmops {

// Elements per task of a flat walk; a multiple of every vector length, so that tasks stay aligned.
constexpr int64_t kFlatRun = 16384;

// f(n, first) over runs that cover `total` elements of contiguous tensors.
template <class F>
void for_flat_runs(int64_t total, const F& f) {
  parallel_rows((total + kFlatRun - 1) / kFlatRun, kFlatRun, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kFlatRun, last = end * kFlatRun < total ? end * kFlatRun : total;
    f(last - first, first);
  });
}

// f(n, offset of tensor 0, offset of tensor 1, ...) as `f(n, const int64_t* element_offsets)` for
// dense runs that cover `sizes`. `strides[i]` are tensor i's; the last dimension is dense in all.
template <size_t N, class F>
void for_runs(const std::vector<int64_t>& sizes, const std::vector<int64_t> (&strides)[N],
              const F& f) {
  int64_t total = 1;
  for (int64_t size : sizes) total *= size;
  if (total == 0) return;
  bool flat = true;
  for (const auto& own : strides) {
    int64_t dense = 1;
    for (size_t d = sizes.size(); d-- > 0;) {
      flat &= sizes[d] == 1 || own[d] == dense;
      dense *= sizes[d];
    }
  }
  if (flat) {
    for_flat_runs(total, [&](int64_t n, int64_t first) {
      int64_t offsets[N];
      for (size_t i = 0; i < N; ++i) offsets[i] = first;
      f(n, offsets);
    });
    return;
  }
  const int64_t n = sizes.back();
  std::vector<std::vector<int64_t>> leading;
  for (const auto& own : strides) leading.emplace_back(own.begin(), own.end() - 1);
  const RowIndex index({sizes.begin(), sizes.end() - 1}, leading);
  parallel_rows(index.rows(), n, [&](int64_t begin, int64_t end) {
    int64_t offsets[N];
    for (int64_t row = begin; row < end; ++row) {
      for (size_t i = 0; i < N; ++i) offsets[i] = index.offset(i, row);
      f(n, offsets);
    }
  });
}

inline std::vector<int64_t> strides_of(const Tensor& t) {
  return {t.strides().begin(), t.strides().end()};
}

}  // namespace llmops
