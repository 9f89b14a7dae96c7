#pragma once
#include <cstdint>
#include <string>

namespace llmops::cuda {

// Launches the kernel of that name; false where there is none.
bool selftest(const std::string& name, const float* x, float* y, int n);
// fp32 to 16 bits and back, as kernels do.
void convert(const float* x, uint16_t* y, float* back, int n, bool bf16);

}  // namespace llmops::cuda
