// What the PTX wrappers of csrc/cuda/ptx.h do, in C++.
#pragma once

#include "cuda_sim.h"

namespace llmops::cuda {

inline float exp2_approx(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;  // ftz
}

inline void cp_async_16(void* shared, const void* global, bool there = true) {
  cuda_sim::copy_async(shared, there ? global : nullptr, 16, "cp.async");
}
inline void cp_async_4(void* shared, const void* global, bool there = true) {
  cuda_sim::copy_async(shared, there ? global : nullptr, 4, "cp.async");
}
inline void cp_async_commit() { cuda_sim::copy_commit(); }
template <int kLeft>
inline void cp_async_wait() {
  cuda_sim::copy_wait(kLeft);
}

namespace twin {

// Lanes 8 i to 8 i + 7 give the rows of matrix i. A lane receives of each matrix two neighbours of
// row lane / 4, or, transposed, of column lane / 4.
template <int kCount, bool kTransposed>
inline void ldmatrix(uint32_t* to, const void* row) {
  const cuda_sim::Round* round;
  {
    cuda_sim::Hidden hidden;
    round = cuda_sim::meet("ldmatrix", "ldmatrix", 0xffffffffu, &row, sizeof row);
  }
  const int lane = cuda_sim::current->lane;
  for (int i = 0; i < kCount; ++i) {
    uint16_t pair[2];
    for (int half = 0; half < 2; ++half) {
      const int along = lane % 4 * 2 + half;
      const int r = kTransposed ? along : lane / 4, c = kTransposed ? lane / 4 : along;
      const uint16_t* from;
      {
        cuda_sim::Hidden hidden;
        std::memcpy(&from, round->given[8 * i + r], sizeof from);
      }
      if (reinterpret_cast<uintptr_t>(from) % 16)
        cuda_sim::fail("ldmatrix", "misaligned: the row of lane %d", 8 * i + r);
      pair[half] = from[c];
    }
    to[i] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
  }
  cuda_sim::leave(round);
}

inline float widened(uint32_t pair, int half, bool bf16) {
  const auto bits = static_cast<uint16_t>(half ? pair >> 16 : pair);
  return bf16 ? __bfloat162float({bits}) : cuda_sim::half_to_float(bits);
}

// d [16, 8] += a [16, 16] b [16, 8]; which element is whose: the PTX manual's figures of m16n8k16.
inline void mma(float* d, const uint32_t* a, const uint32_t* b, bool bf16) {
  cuda_sim::Hidden hidden;
  struct Given {
    float a[8], b[4];
  } own;
  for (int i = 0; i < 8; ++i) own.a[i] = widened(a[i / 2], i % 2, bf16);
  for (int i = 0; i < 4; ++i) own.b[i] = widened(b[i / 2], i % 2, bf16);
  const cuda_sim::Round* round =
      cuda_sim::meet("mma.sync", "mma.sync", 0xffffffffu, &own, sizeof own);
  const int lane = cuda_sim::current->lane;
  const auto given = [&](int from) { return reinterpret_cast<const Given*>(round->given[from]); };
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + (i / 2) * 8, column = lane % 4 * 2 + i % 2;
    double sum = 0.0;
    for (int k = 0; k < 16; ++k) {
      const float x = given(row % 8 * 4 + k % 8 / 2)->a[row / 8 * 2 + k / 8 * 4 + k % 2];
      const float y = given(column * 4 + k % 8 / 2)->b[k / 8 * 2 + k % 2];
      sum += static_cast<double>(x) * y;
    }
    d[i] = static_cast<float>(d[i] + sum);
  }
  cuda_sim::leave(round);
}

}  // namespace twin

inline void ldmatrix_x4(uint32_t (&to)[4], const void* row) { twin::ldmatrix<4, false>(to, row); }
inline void ldmatrix_x4_transposed(uint32_t (&to)[4], const void* row) {
  twin::ldmatrix<4, true>(to, row);
}
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                         __nv_bfloat16) {
  twin::mma(d, a, b, true);
}
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __half) {
  twin::mma(d, a, b, false);
}

inline int opaque(int x) { return x; }

inline uint32_t pack(float low, float high, __nv_bfloat16) {
  return __float2bfloat16(low).bits | static_cast<uint32_t>(__float2bfloat16(high).bits) << 16;
}
inline uint32_t pack(float low, float high, __half) {
  return __float2half(low).bits | static_cast<uint32_t>(__float2half(high).bits) << 16;
}

}  // namespace llmops::cuda
