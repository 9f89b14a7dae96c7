// Embedding lookup and its backward. Formulas: embedding.h
//
// Forward: a copy of one row, or the sum of two rows in fp32, rounded once; the next token's row is
// prefetched meanwhile, since rows are too short for the hardware to see a stream. An id is read
// once and checked before it is used. Backward: the caller
// has sorted the tokens by id (stably), so that every row of the gradient is written exactly once,
// zeros included, by one task; its terms are added in registers in fp32, in the order of the
// tokens, whatever the number of threads. Lanes run along the row.
#include "embedding.h"

#include "simd.h"

namespace llmops::cpu::LLMOPS_ISA {
namespace {

constexpr int kColumns = 4 * W;

constexpr int64_t kLine = 64;

LLMOPS_INLINE bool within(const EmbeddingTable& table, int64_t id) {
  return id >= 0 && id < table.rows;
}

// Copies dense bytes, and asks for as many bytes of `next`.
template <bool past_caches>
LLMOPS_INLINE void copy_row(int64_t bytes, const char* from, const char* next, char* to) {
  constexpr int64_t step = W * sizeof(float);
  int64_t i = 0;
  for (; i + kLine <= bytes; i += kLine) {
    __builtin_prefetch(next + i);
    LLMOPS_UNROLL for (int64_t j = 0; j < kLine; j += step) {
      const Vec v = load(reinterpret_cast<const float*>(from + i + j));
      float* place = reinterpret_cast<float*>(to + i + j);
      if constexpr (past_caches) {
        stream(place, v);
      } else {
        store(place, v);
      }
    }
  }
  if (i < bytes) __builtin_memcpy(to + i, from + i, bytes - i);
}

template <class T>
LLMOPS_INLINE void add_rows(int64_t dim, const T* a, const T* b, const T* next, T* y) {
  int64_t i = 0;
  for (; i + W <= dim; i += W) {
    __builtin_prefetch(next + i);
    store(y + i, load(a + i) + load(b + i));
  }
  const int left = static_cast<int>(dim - i);
  if (left > 0) store_n(y + i, load_n(a + i, left) + load_n(b + i, left), left);
}

// One row of the gradient: the sum of `count` rows of grad.
template <class T>
LLMOPS_INLINE void sum_rows(int64_t dim, const T* grad, int64_t step, const int64_t* order,
                            int64_t count, T* y) {
  int64_t i = 0;
  for (; i + kColumns <= dim; i += kColumns) {
    Vec s[4] = {zero(), zero(), zero(), zero()};
    for (int64_t k = 0; k < count; ++k) {
      const T* g = grad + order[k] * step + i;
      LLMOPS_UNROLL for (int j = 0; j < 4; ++j) s[j] = s[j] + load(g + j * W);
    }
    LLMOPS_UNROLL for (int j = 0; j < 4; ++j) store(y + i + j * W, s[j]);
  }
  for (; i < dim; i += W) {
    const int left = dim - i < W ? static_cast<int>(dim - i) : W;
    Vec s = zero();
    for (int64_t k = 0; k < count; ++k) s = s + load_n(grad + order[k] * step + i, left);
    store_n(y + i, s, left);
  }
}

}  // namespace

int64_t embedding_rows(DType type, int64_t dim, const EmbeddingTable& token,
                       const EmbeddingTable& position, void* out, int64_t begin, int64_t end,
                       bool stream) {
  LLMOPS_DISPATCH(type, T, {
    const T* weight = static_cast<const T*>(token.weight);
    const T* position_weight = static_cast<const T*>(position.weight);
    const int64_t bytes = dim * sizeof(T);
    const bool past_caches =
        stream && bytes % kLine == 0 && reinterpret_cast<uintptr_t>(out) % kLine == 0;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t id = token.ids[i];
      if (!within(token, id)) return i;
      const T* row = weight + id * token.step;
      // A wrong next id is only prefetched, which never faults, and found on the next turn.
      const T* next = i + 1 < end ? weight + token.ids[i + 1] * token.step : row;
      T* y = static_cast<T*>(out) + i * dim;
      if (position.ids != nullptr) {
        const int64_t place = position.ids[i];
        if (!within(position, place)) return i;
        add_rows(dim, row, position_weight + place * position.step, next, y);
      } else if (past_caches) {
        copy_row<true>(bytes, reinterpret_cast<const char*>(row),
                       reinterpret_cast<const char*>(next), reinterpret_cast<char*>(y));
      } else {
        copy_row<false>(bytes, reinterpret_cast<const char*>(row),
                        reinterpret_cast<const char*>(next), reinterpret_cast<char*>(y));
      }
    }
    if (past_caches) stream_fence();
  });
  return -1;
}

void embedding_bwd_rows(DType type, int64_t dim, const void* grad, int64_t grad_step,
                        const int64_t* order, const int64_t* first, int64_t padding_idx,
                        void* dweight, int64_t begin, int64_t end) {
  LLMOPS_DISPATCH(type, T, {
    T* y = static_cast<T*>(dweight) + begin * dim;
    for (int64_t v = begin; v < end; ++v, y += dim) {
      const int64_t count = v == padding_idx ? 0 : first[v + 1] - first[v];
      if (count == 0) {  // most rows; without the rounding that sum_rows would spend on them
        __builtin_memset(y, 0, dim * sizeof(T));
      } else {
        sum_rows(dim, static_cast<const T*>(grad), grad_step, order + first[v], count, y);
      }
    }
  });
}

}  // namespace llmops::cpu::LLMOPS_ISA
