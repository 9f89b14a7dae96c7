// What it computes: kv_cache_append_.h. One row of D elements is one copy; 2 * D * element bytes.
// Rows are as short as 128 bytes: a division or a call for each would cost more than its copy.
// Where the rows of a prompt lie together it is the C library's copy, which knows the processor.
#include "kv_cache_append_.h"

namespace llmops::cpu::LLMOPS_ISA {
namespace {

inline void copy_bytes(char* to, const char* from, int64_t bytes) {
  constexpr int64_t kLine = 64;
  int64_t i = 0;
  for (; i + kLine <= bytes; i += kLine) __builtin_memcpy(to + i, from + i, kLine);
  if (i < bytes) __builtin_memcpy(to + i, from + i, bytes - i);
}

// `rows` rows, which lie one step apart on either side.
void copy_rows(const CacheAppendParams& p, int64_t rows, const char* from, int64_t from_step,
               char* to, int64_t to_step) {
  const int64_t bytes = p.dim * p.element;
  if (p.from_stride[3] != p.element || p.cache_stride[3] != p.element) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t d = 0; d < p.dim; ++d)
        __builtin_memcpy(to + r * to_step + d * p.cache_stride[3],
                         from + r * from_step + d * p.from_stride[3], p.element);
  } else if (from_step == bytes && to_step == bytes) {
    __builtin_memcpy(to, from, rows * bytes);
  } else {
    for (int64_t r = 0; r < rows; ++r) copy_bytes(to + r * to_step, from + r * from_step, bytes);
  }
}

}  // namespace

void kv_cache_append(const CacheAppendParams& p, int64_t begin, int64_t end) {
  // Runs as `from` lies in memory: the heads of a token, or the tokens of a head, as far as the
  // range and a page of the cache go.
  const bool by_token = p.from_stride[1] < p.from_stride[2];
  const int inner = by_token ? 1 : 2;
  const int64_t length = by_token ? p.heads : p.tokens;
  for (int64_t i = begin, rows; i < end; i += rows) {
    const int64_t batch = i / (p.heads * p.tokens), rest = i % (p.heads * p.tokens);
    const int64_t head = by_token ? rest % length : rest / length;
    const int64_t token = by_token ? rest / length : rest % length;
    rows = length - rest % length;
    if (rows > end - i) rows = end - i;
    int64_t row = p.start[batch] + token, block = batch;
    if (p.pages) {
      block = p.pages[batch][row / p.page];
      row %= p.page;
      if (!by_token && rows > p.page - row) rows = p.page - row;
    }
    const char* from = p.from + batch * p.from_stride[0] + head * p.from_stride[1];
    char* to = p.cache + block * p.cache_stride[0] + head * p.cache_stride[1];
    copy_rows(p, rows, from + token * p.from_stride[2], p.from_stride[inner],
              to + row * p.cache_stride[2], p.cache_stride[inner]);
  }
}

}  // namespace llmops::cpu::LLMOPS_ISA
