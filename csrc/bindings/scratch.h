// Memory that a kernel works in.
#pragma once
#include <cstdint>
#include <memory>

namespace llmops {

// One block of 64-byte aligned scratch per thread, kept between calls: fresh pages would cost more
// than the work of a small call. Buffers past kKeepBytes go back after use.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : large_(bytes > kKeepBytes) {
    thread_local Buffer kept;
    if (large_) {
      own_.reserve(bytes);
      data_ = own_.data();
    } else {
      kept.reserve(bytes);
      data_ = kept.data();
    }
  }
  void* data() const { return data_; }

 private:
  static constexpr int64_t kKeepBytes = 8 << 20;
  class Buffer {
   public:
    void reserve(int64_t bytes) {
      if (bytes <= size_) return;
      storage_.reset(new char[bytes + 64]);
      size_ = bytes;
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
