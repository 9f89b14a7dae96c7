// The machine's limits as raw operators for `llmops bench`, on all of torch's threads at once.
#include "cpu/limits.h"

#include "common.h"

namespace llmops {
namespace {

constexpr int64_t kGrain = int64_t{1} << 16;  // elements; a multiple of every vector

const float* floats(const Tensor& x, const char* where) {
  LLMOPS_CHECK(x.is_contiguous() && x.scalar_type() == ScalarType::Float, where,
               ": x must be contiguous float32");
  return static_cast<const float*>(x.data_ptr());
}

// Flops done by all threads together; 0 where this instruction set has no bf16 pair product.
int64_t fma_peak_cpu(bool pairs, int64_t iterations) {
  const auto kernel = LLMOPS_CPU_CALL(fma_peak);
  std::atomic<int64_t> flops{0};
  torch::stable::parallel_for(0, static_cast<int64_t>(torch::stable::get_num_threads()), 1,
                              [&](int64_t begin, int64_t end) {
                                for (int64_t i = begin; i < end; ++i) {
                                  float result;
                                  flops += kernel(pairs, iterations, &result);
                                  // A result that no one looks at could be left out.
                                  if (result == -1.0f) flops += 1;
                                }
                              });
  return flops;
}

double read_peak_cpu(const Tensor& x) {
  const float* data = floats(x, "llmops_cpu.read_peak");
  const auto kernel = LLMOPS_CPU_CALL(read_peak);
  std::atomic<int64_t> zeros{0};
  torch::stable::parallel_for(0, x.numel(), kGrain, [&](int64_t begin, int64_t end) {
    zeros += kernel(end - begin, data + begin) == 0.0f;
  });
  return static_cast<double>(zeros.load());
}

Tensor copy_peak_cpu(const Tensor& x, Tensor y) {
  const float* from = floats(x, "llmops_cpu.copy_peak");
  auto* to = const_cast<float*>(floats(y, "llmops_cpu.copy_peak"));
  LLMOPS_CHECK(x.numel() == y.numel(), "llmops_cpu.copy_peak: x and y must be of one size");
  const auto kernel = LLMOPS_CPU_CALL(copy_peak);
  torch::stable::parallel_for(0, x.numel(), kGrain, [&](int64_t begin, int64_t end) {
    kernel(end - begin, from + begin, to + begin);
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(llmops_cpu, m) {
  m.def("fma_peak(bool pairs, int iterations) -> int");
  m.def("read_peak(Tensor x) -> float");
  m.def("copy_peak(Tensor x, Tensor(a!) y) -> Tensor(a!)");
}
STABLE_TORCH_LIBRARY_IMPL(llmops_cpu, CompositeExplicitAutograd, m) {
  m.impl("fma_peak", TORCH_BOX(&fma_peak_cpu));
}
STABLE_TORCH_LIBRARY_IMPL(llmops_cpu, CPU, m) {
  m.impl("read_peak", TORCH_BOX(&read_peak_cpu));
  m.impl("copy_peak", TORCH_BOX(&copy_peak_cpu));
}

}  // namespace llmops
