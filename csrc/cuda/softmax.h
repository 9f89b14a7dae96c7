// Row softmax on CUDA, y[r, i] = exp(scale x[r, i] - max) / sum. No torch here: raw pointers in, a
// cudaError_t as int out.
#pragma once
#include <cstdint>

namespace llmops::cuda {

// x, y: [rows, n], rows `x_stride` and `y_stride` elements apart, elements dense.
// type: 0 float32, 1 bfloat16, 2 float16, for both. Queued on `stream`; returns at once.
int softmax_fwd(const void* x, void* y, int type, int64_t rows, int64_t n, int64_t x_stride,
                int64_t y_stride, float scale, void* stream);

}  // namespace llmops::cuda
