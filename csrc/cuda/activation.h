// Activations and gated activations of rows on CUDA, and their gradients: gelu, swiglu, geglu.
//   y = act(gate) up,  dgate = dy up act'(gate),  dup = dy act(gate);  without `up` it counts as 1
//   silu(x) = x s(x), s(x) = 1 / (1 + exp(-x));  gelu(x) = x Phi(x);  its tanh form:
//   x s(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3), as (1 + tanh u) / 2 = s(2 u)
#pragma once
#include "rows.h"

namespace llmops::cuda {

enum Activation : int { kSilu = 0, kGelu = 1, kGeluTanh = 2 };

// [rows, n] each, dense along n; one row of all elements where every tensor is contiguous.
struct ActivationForward {
  Rows gate, up, y;  // up: or none
  int64_t rows, n;
  int activation;
  bool wide;
};
int activation_fwd(const ActivationForward& p, void* stream);

struct ActivationBackward {
  Rows dy, gate, up, dgate, dup;  // up and dup: both or none
  int64_t rows, n;
  int activation;
  bool wide;
};
int activation_bwd(const ActivationBackward& p, void* stream);

}  // namespace llmops::cuda
