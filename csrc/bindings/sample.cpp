// sample: one token id per row of logits, as a raw operator. The uniform numbers come from Python's
// generator: generators do not cross the stable ABI.
#include "cpu/sample.h"

#include <memory>

#include "common.h"

namespace llmops {
namespace {

constexpr const char* kName = "llmops.sample";

[[noreturn]] void fail(int64_t row, int64_t code) {
  const char* why = code == cpu::kSampleNan     ? " holds NaN"
                    : code == cpu::kSampleEmpty ? " is -inf in every place: no token is left"
                                                : " holds +inf, which has no probability";
  throw std::invalid_argument(message(kName, ": row ", row, " of logits", why,
                                      "; check what computes or masks the logits"));
}

// logits [B, V], uniform [B] float64 (not read for temperature 0).
Tensor sample_cpu(const Tensor& logits_in, const std::optional<Tensor>& uniform_in,
                  double temperature, int64_t top_k, double top_p, double min_p) {
  LLMOPS_CHECK(logits_in.dim() == 2, kName, ": logits must be [B, V]");
  const Tensor logits = last_dim_dense(logits_in);
  const int64_t rows = logits.size(0), n = logits.size(1);
  const cpu::DType type = kernel_dtype(logits.scalar_type(), kName);
  cpu::SampleParams p{static_cast<float>(temperature), top_k, static_cast<float>(top_p),
                      static_cast<float>(min_p)};
  // A positive temperature stays positive.
  if (temperature > 0.0 && p.temperature < 1e-37f) p.temperature = 1e-37f;
  std::optional<Tensor> uniform;
  const double* uniform_data = nullptr;
  if (p.temperature != 0.0f) {
    LLMOPS_CHECK(uniform_in.has_value() && uniform_in->dim() == 1 && uniform_in->size(0) == rows &&
                     uniform_in->scalar_type() == ScalarType::Double,
                 kName, ": uniform must be float64 [B]");
    uniform = last_dim_dense(*uniform_in);
    uniform_data = static_cast<const double*>(uniform->data_ptr());
  }
  Tensor out = new_output(logits, {rows}, ScalarType::Long);
  if (rows == 0) return out;
  LLMOPS_CHECK(n > 0 && n < (int64_t{1} << 31), kName, ": logits must have 1 to 2^31 - 1 columns");
  const auto* from = static_cast<const char*>(logits.data_ptr());
  auto* to = static_cast<int64_t*>(out.data_ptr());
  const int64_t step = logits.stride(0) * element_size(logits.scalar_type());
  const auto kernel = LLMOPS_CPU_CALL(sample_row);
  parallel_rows(rows, n, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> scratch(new float[cpu::sample_scratch(n)]);
    for (int64_t r = begin; r < end; ++r)
      to[r] =
          kernel(p, type, n, from + r * step, uniform_data ? uniform_data[r] : 0.0, scratch.get());
  });
  for (int64_t r = 0; r < rows; ++r)
    if (to[r] < 0) fail(r, to[r]);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(llmops_cpu, m) {
  m.def(
      "sample(Tensor logits, Tensor? uniform, float temperature, int top_k, float top_p, "
      "float min_p) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(llmops_cpu, CPU, m) { m.impl("sample", TORCH_BOX(&sample_cpu)); }

}  // namespace llmops
