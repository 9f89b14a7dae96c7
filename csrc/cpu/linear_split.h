// linear's product of few rows of x by AMX in parts (split_amx.h), for fp32 and fp16: y^T = W x^T.
//
// x is split once. W is read once, as it lies, 32 rows at a time: a few steps of k are split into
// L1 while the steps before multiply all of x. As A its rows need no transpose, which is what the
// packed product (matmul.cpp) pays for them. Roofline: 2 bytes (fp16) or 4 of W for each 14 to 20
// operations of a vector, and for each 32 rows of x 16 or 24 tile products to 1024 elements.
//
// Parts of infinities are NaN here: where a sum is, its rows of W are split again as split_amx.h
// does.
#pragma once
#include "linear.h"
#include "split_amx.h"

#ifdef LLMOPS_HAS_TILES

namespace llmops::cpu::LLMOPS_ISA {
namespace {

constexpr int64_t kMostSplit = 64;  // rows of x

// Between dot products and lanes, or the packed product, as measured (benchmarks/NOTES.md).
LLMOPS_INLINE bool takes_split(DType type, int64_t rows) {
  if (active_isa() != Isa::amx) return false;
  if (type == DType::f32) return rows >= 13 && rows <= 32;
  return type == DType::f16 && rows >= 9 && rows <= kMostSplit;
}
template <class Parts>
LLMOPS_INLINE int64_t split_floats(int64_t rows, int64_t k) {
  return (rows + kPair - 1) / kPair * tiled_steps(k) * Parts::kStepFloats;
}
template <class Parts>
LLMOPS_INLINE void pack_split(const void* x, int64_t x_stride, int64_t rows, int64_t k,
                              float* out) {
  split_strips<false, Parts>({static_cast<const typename Parts::Element*>(x), x_stride, 1, rows, k},
                             out);
}

// 32 rows of weights as A, a few steps at a time, by and by.
template <class Parts, bool kCareful>
struct WeightSteps {
  using T = typename Parts::Element;
  static constexpr int kRowsEach = 2;
  static constexpr int64_t kAhead = 1024 / sizeof(T);  // elements of each row

  const T* row[kPair];
  int64_t k, after;  // after: from a row's end to where reading goes on
  // The steps under way.
  float* out = nullptr;
  int64_t at = 0, end = 0;
  int next = 0;

  void begin(const LinearParams& p, int64_t n, int64_t last) {
    k = p.k;
    after = kPair * p.w_stride - p.k;
    if (n + 2 * kPair > last) after = 0;  // nothing there, or less
    for (int i = 0; i < kPair; ++i)
      row[i] = static_cast<const T*>(p.w) + (n + i < last ? n + i : last - 1) * p.w_stride;
  }
  void take(int64_t from, int64_t to, float* where) { at = from, end = to, out = where, next = 0; }
  LLMOPS_BESIDE void operator()() {
    if (at < end) some();
  }
  void finish() {
    while (at < end) some();
  }

