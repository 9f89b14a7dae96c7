// Integer tensors that index rows of a table: read once, checked, dense.
#pragma once
#include <memory>

#include "common.h"

namespace llmops {

// "<where>: <argument> holds 7, but <what> 5 rows (0 to 4)<remedy>", an IndexError in Python.
[[noreturn]] inline void throw_out_of_range(int64_t id, int64_t rows, const char* where,
                                            const char* argument, const char* what,
                                            const char* remedy) {
  const std::string valid = rows > 0 ? message(" (0 to ", rows - 1, ")") : "";
  throw std::out_of_range(message(where, ": ", argument, " holds ", id, ", but ", what, " ", rows,
                                  " rows", valid, remedy));
}

// f(i, value) over an int64 or int32 tensor of any shape and strides, in order.
template <class F>
void for_ids(const Tensor& ids, const F& f) {
  const int64_t count = ids.numel();
  if (count == 0) return;
  const bool wide = ids.scalar_type() == ScalarType::Long;
  const void* source = ids.data_ptr();
  auto read = [&](int64_t at) {
    return wide ? static_cast<const int64_t*>(source)[at]
                : static_cast<int64_t>(static_cast<const int32_t*>(source)[at]);
  };
  if (ids.is_contiguous()) {
    for (int64_t i = 0; i < count; ++i) f(i, read(i));
    return;
  }
  const RowIndex index(shape_of(ids), {leading_strides(ids, 0)});
  for (int64_t i = 0; i < count; ++i) f(i, read(index.offset(0, i)));
}

inline std::unique_ptr<int64_t[]> copy_ids(const Tensor& ids) {
  std::unique_ptr<int64_t[]> copy(new int64_t[ids.numel()]);
  for_ids(ids, [&](int64_t i, int64_t id) { copy[i] = id; });
  return copy;
}

// Ids as a dense int64 array: their own memory where it is that, else a copy. Not checked: the
// memory may be another thread's to change, so a kernel reads each id once and checks what it read.
class DenseIds {
 public:
  DenseIds(const Tensor& ids, const char* where, const char* argument) : count_(ids.numel()) {
    const bool wide = ids.scalar_type() == ScalarType::Long;
    LLMOPS_CHECK(wide || ids.scalar_type() == ScalarType::Int, where, ": ", argument,
                 " must be int64 or int32, got ", dtype_name(ids.scalar_type()));
    if (wide && ids.is_contiguous()) {
      data_ = static_cast<const int64_t*>(ids.data_ptr());
    } else {
      copy_ = copy_ids(ids);
      data_ = copy_.get();
    }
  }
  // 0 to T - 1 along the last dimension of `tokens`, which repeats for every row of it.
  static DenseIds places(const Tensor& tokens, const char* where) {
    LLMOPS_CHECK(tokens.dim() > 0, where, ": one token of no dimension needs positions");
    const int64_t length = tokens.size(-1), count = tokens.numel();
    DenseIds ids(count);
    for (int64_t i = 0; i < count; ++i) ids.copy_[i] = i % length;
    return ids;
  }
  const int64_t* data() const { return data_; }
  int64_t count() const { return count_; }

 private:
  explicit DenseIds(int64_t count) : copy_(new int64_t[count]), data_(copy_.get()), count_(count) {}
  std::unique_ptr<int64_t[]> copy_;
  const int64_t* data_;
  int64_t count_;
};

// The values of an int64 or int32 tensor as a dense int64 array, each in [0, limit). Read and
// checked once: a value that another thread changes later cannot lead a kernel out of the table.
class CheckedIds {
 public:
  // Errors as throw_out_of_range says.
  CheckedIds(const Tensor& ids, int64_t limit, const char* where, const char* argument,
             const char* what, const char* remedy = "") {
    LLMOPS_CHECK(ids.scalar_type() == ScalarType::Long || ids.scalar_type() == ScalarType::Int,
                 where, ": ", argument, " must be int64 or int32, got ",
                 dtype_name(ids.scalar_type()));
    count_ = ids.numel();
    if (count_ > kInline) heap_.reset(new int64_t[count_]);
    data_ = count_ > kInline ? heap_.get() : inline_;
    for_ids(ids, [&](int64_t i, int64_t id) {
      if (id < 0 || id >= limit) throw_out_of_range(id, limit, where, argument, what, remedy);
      data_[i] = id;
    });
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
