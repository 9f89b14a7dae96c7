// linear: x W^T + b as a raw operator, by one kernel for few rows of x and one for many.
// llmops.ops.linear owns the public schema, the checks and autograd; what is checked here keeps
// memory safe whoever calls.
#include "linear.h"

#include <memory>

#include "matmul.h"

namespace llmops {
namespace {

constexpr const char* kName = "llmops.linear";

// Bytes of weights from which on few rows of x, which wait for them, are worth a second thread:
// from a shared cache two cores read twice as fast (benchmarks/NOTES.md).
constexpr int64_t kSerialBytes = 3 * kSerialElements;

// x [..., K], w [N, K], bias [N]; parts: of fp32 by AMX, cpu/split_amx.h.
Tensor linear_cpu(const Tensor& x_in, const Tensor& w_in, const std::optional<Tensor>& bias_in,
                  int64_t parts) {
  LLMOPS_CHECK(x_in.dim() >= 1 && w_in.dim() == 2 && x_in.size(-1) == w_in.size(1) &&
                   x_in.scalar_type() == w_in.scalar_type(),
               kName, ": x must be [..., K] and weight [N, K], of one dtype");
  LLMOPS_CHECK(parts >= 1 && parts <= 3, kName, ": parts must be 1, 2 or 3; got ", parts);
  const int64_t n = w_in.size(0), k = w_in.size(1);
  cpu::LinearParams p{};
  p.type = kernel_dtype(x_in.scalar_type(), kName);
  p.k = k;
  Tensor x = last_dim_dense(x_in);
  std::optional<Tensor> bias;
  if (bias_in.has_value()) {
    LLMOPS_CHECK(
        bias_in->dim() == 1 && bias_in->size(0) == n && bias_in->scalar_type() == x.scalar_type(),
        kName, ": bias must be [N], of x's dtype");
    bias = last_dim_dense(*bias_in);
    p.bias = bias->data_ptr();
  }
  std::vector<int64_t> sizes = shape_of(x);
  sizes.back() = n;
  Tensor y = new_output(x, sizes);
  if (y.numel() == 0) return y;
  sizes.pop_back();
  const RowIndex given(sizes, {leading_strides(x)});
  if (!given.uniform()) x = torch::stable::contiguous(x);
  const int64_t x_step = given.uniform() ? given.step(0) : k;
  p.rows = given.rows();
  p.y = y.data_ptr();
  p.y_stride = n;

  const bool many = !are_few(p.type, p.rows, static_cast<int>(parts));
  const Tensor w = many && w_in.stride(0) == 1 ? w_in : last_dim_dense(w_in);
  p.w = w.data_ptr();
  p.w_stride = w.stride(0);
  if (many) {
    const cpu::MatmulOperand a{x.data_ptr(), x_step, 1}, b{p.w, w.stride(0), w.stride(1)};
    cpu::MatmulParams product{p.type, p.rows, n, k, a, b, p.bias, p.y, n};
    product.parts = static_cast<int>(parts);
    product.past = true;
    matmul(product);
    return y;
  }
  few_rows(p, x.data_ptr(), x_step, n);
  return y;
}

}  // namespace

bool are_few(cpu::DType type, int64_t rows, int parts) {
  // bf16 in pairs, or by tiles, has at least twice the flops of the fp32 that matmul makes of it.
  if (type == cpu::DType::bf16 && cpu::active_isa() >= cpu::Isa::avx512_bf16) return true;
  // As measured (benchmarks/NOTES.md).
  if (cpu::active_isa() == cpu::Isa::avx2) return rows <= 128;
  if (cpu::active_isa() != cpu::Isa::amx) return rows <= 64;
  if (type == cpu::DType::f16) return rows <= 64;
  return rows <= (parts == 3 ? 48 : 32);
}

void few_rows(const cpu::LinearParams& p, const void* x, int64_t x_step, int64_t n) {
  constexpr int64_t kLine = 64 / sizeof(float);
  const std::unique_ptr<float[]> floats(
      new float[LLMOPS_CPU_CALL(linear_scratch)(p.type, p.rows, p.k) + kLine]);
  float* const packed =
      floats.get() + (-reinterpret_cast<uintptr_t>(floats.get()) / 4 & (kLine - 1));
  LLMOPS_CPU_CALL(linear_pack)(p.type, p.rows, p.k, x, x_step, packed);
  const auto kernel = LLMOPS_CPU_CALL(linear_fwd);
  const int64_t bytes = n * p.k * (p.type == cpu::DType::f32 ? 4 : 2);
  const bool worthwhile = bytes >= kSerialBytes || p.rows * n * p.k >= kSerialProducts;
  if (!worthwhile || forked_from_threads()) {
    kernel(p, packed, 0, n);
  } else {
    parallel_for(0, n, 1, [&](int64_t begin, int64_t end) { kernel(p, packed, begin, end); });
  }
}

STABLE_TORCH_LIBRARY_FRAGMENT(llmops_cpu, m) {
  m.def("linear(Tensor x, Tensor weight, Tensor? bias=None, int parts=3) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(llmops_cpu, CPU, m) { m.impl("linear", TORCH_BOX(&linear_cpu)); }

}  // namespace llmops
