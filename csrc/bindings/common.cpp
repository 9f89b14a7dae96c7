#include "common.h"

#include <pthread.h>
#include <sys/stat.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace llmops {
namespace {

bool had_threads = true;
bool is_forked = false;

// In the parent, before the fork: a folder's links are its subfolders and two, and each thread has
// one there. Where there is no /proc the answer stays "yes", which costs speed and never hangs.
void before_fork() {
  struct stat tasks;
  if (stat("/proc/self/task", &tasks) == 0) had_threads = tasks.st_nlink != 3;
}
void in_child() { is_forked = is_forked || had_threads; }

[[maybe_unused]] const int registered = pthread_atfork(before_fork, nullptr, in_child);

}  // namespace

bool forked_from_threads() { return is_forked; }

namespace {
constexpr int64_t kHugePageBytes = 2 << 20;
constexpr int64_t kAdviseFromBytes = 4 << 20;
}  // namespace

Tensor new_output(const Tensor& t, const std::vector<int64_t>& sizes, ScalarType type) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= sizes[d] > 0 ? sizes[d] : 1;
  }
  return new_output_strided(t, sizes.data(), strides.data(), static_cast<int64_t>(sizes.size()),
                            type);
}

Tensor new_output_like(const Tensor& t, ScalarType type) {
  constexpr size_t kInline = 8;
  const auto sizes = t.sizes();
  if (sizes.size() > kInline) return new_output(t, shape_of(t), type);
  int64_t strides[kInline], stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= sizes[d] > 0 ? sizes[d] : 1;
  }
  return new_output_strided(t, sizes.data(), strides, static_cast<int64_t>(sizes.size()), type);
}

void advise_huge_pages([[maybe_unused]] const void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes < kAdviseFromBytes) return;
  const auto begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (begin + kHugePageBytes - 1) / kHugePageBytes * kHugePageBytes;
  const uintptr_t last = (begin + bytes) / kHugePageBytes * kHugePageBytes;
  // Advice: a kernel that refuses it changes nothing but speed.
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

Tensor new_output_strided(const Tensor& t, const int64_t* sizes, const int64_t* strides,
                          int64_t dims, ScalarType type) {
  // The C shim itself: the dispatcher's boxed new_empty costs a microsecond more.
  int32_t device_type, device_index, dtype;
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t.get(), &device_index));
  dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, sizes, strides, dtype, device_type, device_index, &handle));
  Tensor out(handle);
  if (out.is_cpu()) advise_huge_pages(out.data_ptr(), out.numel() * element_size(type));
  return out;
}

RowIndex::RowIndex(const std::vector<int64_t>& sizes,
                   const std::vector<std::vector<int64_t>>& strides)
    : strides_(strides.size()) {
  for (int64_t size : sizes) rows_ *= size;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] == 1) continue;
    bool merges = !sizes_.empty();
    for (size_t t = 0; merges && t < strides.size(); ++t)
      merges = strides_[t].back() == strides[t][d] * sizes[d];
    if (merges) {
      sizes_.back() *= sizes[d];
    } else {
      sizes_.push_back(sizes[d]);
    }
    for (size_t t = 0; t < strides.size(); ++t) {
      if (merges) {
        strides_[t].back() = strides[t][d];
      } else {
        strides_[t].push_back(strides[t][d]);
      }
    }
  }
}

Tensor last_dim_dense(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  if (t.dim() == 0 || t.size(last) <= 1 || t.stride(last) == 1) return t;
  return torch::stable::contiguous(t);
}

std::vector<int64_t> leading_strides(const Tensor& t, int64_t drop) {
  std::vector<int64_t> result;
  for (int64_t d = 0; d + drop < t.dim(); ++d) result.push_back(t.stride(d));
  return result;
}

}  // namespace llmops
