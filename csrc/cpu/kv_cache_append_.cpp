// What it computes: kv_cache_append_.h. One row of D elements is one copy; 2 * D * element bytes.
#include "kv_cache_append_.h"

namespace llmops::cpu::LLMOPS_ISA {

void kv_cache_append(const CacheAppendParams& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t head = i % p.heads, token = i / p.heads % p.tokens;
    const int64_t batch = i / p.heads / p.tokens, row = p.start[batch] + token;
    const char* from =
        p.from + batch * p.from_stride[0] + head * p.from_stride[1] + token * p.from_stride[2];
    char* to = p.cache + head * p.cache_stride[1];
    if (p.pages) {
      to += p.pages[batch][row / p.page] * p.cache_stride[0] + row % p.page * p.cache_stride[2];
    } else {
      to += batch * p.cache_stride[0] + row * p.cache_stride[2];
    }
    if (p.from_stride[3] == p.element && p.cache_stride[3] == p.element) {
      __builtin_memcpy(to, from, p.dim * p.element);
      continue;
    }
    for (int64_t d = 0; d < p.dim; ++d)
      __builtin_memcpy(to + d * p.cache_stride[3], from + d * p.from_stride[3], p.element);
  }
}

}  // namespace llmops::cpu::LLMOPS_ISA
