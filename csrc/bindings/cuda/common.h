// What every CUDA binding needs: the device and the framework's current stream, tensors as kernels
// see them, errors as exceptions. The same bindings are compiled for the simulator
// (LLMOPS_CUDA_SIM), where they serve CPU tensors as torch.ops.llmops_cuda_sim.*.
#pragma once

#include "../common.h"
#include "../schemas.h"
#include "cuda/launch.h"
#include "cuda/rows.h"

#if defined(LLMOPS_CUDA_SIM)
#include "scheduler.h"
#define LLMOPS_CUDA_SCHEMAS(m) STABLE_TORCH_LIBRARY_FRAGMENT(llmops_cuda_sim, m)
#define LLMOPS_CUDA_KERNELS(m) STABLE_TORCH_LIBRARY_IMPL(llmops_cuda_sim, CPU, m)
#else
#include <torch/csrc/stable/accelerator.h>
#define LLMOPS_CUDA_SCHEMAS(m) STABLE_TORCH_LIBRARY_FRAGMENT(llmops_cuda, m)
#define LLMOPS_CUDA_KERNELS(m) STABLE_TORCH_LIBRARY_IMPL(llmops_cuda, CUDA, m)
// Lives only in the CUDA build of libtorch. Weak: on a CPU build it is null, and the library loads.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

namespace llmops {

using cuda::Rows;

// What an operator holds from its checks to its last launch: the device of `t` is current, and
// copies that had to be made for kernels live.
class Launcher {
 public:
  Launcher(const Tensor& t, const char* name)
      : name_(name)
#if !defined(LLMOPS_CUDA_SIM)
        ,
        guard_(t.get_device_index())
#endif
  {
#if defined(LLMOPS_CUDA_SIM)
    (void)t;
#else
    LLMOPS_CHECK(aoti_torch_get_current_cuda_stream != nullptr, name,
                 ": a CUDA tensor, but this torch is a CPU build");
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream_));
#endif
  }

  const char* name() const { return name_; }
  void* stream() const { return stream_; }
  // What a launcher of csrc/cuda returned.
  void check(int status) const {
    LLMOPS_CHECK(status == 0, name_, ": the CUDA launch failed: ", cuda::launch_error(status),
                 " (error ", status, ")");
  }
  // The address of a tensor that a kernel is given.
  void* data(const Tensor& t);
  // A tensor [..., n] as rows of its last `dims` dimensions taken together; copied where they are
  // not dense, or where more than three strides lead from row to row.
  Rows rows(const Tensor& t, int64_t dims = 1);
  // The same of a tensor with other strides for the leading dimensions than its own, 0 where it is
  // broadcast over `sizes`, and any step along the last; must not need a copy (see broadcast_rows).
  Rows strided_rows(const Tensor& t, const std::vector<int64_t>& sizes,
                    const std::vector<int64_t>& strides, int64_t step);
  // A tensor broadcast to x from the right, checked.
  Rows broadcast_rows(const Tensor& t, const Tensor& x, const char* what);
  static Rows none() { return {}; }

 private:
  const char* name_;
  void* stream_ = nullptr;
  std::vector<Tensor> kept_;
#if defined(LLMOPS_CUDA_SIM)
  cuda_sim::Session session_;
#else
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

}  // namespace llmops
