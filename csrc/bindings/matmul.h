// The matrix product that linear and its gradients share: cpu/matmul.h over the threads.
#pragma once
#include "common.h"
#include "cpu/matmul.h"

namespace llmops {

// Products below which a second thread costs more than it saves (about 100 us of one): 20 to an
// element of what is serial elsewhere, and small under ThreadSanitizer as that is.
constexpr int64_t kSerialProducts = 20 * kSerialElements;

// p.past: whether y may be stored so.
void matmul(cpu::MatmulParams p);

}  // namespace llmops
