// Memory that a kernel works in.
#pragma once
#include <cstdint>
#include <memory>

#include "common.h"

namespace llmops {

// A block of 64-byte aligned scratch per thread and use, kept between calls: fresh pages would cost
// more than the work of a small call. Buffers past what is kept go back after use.
class Scratch {
 public:
  // What one thread may hold at once.
  enum Use { block, panel };

  explicit Scratch(int64_t bytes, Use use = block) : large_(bytes > kKeepBytes[use]) {
    thread_local Buffer kept[2];
    if (large_) {
      own_.reserve(bytes);
      data_ = own_.data();
    } else {
      kept[use].reserve(bytes);
      data_ = kept[use].data();
    }
  }
  void* data() const { return data_; }

 private:
  static constexpr int64_t kKeepBytes[] = {8 << 20, 24 << 20};
  class Buffer {
   public:
    void reserve(int64_t bytes) {
      if (bytes <= size_) return;
      storage_.reset();
      size_ = 0;  // of nothing, should there be no memory for more
      storage_.reset(new char[bytes + 64]);
      size_ = bytes;
      advise_huge_pages(storage_.get(), bytes);
    }
    void* data() const {
      return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(storage_.get()) + 63) / 64 * 64);
    }

   private:
    std::unique_ptr<char[]> storage_;
    int64_t size_ = 0;
  };
  Buffer own_;
  bool large_;
  void* data_;
};

}  // namespace llmops
