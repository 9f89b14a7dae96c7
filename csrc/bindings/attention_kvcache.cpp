// attention_kvcache: the attention kernels over a contiguous or paged cache. llmops.ops owns the
// public schema and the checks; what is checked here keeps memory safe whoever calls.
#include "attention.h"
#include "sequences.h"

namespace llmops {
namespace {

constexpr const char* kName = "llmops.attention_kvcache";

std::tuple<Tensor, Tensor> attention_kvcache_cpu(
    const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& cache_seqlens,
    const std::optional<Tensor>& block_table, const std::optional<Tensor>& cache_leftpad,
    bool causal, double scale, int64_t window_left, int64_t window_right,
    const std::optional<Tensor>& alibi_slopes, double softcap, const std::optional<Tensor>& sinks) {
  LLMOPS_CHECK(q.dim() == 4 && k_cache.dim() == 4 && v_cache.dim() == 4, kName,
               ": q, k_cache and v_cache must have 4 dimensions");
  const int64_t batch = q.size(0);
  const CacheLayout layout(k_cache, block_table, batch, kName);
  const auto ends = read_integers(cache_seqlens, batch, kName, "cache_seqlens");
  std::vector<int64_t> begins(batch, 0);
  if (cache_leftpad.has_value())
    begins = read_integers(*cache_leftpad, batch, kName, "cache_leftpad");
  UnequalSequences unequal{};
  unequal.page = layout.page();
  unequal.sequences.reserve(batch);
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t begin = begins[b], end = ends[b];
    if (end < 0 || end > layout.capacity())
      throw_value_error(kName, ": cache_seqlens holds ", end, " for sequence ", b,
                        ", expected 0 to ", layout.capacity(), ", what the cache can hold");
    if (begin < 0 || begin > end)
      throw_value_error(kName, ": cache_leftpad holds ", begin, " for sequence ", b,
                        ", expected 0 to its cache_seqlens of ", end);
    unequal.sequences.push_back(
        {0, q.size(2), begin, end - begin, layout.pages(b, begin, end), {}, 0});
  }
  return attention_forward(
      q, k_cache, v_cache, std::nullopt, causal, scale,
      {window_left, window_right, alibi_slopes, softcap, sinks, 0.0, std::nullopt}, &unequal);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(llmops_cpu, m) {
  m.def(
      "attention_kvcache(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens, "
      "Tensor? block_table, Tensor? cache_leftpad, bool causal, float scale, int window_left=-1, "
      "int window_right=-1, Tensor? alibi_slopes=None, float softcap=0.0, Tensor? sinks=None) -> "
      "(Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(llmops_cpu, CPU, m) {
  m.impl("attention_kvcache", TORCH_BOX(&attention_kvcache_cpu));
}

}  // namespace llmops
