// Lengths and block tables of sequences, read from integer tensors and checked once: a value that
// another thread changes later cannot lead a kernel out of a buffer.
#pragma once
#include <vector>

#include "ids.h"

namespace llmops {

template <class... Parts>
[[noreturn]] void throw_value_error(const Parts&... parts) {
  throw std::invalid_argument(message(parts...));  // a ValueError in Python
}

inline std::vector<int64_t> read_integers(const Tensor& t, int64_t count, const char* where,
                                          const char* argument) {
  LLMOPS_CHECK(t.scalar_type() == ScalarType::Long || t.scalar_type() == ScalarType::Int, where,
               ": ", argument, " must be int64 or int32, got ", dtype_name(t.scalar_type()));
  LLMOPS_CHECK(t.dim() == 1 && t.size(0) == count, where, ": ", argument, " must be [", count, "]");
  std::vector<int64_t> values(count);
  for_ids(t, [&](int64_t i, int64_t value) { values[i] = value; });
  return values;
}

// A cache [B, Hkv, Tmax, D], or [blocks, Hkv, page, D] with a table [B, width] of block ids.
class CacheLayout {
 public:
  CacheLayout(const Tensor& cache, const std::optional<Tensor>& table, int64_t batch,
              const char* where)
      : where_(where), blocks_(cache.size(0)), capacity_(cache.size(2)) {
    if (!table.has_value()) return;
    LLMOPS_CHECK(
        table->scalar_type() == ScalarType::Long || table->scalar_type() == ScalarType::Int, where,
        ": block_table must be int64 or int32, got ", dtype_name(table->scalar_type()));
    LLMOPS_CHECK(table->dim() == 2 && table->size(0) == batch, where, ": block_table must be [",
                 batch, ", blocks of a sequence]");
    LLMOPS_CHECK(cache.size(2) > 0, where, ": a page of the cache must hold at least one key");
    page_ = cache.size(2), width_ = table->size(1);
    capacity_ = page_ * width_;
    ids_ = copy_ids(*table);
  }
  int64_t page() const { return page_; }  // 0: not paged
  int64_t capacity() const { return capacity_; }
  // The block ids of a sequence, of which those that hold rows [begin, end) are checked; null where
  // there are no pages.
  const int64_t* pages(int64_t sequence, int64_t begin, int64_t end) const {
    if (page_ == 0) return nullptr;
    const int64_t* ids = ids_.get() + sequence * width_;
    if (begin >= end) return ids;
    for (int64_t i = begin / page_; i <= (end - 1) / page_; ++i) {
      if (ids[i] < 0 || ids[i] >= blocks_)
        throw_out_of_range(ids[i], blocks_, where_, "block_table", "the cache has",
                           message(", in sequence ", sequence, "'s entry ", i).c_str());
    }
    return ids;
  }

 private:
  const char* where_;
  int64_t blocks_, capacity_, page_ = 0, width_ = 0;
  std::unique_ptr<int64_t[]> ids_;
};

}  // namespace llmops
