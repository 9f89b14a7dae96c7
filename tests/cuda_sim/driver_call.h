// What driver.cpp gives to a kernel, and the line that it prints of it.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "rows.h"
#include "scheduler.h"

// The tensors of one call: inputs drawn, outputs beginning as 0xff and hashed at the end.
class Call {
 public:
  explicit Call(std::string name) : name_(std::move(name)) {}
  ~Call() {
    uint64_t hash = 1469598103934665603ull;
    for (const auto& [data, bytes] : outputs_)
      for (size_t i = 0; i < bytes; ++i) hash = (hash ^ data[i]) * 1099511628211ull;
    printf("%s %016llx\n", name_.c_str(), static_cast<unsigned long long>(hash));
  }

  void* memory(size_t bytes) {
    memory_.emplace_back(new unsigned char[bytes]);
    cuda_sim::allow(memory_.back().get(), bytes);
    return memory_.back().get();
  }
  void* written(size_t bytes) {
    void* data = memory(bytes);
    std::memset(data, 0xff, bytes);
    outputs_.emplace_back(static_cast<unsigned char*>(data), bytes);
    return data;
  }
  float* floats(int64_t count, bool output = false) {
    if (output) return static_cast<float*>(written(count * 4));
    auto* data = static_cast<float*>(memory(count * 4));
    for (int64_t i = 0; i < count; ++i) data[i] = value();
    return data;
  }
  // [rows, n], dense.
  llmops::cuda::Rows rows(int64_t rows, int64_t n, int type, bool output = false) {
    llmops::cuda::Rows r{nullptr, type, n};
    const int64_t count = rows * n;
    if (type == llmops::cuda::kF32) {
      r.data = floats(count, output);
    } else if (output) {
      r.data = written(count * 2);
    } else {
      auto* data = static_cast<uint16_t*>(memory(count * 2));
      r.data = data;
      for (int64_t i = 0; i < count; ++i) {  // truncated to bf16
        uint32_t bits;
        const float x = value();
        std::memcpy(&bits, &x, 4);
        data[i] = bits >> 16;
      }
    }
    return r;
  }

 private:
  float value() { return static_cast<float>(random_() % 2000) / 1000.0f - 1.0f; }
  std::string name_;
  std::mt19937 random_{7};
  std::vector<std::unique_ptr<unsigned char[]>> memory_;
  std::vector<std::pair<unsigned char*, size_t>> outputs_;
};