 private:
  __attribute__((noinline)) void some() {
    const int64_t d = at * kDepth, ahead = d + kAhead + (d + kAhead < k ? 0 : after);
    LLMOPS_UNROLL for (int i = 0; i < kRowsEach; ++i) {
      const int r = next + i;
      const T* const from = row[r] + d;
      const int64_t left = k - d;
      const bool whole = left >= kDepth;
      const Vec first = whole ? load(from) : load_n(from, up_to(kSide, left));
      const Vec second =
          whole ? load(from + kSide)
                : load_n(from + kSide, left > kSide ? static_cast<int>(left - kSide) : 0);
      split<Parts, kCareful>(first, second, out + r * kSide);
      __builtin_prefetch(row[r] + ahead);
      if constexpr (sizeof(T) == 4) __builtin_prefetch(row[r] + ahead + kSide);
    }
    next += kRowsEach;
    if (next < kPair) return;
    next = 0, ++at, out += Parts::kStepFloats;
  }
};

// sums [strips of x][32 rows of W][32 rows of x] of the rows of W from n on; kNarrow: 16 of x.
constexpr int64_t kStripSums = kPair * kPair;
template <class Parts, bool kCareful, bool kNarrow>
LLMOPS_NOINLINE void weights_by_parts(const LinearParams& p, const float* packed, int64_t n,
                                      int64_t last, float* sums) {
  constexpr int64_t kChunk = 2;  // steps that are split while those before multiply
  alignas(64) float stage[2][kChunk * Parts::kStepFloats];
  const int64_t steps = tiled_steps(p.k), strips = (p.rows + kPair - 1) / kPair;
  const auto stop = [&](int64_t s) { return s + kChunk < steps ? s + kChunk : steps; };
  WeightSteps<Parts, kCareful> weights;
  weights.begin(p, n, last);
  weights.take(0, stop(0), stage[0]);
  for (int64_t s = 0; s < steps; s += kChunk) {
    weights.finish();
    const float* const a = stage[s / kChunk % 2];
    memory_is_used(a);
    weights.take(stop(s), stop(stop(s)), stage[(s / kChunk + 1) % 2]);
    for (int64_t c = 0; c < strips; ++c) {
      float* const out = sums + c * kStripSums;
      if (s == 0 || strips > 1) begin_sums<kNarrow>(out, kPair, s > 0);
      add_products<Parts, kNarrow>(a, packed + (c * steps + s) * Parts::kStepFloats, stop(s) - s,
                                   weights);
      if (stop(s) == steps || strips > 1) end_sums<kNarrow>(out, kPair);
    }
  }
}

template <class Parts>
LLMOPS_INLINE void put_split_sums(const LinearParams& p, int64_t n, int count, const float* sums) {
  using T = typename Parts::Element;
  const T* const bias = static_cast<const T*>(p.bias);
  for (int64_t row = 0; row < p.rows; row += kSide) {
    const float* const from = sums + row / kPair * kStripSums + row % kPair;
    for (int i = 0; i < count; i += kSide) {
      const int some = up_to(kSide, count - i);
      const Vec added = bias ? load_n(bias + n + i, some) : zero();
      Vec r[W];
      LLMOPS_UNROLL for (int j = 0; j < W; ++j) r[j] = load(from + (i + j) * kPair);
      transpose(r);
      for (int j = 0; j < kSide && row + j < p.rows; ++j)
        store_n(static_cast<T*>(p.y) + (row + j) * p.y_stride + n + i, r[j] + added, some);
    }
  }
}

template <class Parts, bool kNarrow>
LLMOPS_NOINLINE void run_parts(const LinearParams& p, const float* packed, int64_t begin,
                               int64_t end) {
  alignas(64) float sums[kMostSplit / kPair * kStripSums];
  const int64_t all_sums = (p.rows + kPair - 1) / kPair * kStripSums;
  if (p.k == 0) __builtin_memset(sums, 0, sizeof(sums));
  begin_tiles();
  for (int64_t n = begin; n < end; n += kPair) {
    weights_by_parts<Parts, false, kNarrow>(p, packed, n, end, sums);
    Vec finite = zero();
    for (int64_t i = 0; i < all_sums; i += kNarrow ? kPair : W)
      finite = fma(load(sums + i), zero(), finite);
    if (mask_bits(equal(finite, finite)) != kAllLanes)
      weights_by_parts<Parts, true, kNarrow>(p, packed, n, end, sums);
    put_split_sums<Parts>(p, n, up_to(kPair, end - n), sums);
  }
  end_tiles();
}
template <class Parts>
LLMOPS_INLINE void linear_by_parts(const LinearParams& p, const float* packed, int64_t begin,
                                   int64_t end) {
  if (p.rows <= kSide) return run_parts<Parts, true>(p, packed, begin, end);
  run_parts<Parts, false>(p, packed, begin, end);
}

}  // namespace
}  // namespace llmops::cpu::LLMOPS_ISA
#endif
