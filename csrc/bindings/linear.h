// x W^T of few rows of x, which linear and matmul share: cpu/linear.h over the threads.
#pragma once
#include "common.h"
#include "cpu/linear.h"

namespace llmops {

// Whether so many rows are cheaper so than by matmul (MatmulParams::parts), which packs the
// weights.
bool are_few(cpu::DType type, int64_t rows, int parts);
// x: dense rows of p.k elements, x_step apart; n: rows of weights.
void few_rows(const cpu::LinearParams& p, const void* x, int64_t x_step, int64_t n);

}  // namespace llmops
