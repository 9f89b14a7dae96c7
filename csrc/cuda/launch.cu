#include "launch.h"

#include "device.h"

namespace llmops::cuda {

const char* launch_error(int status) {
  return cudaGetErrorString(static_cast<cudaError_t>(status));
}

}  // namespace llmops::cuda
