// matmul: a b as a raw operator, for `linear` and its gradients. llmops.ops.linear owns the public
// schema, the checks and autograd; what is checked here keeps memory safe whoever calls.
#include "matmul.h"

#include "scratch.h"

namespace llmops {
namespace {

constexpr const char* kName = "llmops.matmul";

// Dense in one dimension; `outer` is the other one than k.
Tensor operand(const Tensor& t, int64_t outer, cpu::MatmulOperand& out) {
  const bool usable = t.stride(0) == 1 || t.stride(1) == 1;
  const Tensor dense = usable ? t : torch::stable::contiguous(t);
  out = {dense.data_ptr(), dense.stride(outer), dense.stride(1 - outer)};
  return dense;
}

Tensor matmul_cpu(const Tensor& a_in, const Tensor& b_in) {
  LLMOPS_CHECK(a_in.dim() == 2 && b_in.dim() == 2 && a_in.size(1) == b_in.size(0) &&
                   a_in.scalar_type() == b_in.scalar_type(),
               kName, ": a must be [M, K] and b [K, N], of one dtype");
  cpu::MatmulParams p{};
  p.type = kernel_dtype(a_in.scalar_type(), kName);
  p.m = a_in.size(0), p.n = b_in.size(1), p.k = a_in.size(1);
  const Tensor a = operand(a_in, 0, p.a), b = operand(b_in, 1, p.b);
  const Tensor y = new_output(a_in, {p.m, p.n});
  p.y = y.data_ptr();
  p.y_stride = p.n;
  matmul(p);
  return y;
}

}  // namespace

void matmul(const cpu::MatmulParams& p) {
  if (p.m == 0 || p.n == 0) return;
  const cpu::MatmulPlan plan = LLMOPS_CPU_CALL(matmul_plan)(p);
  const auto pack = LLMOPS_CPU_CALL(matmul_pack);
  const auto block = LLMOPS_CPU_CALL(matmul_block);
  const bool worthwhile = p.m * p.n * p.k >= kSerialProducts;
  const std::unique_ptr<float[]> packed(
      new float[plan.panel / plan.strip * plan.strip_floats + plan.strip]);
  for (int64_t column = 0; column < p.n; column += plan.panel) {
    const int64_t end = column + plan.panel < p.n ? column + plan.panel : p.n;
    const int64_t strips = (end - column + plan.strip - 1) / plan.strip;
    parallel_tasks(strips, worthwhile, [&](int64_t s) {
      pack(p, column + s * plan.strip, packed.get() + s * plan.strip_floats);
    });
    parallel_tasks((p.m + plan.block - 1) / plan.block, worthwhile, [&](int64_t i) {
      const Scratch scratch(plan.scratch_floats * static_cast<int64_t>(sizeof(float)));
      block(p, column, end, packed.get(), i * plan.block, static_cast<float*>(scratch.data()));
    });
  }
}

STABLE_TORCH_LIBRARY_FRAGMENT(llmops_cpu, m) { m.def("matmul(Tensor a, Tensor b) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(llmops_cpu, CPU, m) { m.impl("matmul", TORCH_BOX(&matmul_cpu)); }

}  // namespace llmops
