// Integer tensors that index rows of a table: read once, checked, dense.
#pragma once
#include <memory>

#include "common.h"

namespace llmops {

// The values of an int64 or int32 tensor of any shape and strides as a dense int64 array, each in
// [0, limit). Read and checked once: a value that another thread changes later cannot lead a kernel
// out of the table. An id out of range is an IndexError in Python.
class CheckedIds {
 public:
  // Errors read "<where>: <argument> holds 7, but <what> 5 rows (0 to 4)<remedy>".
  CheckedIds(const Tensor& ids, int64_t limit, const char* where, const char* argument,
             const char* what, const char* remedy = "") {
    const bool wide = ids.scalar_type() == ScalarType::Long;
    LLMOPS_CHECK(wide || ids.scalar_type() == ScalarType::Int, where, ": ", argument,
                 " must be int64 or int32, got ", dtype_name(ids.scalar_type()));
    count_ = ids.numel();
    if (count_ > kInline) heap_.reset(new int64_t[count_]);
    data_ = count_ > kInline ? heap_.get() : inline_;
    if (count_ == 0) return;
    const void* source = ids.data_ptr();
    const RowIndex index(shape_of(ids), {leading_strides(ids, 0)});
    for (int64_t i = 0; i < count_; ++i) {
      const int64_t at = index.offset(0, i);
      const int64_t id =
          wide ? static_cast<const int64_t*>(source)[at] : static_cast<const int32_t*>(source)[at];
      if (id < 0 || id >= limit)
        throw std::out_of_range(message(where, ": ", argument, " holds ", id, ", but ", what, " ",
                                        limit, " rows", limit > 0 ? " (0 to " : "",
                                        limit > 0 ? std::to_string(limit - 1) + ")" : "", remedy));
      data_[i] = id;
    }
  }
  CheckedIds(const CheckedIds&) = delete;
  CheckedIds& operator=(const CheckedIds&) = delete;
  const int64_t* data() const { return data_; }
  int64_t count() const { return count_; }

 private:
  static constexpr int64_t kInline = 64;
  int64_t inline_[kInline];
  std::unique_ptr<int64_t[]> heap_;
  int64_t* data_;
  int64_t count_;
};

}  // namespace llmops
