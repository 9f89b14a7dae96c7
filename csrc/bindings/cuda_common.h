// What every CUDA binding needs: the framework's current stream, and errors as exceptions.
#pragma once

#include "common.h"

// Lives only in the CUDA build of libtorch. Weak: on a CPU build it is null, and the library loads.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace llmops {

inline void* current_cuda_stream(const Tensor& t) {
  LLMOPS_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
               "llmops: a CUDA tensor, but this torch is a CPU build");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return stream;
}

inline void check_cuda(int status, const char* where) {
  LLMOPS_CHECK(status == 0, where, ": the CUDA launch failed with error ", status);
}

}  // namespace llmops
