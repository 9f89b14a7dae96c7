// What every binding shares: checks, dtypes, output allocation, strided row addressing, threads.
// The bindings are the only C++ that sees torch, and only through its stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <atomic>
#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>
#ifdef __SANITIZE_THREAD__
#include <thread>
#endif

#include "cpu/isa.h"

namespace llmops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Error text without the file and line that torch's own macro prepends: users read it.
#define LLMOPS_CHECK(condition, ...)                                  \
  do {                                                                \
    if (!(condition)) throw std::runtime_error(message(__VA_ARGS__)); \
  } while (0)

template <class... Parts>
std::string message(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

inline const char* dtype_name(ScalarType type) { return torch::headeronly::toString(type); }

inline cpu::DType kernel_dtype(ScalarType type, const char* where) {
  switch (type) {
    case ScalarType::Float:
      return cpu::DType::f32;
    case ScalarType::BFloat16:
      return cpu::DType::bf16;
    case ScalarType::Half:
      return cpu::DType::f16;
    default:
      break;
  }
  throw std::runtime_error(message(where, ": dtype ", dtype_name(type),
                                   " is not supported by the C++ kernels (float32, bfloat16 and "
                                   "float16 are); use backend=\"reference\""));
}

inline int64_t element_size(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
    case ScalarType::Long:
      return 8;
    case ScalarType::Float:
    case ScalarType::Int:
      return 4;
    case ScalarType::BFloat16:
    case ScalarType::Half:
      return 2;
    default:
      return 1;
  }
}

inline std::vector<int64_t> shape_of(const Tensor& t) {
  return {t.sizes().begin(), t.sizes().end()};
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  const auto x = a.sizes(), y = b.sizes();
  if (x.size() != y.size()) return false;
  for (size_t d = 0; d < x.size(); ++d)
    if (x[d] != y[d]) return false;
  return true;
}

// Asks for huge pages where there are many: the first touch of a 4 KiB page costs about 2 us, which
// for a row op is more than computing it.
void advise_huge_pages(const void* data, int64_t bytes);

// A fresh, uninitialized tensor on t's device, large ones in huge pages.
Tensor new_output(const Tensor& t, const std::vector<int64_t>& sizes, ScalarType type);
// The same with t's own sizes, contiguous.
Tensor new_output_like(const Tensor& t, ScalarType type);
// The same with any dense order of the dimensions in memory.
Tensor new_output_strided(const Tensor& t, const int64_t* sizes, const int64_t* strides,
                          int64_t dims, ScalarType type);
inline Tensor new_output(const Tensor& t, const std::vector<int64_t>& sizes) {
  return new_output(t, sizes, t.scalar_type());
}

// Whether outputs of so many bytes are stored past the caches: beyond the last level, caching them
// would only push out what is still wanted, and the store past it saves reading the line first.
bool past_caches(int64_t bytes);

// Addresses the rows of a tensor [..., n] whose leading dimensions have any strides: dimensions
// that follow each other in memory are merged, so that a contiguous tensor needs no division.
class RowIndex {
 public:
  // `tensors` have the same leading sizes; index k addresses tensors[k]. `dims` leading ones count.
  RowIndex(const std::vector<int64_t>& sizes, const std::vector<std::vector<int64_t>>& strides);
  int64_t rows() const { return rows_; }
  int64_t offset(size_t tensor, int64_t row) const {
    int64_t result = 0;
    for (size_t d = sizes_.size(); d-- > 1;) {
      result += (row % sizes_[d]) * strides_[tensor][d];
      row /= sizes_[d];
    }
    return sizes_.empty() ? 0 : result + row * strides_[tensor][0];
  }
  // How many rows from `row` on, before `end`, lie one constant stride apart in every tensor, and
  // that stride.
  int64_t run(int64_t row, int64_t end) const {
    const int64_t left = sizes_.size() <= 1 ? rows_ - row : sizes_.back() - row % sizes_.back();
    return left < end - row ? left : end - row;
  }
  int64_t step(size_t tensor) const { return sizes_.empty() ? 0 : strides_[tensor].back(); }
  // True when every tensor's rows are one constant stride apart.
  bool uniform() const { return sizes_.size() <= 1; }

 private:
  int64_t rows_ = 1;
  std::vector<int64_t> sizes_;
  std::vector<std::vector<int64_t>> strides_;
};

// t with stride 1 in its last dimension (or one element there), copied if it must be.
Tensor last_dim_dense(const Tensor& t);
// Strides of t's leading dimensions (all but the last `drop`).
std::vector<int64_t> leading_strides(const Tensor& t, int64_t drop = 1);

// Below this many elements the cost of waking a worker (55-85 us) exceeds the work.
#ifdef __SANITIZE_THREAD__
constexpr int64_t kSerialElements = 100;  // the tests are small, and threads are what it looks at
#else
constexpr int64_t kSerialElements = 50000;
#endif

// Whether this process is a fork of one that had threads. OpenMP's pool does not survive a fork,
// and the first parallel region in such a child waits for it forever: there we stay on one thread.
bool forked_from_threads();

#ifdef __SANITIZE_THREAD__
// ThreadSanitizer does not know OpenMP's barriers and would report every hand-over: threads of our
// own, which it knows, four of them.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  const int64_t most = (end - begin + grain - 1) / grain;
  const int64_t chunks = most < 4 ? most : 4;
  std::vector<std::thread> threads;
  for (int64_t c = 0; c < chunks; ++c)
    threads.emplace_back([&, c] {
      f(begin + (end - begin) * c / chunks, begin + (end - begin) * (c + 1) / chunks);
    });
  for (std::thread& t : threads) t.join();
}
#else
using torch::stable::parallel_for;
#endif

// f(begin, end) over [0, rows), split among the framework's threads when it pays.
template <class F>
void parallel_rows(int64_t rows, int64_t elements_per_row, const F& f) {
  if (rows <= 0) return;
  if (rows == 1 || rows * elements_per_row < kSerialElements || forked_from_threads()) {
    f(int64_t{0}, rows);
    return;
  }
  const int64_t grain = kSerialElements / 2 / (elements_per_row > 0 ? elements_per_row : 1) + 1;
  parallel_for(0, rows, grain, f);
}

// f(task) for each task of [0, tasks), handed out one at a time: uneven tasks balance themselves.
template <class F>
void parallel_tasks(int64_t tasks, bool worthwhile, const F& f) {
  const bool parallel = worthwhile && !forked_from_threads();
  const int64_t threads = parallel ? static_cast<int64_t>(torch::stable::get_num_threads()) : 1;
  if (threads <= 1 || tasks <= 1) {
    for (int64_t task = 0; task < tasks; ++task) f(task);
    return;
  }
  std::atomic<int64_t> next{0};
  parallel_for(0, threads < tasks ? threads : tasks, 1, [&](int64_t, int64_t) {
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) f(task);
  });
}

}  // namespace llmops
