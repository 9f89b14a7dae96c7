// matmul: a b as a raw operator, for `linear` and its gradients. llmops.ops.linear owns the public
// schema, the checks and autograd; what is checked here keeps memory safe whoever calls.
#include "matmul.h"

#include "linear.h"
#include "scratch.h"

namespace llmops {
namespace {

constexpr const char* kName = "llmops.matmul";
constexpr int64_t kTasks = 4;  // per thread
// Results of tiles from here on go past the caches, where there is time for it
// (benchmarks/NOTES.md).
constexpr int64_t kPastBytes = 16 << 20, kPastDepth = 256;

// Dense in one dimension; `outer` is the other one than k.
Tensor operand(const Tensor& t, int64_t outer, cpu::MatmulOperand& out) {
  const bool usable = t.stride(0) == 1 || t.stride(1) == 1;
  const Tensor dense = usable ? t : torch::stable::contiguous(t);
  out = {dense.data_ptr(), dense.stride(outer), dense.stride(1 - outer)};
  return dense;
}

void check(const Tensor& a, const Tensor& b) {
  LLMOPS_CHECK(
      a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(0) && a.scalar_type() == b.scalar_type(),
      kName, ": a must be [M, K] and b [K, N], of one dtype");
}

// fresh: y is memory of new_output's.
void multiply(const Tensor& a_in, const Tensor& b_in, const Tensor& y, bool fresh, bool add,
              int64_t parts) {
  cpu::MatmulParams p{};
  p.type = kernel_dtype(a_in.scalar_type(), kName);
  p.m = a_in.size(0), p.n = b_in.size(1), p.k = a_in.size(1);
  const Tensor a = operand(a_in, 0, p.a), b = operand(b_in, 1, p.b);
  p.y = y.data_ptr();
  p.y_stride = y.stride(0);
  p.past = fresh;
  LLMOPS_CHECK(parts >= 1 && parts <= 3, kName, ": parts must be 1, 2 or 3; got ", parts);
  p.add = add;
  p.wide = y.scalar_type() != a_in.scalar_type();
  p.parts = static_cast<int>(parts);
  if (p.a.k_step == 1 && p.b.k_step == 1 && !add && !p.wide && are_few(p.type, p.m, p.parts) &&
      y.numel() > 0)
    return few_rows({p.type, p.m, p.k, p.b.data, nullptr, p.y, p.b.outer_step, p.y_stride},
                    p.a.data, p.a.outer_step, p.n);
  matmul(p);
}

Tensor matmul_cpu(const Tensor& a, const Tensor& b, int64_t parts) {
  check(a, b);
  const Tensor y = new_output(a, {a.size(0), b.size(1)});
  multiply(a, b, y, true, false, parts);
  return y;
}

void matmul_into_cpu(const Tensor& a, const Tensor& b, Tensor y, bool add, int64_t parts) {
  check(a, b);
  const bool fp32 = kernel_dtype(y.scalar_type(), kName) == cpu::DType::f32;
  LLMOPS_CHECK(y.dim() == 2 && y.size(0) == a.size(0) && y.size(1) == b.size(1) &&
                   (y.stride(1) == 1 || y.size(1) <= 1),
               kName, ": y must be [M, N] with dense rows");
  LLMOPS_CHECK(y.scalar_type() == a.scalar_type() || (fp32 && cpu::active_isa() == cpu::Isa::amx),
               kName, ": y must have a's dtype, or be fp32 where AMX multiplies");
  LLMOPS_CHECK(fp32 || !add, kName, ": what is added to must be fp32");
  multiply(a, b, y, false, add, parts);
}

}  // namespace

void matmul(cpu::MatmulParams p) {
  if (p.m == 0 || p.n == 0) return;
  const bool worthwhile = p.m * p.n * p.k >= kSerialProducts;
  p.past = p.past && p.k > kPastDepth &&
           p.m * p.n * static_cast<int64_t>(sizeof(float)) > kPastBytes &&
           reinterpret_cast<uintptr_t>(p.y) % 64 == 0 && p.y_stride % 16 == 0;
  const cpu::MatmulPlan plan = LLMOPS_CPU_CALL(matmul_plan)(p);
  const auto pack = LLMOPS_CPU_CALL(matmul_pack);
  const auto block = LLMOPS_CPU_CALL(matmul_block);
  const int64_t threads = static_cast<int64_t>(torch::stable::get_num_threads());
  const Scratch panel(
      plan.panel / plan.strip * plan.strip_floats * static_cast<int64_t>(sizeof(float)),
      Scratch::panel);
  float* const packed = static_cast<float*>(panel.data());
  for (int64_t column = 0; column < p.n; column += plan.panel) {
    const int64_t end = column + plan.panel < p.n ? column + plan.panel : p.n;
    const int64_t strips = (end - column + plan.strip - 1) / plan.strip;
    if (plan.strip_floats > 0) {
      parallel_tasks(strips, worthwhile, [&](int64_t s) {
        pack(p, column + s * plan.strip, packed + s * plan.strip_floats);
      });
    }
    // A few strips at a time where blocks of rows alone would leave threads idle. Each such piece
    // packs its block of a: where it packs strips of b, too, one to a thread is enough.
    const int64_t blocks = (p.m + plan.block - 1) / plan.block;
    const int64_t tasks = (plan.strip_floats > 0 ? kTasks : 1) * threads;
    const int64_t wanted = worthwhile && threads > 1 ? (tasks + blocks - 1) / blocks : 1;
    const int64_t each = (strips + wanted - 1) / wanted;
    const int64_t pieces = (strips + each - 1) / each;
    parallel_tasks(blocks * pieces, worthwhile, [&](int64_t i) {
      const Scratch scratch(plan.scratch_floats * static_cast<int64_t>(sizeof(float)));
      const int64_t strip = i % pieces * each, from = column + strip * plan.strip;
      const int64_t to = from + each * plan.strip < end ? from + each * plan.strip : end;
      block(p, from, to, packed + strip * plan.strip_floats, i / pieces * plan.block,
            static_cast<float*>(scratch.data()));
    });
  }
}

STABLE_TORCH_LIBRARY_FRAGMENT(llmops_cpu, m) {
  m.def("matmul(Tensor a, Tensor b, int parts=3) -> Tensor");
  m.def("matmul_into(Tensor a, Tensor b, Tensor(a!) y, bool add=False, int parts=3) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(llmops_cpu, CPU, m) {
  m.impl("matmul", TORCH_BOX(&matmul_cpu));
  m.impl("matmul_into", TORCH_BOX(&matmul_into_cpu));
}

}  // namespace llmops
