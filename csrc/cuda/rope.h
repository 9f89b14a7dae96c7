// Rotary position embedding on CUDA, of one tensor or of q and k in one launch, in place or not.
//   a' = a cos - b sin,  b' = b cos + a sin;  (a, b) = (x[i], x[i + R/2]), or interleaved (x[2i],
//   x[2i + 1])
#pragma once
#include "rows.h"

namespace llmops::cuda {

struct RopeHeads {  // [B, heads, T, D], D dense; strides of B, heads, T
  const void* x;
  void* y;
  int64_t heads;
  int64_t x_strides[3], y_strides[3];
};

struct Rope {
  RopeHeads q, k;  // k.heads 0: q alone
  int type;
  const float *cos, *sin;  // rows of `half` elements
  int64_t cos_batch, cos_row, sin_batch, sin_row, table_rows;
  const void* ids;  // positions: rows of the tables; null: token t is at row t
  bool ids_64;      // int64, else int32
  int64_t ids_batch, ids_token;
  int64_t batch, tokens, half, dim;
  Divisor of_tokens;
  bool interleaved, inverse, in_place;
  bool wide;  // everything in 16-byte accesses, eight pairs at a time
};
int rope(const Rope& p, void* stream);

}  // namespace llmops::cuda
