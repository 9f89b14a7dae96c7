// Token embedding: out[i] = weight[ids[i]] (+ position_weight[positions[i]]), and its backward,
//   dweight[v] = sum of grad[i] over the i with ids[i] = v, in ascending i; zero for padding_idx.
#pragma once
#include "isa.h"

namespace llmops::cpu {

struct EmbeddingTable {
  const int64_t* ids;
  const void* weight;  // `rows` rows of dim elements, `step` apart, dense within
  int64_t step, rows;
};

}  // namespace llmops::cpu

// Rows [begin, end) of out [*, dim]; `position.ids` null: tokens only. Returns the first i whose
// token or position id is outside its table, where it stops, or -1. `stream`: store past the
// caches.
LLMOPS_CPU_KERNEL(int64_t, embedding_rows, llmops::cpu::DType, int64_t dim,
                  const llmops::cpu::EmbeddingTable& token,
                  const llmops::cpu::EmbeddingTable& position, void* out, int64_t begin,
                  int64_t end, bool stream)
// Rows [begin, end) of dweight [*, dim]. order[first[v]..first[v + 1]) are the i of table row v,
// ascending; grad's rows are grad_step elements apart. Stored through the caches: what is large and
// fresh was zeroed by the kernel just before, and lies there.
LLMOPS_CPU_KERNEL(void, embedding_bwd_rows, llmops::cpu::DType, int64_t dim, const void* grad,
                  int64_t grad_step, const int64_t* order, const int64_t* first,
                  int64_t padding_idx, void* dweight, int64_t begin, int64_t end)
