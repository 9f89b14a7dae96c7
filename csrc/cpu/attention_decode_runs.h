// Decode where one run through memory is read at a time (all but AVX2, attention_decode_streams.h):
// the runs, and what is asked for ahead, beyond the end of a page too.
#pragma once
#include "attention_score.h"

namespace llmops::cpu::LLMOPS_ISA {
namespace {

constexpr int kAheadKeys = 32;  // measured (benchmarks/NOTES.md)

// A run, and the first row of the one after it; nullptr after the last.
template <class T>
struct Run : KeyRows<T> {
  const T* next;
};

// f(run, its first key) of keys [key, key + keys): all of them at one distance, or page by page.
template <class T, class F>
LLMOPS_INLINE void for_runs(const AttentionParams& p, const QueryBlock& block, const void* base,
                            const int64_t* stride, int64_t key, int keys, const F& f) {
  Run<T> run{key_run<T>(p, block, base, stride, key, keys), nullptr};
  for (int i = 0, end; i < keys; i = end) {
    end = i + run.count;
    KeyRows<T> after{};
    if (end < keys) after = key_run<T>(p, block, base, stride, key + end, keys - end);
    run.next = after.first;
    f(run, i);
    run = {after, nullptr};
  }
}

// What is asked for while row i is read: the row kAheadKeys on, or as far into the next run of
// fewer. Beyond a page, and from one token's row to the next, no processor looks ahead. fp32 rows
// gain only where the next run is a page of its own.
template <class T>
LLMOPS_INLINE const T* row_ahead(const Run<T>& run, int i) {
  const int far = run.count < kAheadKeys ? run.count : kAheadKeys, at = i + far - run.count;
  if (at < 0) return run.first + (i + far) * run.stride;
  return run.next + at * run.stride;
}
template <class T>
LLMOPS_INLINE void fetch(const T* row, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(row) + i);
}

}  // namespace
}  // namespace llmops::cpu::LLMOPS_ISA
