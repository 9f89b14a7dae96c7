// kv_cache_append_: the CPU kernel as a raw operator. llmops.ops owns the public schema; everything
// is checked here before anything is written, so that an error leaves the caches as they were.
#include "cpu/kv_cache_append_.h"

#include <algorithm>

#include "sequences.h"

namespace llmops {
namespace {

constexpr const char* kName = "llmops.kv_cache_append_";

// Two sequences that share a block would overwrite each other's rows, in no order.
void check_distinct(const CacheLayout& layout, const std::vector<const int64_t*>& pages,
                    const std::vector<int64_t>& start, int64_t tokens) {
  std::vector<int64_t> written;
  for (size_t b = 0; b < pages.size(); ++b)
    for (int64_t i = start[b] / layout.page(); i <= (start[b] + tokens - 1) / layout.page(); ++i)
      written.push_back(pages[b][i]);
  std::sort(written.begin(), written.end());
  const auto twice = std::adjacent_find(written.begin(), written.end());
  if (twice != written.end())
    throw_value_error(kName, ": block_table maps block ", *twice, " to two places that would be ",
                      "written; give each sequence blocks of its own beyond a shared prefix");
}

cpu::CacheAppendParams make_params(const Tensor& cache, const Tensor& from) {
  cpu::CacheAppendParams p{};
  p.heads = from.size(1), p.tokens = from.size(2), p.dim = from.size(3);
  p.element = element_size(from.scalar_type());
  p.from = static_cast<const char*>(from.data_ptr());
  p.cache = static_cast<char*>(cache.data_ptr());
  for (int64_t d = 0; d < 4; ++d) {
    p.from_stride[d] = from.stride(d) * p.element;
    p.cache_stride[d] = cache.stride(d) * p.element;
    LLMOPS_CHECK(cache.size(d) <= 1 || cache.stride(d) != 0, kName,
                 ": the caches must hold no element twice, as an expanded tensor does");
  }
  return p;
}

void kv_cache_append_cpu(const Tensor& k_cache, const Tensor& v_cache, const Tensor& k,
                         const Tensor& v, const Tensor& cache_seqlens,
                         const std::optional<Tensor>& block_table) {
  for (const Tensor* t : {&k_cache, &v_cache, &k, &v})
    LLMOPS_CHECK(t->dim() == 4 && t->scalar_type() == k.scalar_type(), kName,
                 ": caches, k and v must have 4 dimensions and one dtype");
  kernel_dtype(k.scalar_type(), kName);
  const int64_t batch = k.size(0), tokens = k.size(2);
  LLMOPS_CHECK(v.size(0) == batch && v.size(1) == k.size(1) && v.size(2) == tokens &&
                   k_cache.size(1) == k.size(1) && k_cache.size(3) == k.size(3) &&
                   v_cache.size(1) == k.size(1) && v_cache.size(3) == v.size(3) &&
                   v_cache.size(0) == k_cache.size(0) && v_cache.size(2) == k_cache.size(2) &&
                   (block_table.has_value() || k_cache.size(0) == batch),
               kName, ": k and v must be [B, Hkv, T, D] and the caches [B, Hkv, Tmax, D] or ",
               "[blocks, Hkv, page, D]");
  cpu::CacheAppendParams keys = make_params(k_cache, k), values = make_params(v_cache, v);
  const CacheLayout layout(k_cache, block_table, batch, kName);
  const auto start = read_integers(cache_seqlens, batch, kName, "cache_seqlens");
  std::vector<const int64_t*> pages(layout.page() > 0 ? batch : 0);
  for (int64_t b = 0; b < batch; ++b) {
    if (start[b] < 0 || start[b] > layout.capacity() - tokens)
      throw_value_error(kName, ": sequence ", b, " holds ", start[b], " keys and ", tokens,
                        " more do not fit the ", layout.capacity(),
                        " of the cache; allocate it longer, or map more blocks");
    if (layout.page() > 0) pages[b] = layout.pages(b, start[b], start[b] + tokens);
  }
  if (tokens == 0) return;
  if (layout.page() > 0) check_distinct(layout, pages, start, tokens);
  for (cpu::CacheAppendParams* p : {&keys, &values}) {
    p->start = start.data();
    p->page = layout.page();
    p->pages = layout.page() > 0 ? pages.data() : nullptr;
  }
  const auto kernel = LLMOPS_CPU_CALL(kv_cache_append);
  parallel_rows(batch * tokens * keys.heads, keys.dim + values.dim,
                [&](int64_t begin, int64_t end) {
                  kernel(keys, begin, end);
                  kernel(values, begin, end);
                });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(llmops_cpu, m) {
  m.def(
      "kv_cache_append_(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, "
      "Tensor cache_seqlens, Tensor? block_table=None) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(llmops_cpu, CPU, m) {
  m.impl("kv_cache_append_", TORCH_BOX(&kv_cache_append_cpu));
}

}  // namespace llmops
