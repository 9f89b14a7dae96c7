// New keys or values [B, H, T, D] into a cache: token t of sequence b goes to row start[b] + t of
// it, which in a paged cache is row r % page of block pages[b][r / page]. Moves bytes, any dtype.
#pragma once
#include "isa.h"

namespace llmops::cpu {

struct CacheAppendParams {
  int64_t heads, tokens, dim, element;      // element: bytes of one
  const char* from;                         // [B, H, T, D]
  char* cache;                              // [B, H, Tmax, D] or [blocks, H, page, D]
  int64_t from_stride[4], cache_stride[4];  // in bytes
  const int64_t* start;                     // [B]
  const int64_t* const* pages;              // [B], or null: not paged
  int64_t page;
};

}  // namespace llmops::cpu

// Rows [begin, end) of B * T * H, in the order in which `from` lies in memory.
LLMOPS_CPU_KERNEL(void, kv_cache_append, const llmops::cpu::CacheAppendParams&, int64_t begin,
                  int64_t end)
