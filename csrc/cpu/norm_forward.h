// The row loops of rms_norm (kCenter false) and layer_norm (kCenter true).
//
// Two sweeps over a row that stays in L1/L2: statistics, then the result. The first one also forms
// x + residual and writes h. From memory's side x and the residual are read once, y and h written
// once. Lanes run along the row, four vectors at a time, fp32 throughout.
//
// Variance in one sweep: sums of d = h - k and d^2, where k is the mean of the row's first values.
// h - k is exact or nearly so however large the mean is, and z = (h - k) r - mean(d) r keeps that.
// mean(d^2) - mean(d)^2 loses precision only where mean(d) is large beside the deviation, which
// takes a row that begins unlike itself: the sums are then taken again around the mean.
#pragma once
#include "norm.h"
#include "simd.h"

namespace llmops::cpu::LLMOPS_ISA {

constexpr int kBlock = 4 * W;
constexpr int kFirst = 16;  // values whose mean is k

template <bool kFull, class T>
LLMOPS_INLINE Vec fetch(const T* p, int left) {
  if constexpr (kFull) return load(p);
  return load_n(p, left);
}
template <bool kFull, bool kStream, class T>
LLMOPS_INLINE void put(T* p, Vec v, int left) {
  if constexpr (!kFull) {
    store_n(p, v, left);
  } else if constexpr (kStream) {
    stream(p, v);
  } else {
    store(p, v);
  }
}
template <bool kFull>
LLMOPS_INLINE Vec keep(Vec v, int left) {
  if constexpr (kFull) return v;
  return select(first_n(left), v, zero());
}
LLMOPS_INLINE float combine(const Vec* s) { return reduce_add((s[0] + s[1]) + (s[2] + s[3])); }

template <class T>
LLMOPS_INLINE const T* row_of(const void* base, int64_t step, int64_t row) {
  return reinterpret_cast<const T*>(static_cast<const char*>(base) + row * step);
}
template <class T>
LLMOPS_INLINE T* row_of(void* base, int64_t step, int64_t row) {
  return reinterpret_cast<T*>(static_cast<char*>(base) + row * step);
}

// Type of h: a 16-bit residual means a 16-bit h, an fp32 one an fp32 h, none that h is x.
struct None {};
template <class X, class R>
struct HeldType {
  using type = R;
};
template <class X>
struct HeldType<X, None> {
  using type = X;
};
template <class X, class R>
using Held = typename HeldType<X, R>::type;
template <class R>
constexpr bool kAdds = true;
template <>
constexpr bool kAdds<None> = false;

// A row to normalize: k, and the sums of d = h - k and d^2 (k = 0 without centering).
struct Sums {
  float k, d, squares;
};
struct RowStats {
  float k, shift, rstd;  // z = (h - k) * rstd - shift * rstd
};

template <bool kCenter>
LLMOPS_INLINE RowStats finish_stats(const Sums& sums, int64_t n, float eps) {
  const float length = static_cast<float>(n);
  const float shift = kCenter ? sums.d / length : 0.0f;
  float variance = sums.squares / length - shift * shift;
  if (variance < 0.0f) variance = 0.0f;  // by rounding; a NaN stays
  return {sums.k, shift, 1.0f / __builtin_sqrtf(variance + eps)};
}
// mean(d)^2 > variance: the subtraction loses more than one bit.
LLMOPS_INLINE bool imprecise(const Sums& sums, int64_t n) {
  return 2.0f * sums.d * sums.d > sums.squares * static_cast<float>(n);
}

template <class T>
LLMOPS_NOINLINE Sums sums_around(const T* v, int64_t n, float k) {
  const Vec shift = set1(k);
  Vec s[4] = {zero(), zero(), zero(), zero()}, q[4] = {zero(), zero(), zero(), zero()};
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) {
    LLMOPS_UNROLL for (int j = 0; j < 4; ++j) {
      const Vec d = load(v + i + j * W) - shift;
      s[j] = s[j] + d;
      q[j] = fma(d, d, q[j]);
    }
  }
  for (; i < n; i += W) {
    const int left = n - i < W ? static_cast<int>(n - i) : W;
    const Vec d = keep<false>(load_n(v + i, left) - shift, left);
    s[0] = s[0] + d;
    q[0] = fma(d, d, q[0]);
  }
  return {k, combine(s), combine(q)};
}

// x + residual as h holds it (x without one), and the mean of its first values.
template <bool kFull, class X, class R>
LLMOPS_INLINE Vec sum_at(const X* x, const R* residual, int64_t i, int left) {
  const Vec v = fetch<kFull>(x + i, left);
  if constexpr (kAdds<R>) return round_as(v + fetch<kFull>(residual + i, left), R{});
  return v;
}
template <class X, class R>
LLMOPS_INLINE float first_mean(const X* x, const R* residual, int64_t n) {
  Vec sum = zero();
  if (n >= kFirst) {
    LLMOPS_UNROLL for (int i = 0; i < kFirst; i += W) sum = sum + sum_at<true>(x, residual, i, W);
    return reduce_add(sum) * (1.0f / kFirst);
  }
  const int count = static_cast<int>(n);
  LLMOPS_UNROLL for (int i = 0; i < kFirst; i += W) {
    if (i < count) sum = sum + sum_at<false>(x, residual, i, count - i);
  }
  return reduce_add(sum) / static_cast<float>(count);
}

// The sum goes to h, and to fp32 scratch where h is not what the second sweep can read.
template <bool kFull, bool kStream, class X, class R>
LLMOPS_INLINE Vec gather_at(const X* x, const R* residual, Held<X, R>* h, float* scratch, int64_t i,
                            int left) {
  if constexpr (kFull && !kStream && kAdds<R> && sizeof(R) == 2) {
    const Vec v = store_rounded(h + i, load(x + i) + load(residual + i));
    store(scratch + i, v);
    return v;
  }
  const Vec v = sum_at<kFull>(x, residual, i, left);
  if constexpr (kAdds<R>) {
    put<kFull, kStream>(h + i, v, left);
    if constexpr (kStream || sizeof(R) == 2) put<kFull, false>(scratch + i, v, left);
  }
  return v;
}

template <bool kCenter, bool kStream, class X, class R>
LLMOPS_NOINLINE Sums gather(int64_t n, const X* x, const R* residual, Held<X, R>* h,
                            float* scratch) {
  const float k = kCenter ? first_mean(x, residual, n) : 0.0f;
  const Vec shift = set1(k);
  Vec s[4] = {zero(), zero(), zero(), zero()}, q[4] = {zero(), zero(), zero(), zero()};
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) {
    LLMOPS_UNROLL for (int j = 0; j < 4; ++j) {
      Vec d = gather_at<true, kStream>(x, residual, h, scratch, i + j * W, W);
      if constexpr (kCenter) {
        d = d - shift;
        s[j] = s[j] + d;
      }
      q[j] = fma(d, d, q[j]);
    }
  }
  for (; i < n; i += W) {
    const int left = n - i < W ? static_cast<int>(n - i) : W;
    Vec d = gather_at<false, kStream>(x, residual, h, scratch, i, left);
    if constexpr (kCenter) {
      d = keep<false>(d - shift, left);
      s[0] = s[0] + d;
    }
    q[0] = fma(d, d, q[0]);
  }
  return {k, kCenter ? combine(s) : 0.0f, combine(q)};
}

template <bool kCenter, bool kFull, bool kStream, class V, class Y, class P>
LLMOPS_INLINE void normalize_at(const P* weight, const P* bias, const V* v, Vec k, Vec rstd, Vec z0,
                                Y* y, int64_t i, int left) {
  const Vec h = fetch<kFull>(v + i, left), w = fetch<kFull>(weight + i, left);
  Vec out;
  if constexpr (kCenter) {
    out = fma(fma(h - k, rstd, z0), w, fetch<kFull>(bias + i, left));
  } else {
    out = h * rstd * w;
  }
  put<kFull, kStream>(y + i, out, left);
}

// weight and bias apart from p: a vector's store may alias what p points to, and these would be
// loaded again after each.
template <bool kCenter, bool kStream, class V, class Y, class P>
LLMOPS_NOINLINE void normalize(int64_t n, const P* weight, const P* bias, const V* v,
                               const RowStats& stats, const Y* next, Y* y) {
  const Vec k = set1(stats.k), r = set1(stats.rstd), z0 = set1(-stats.shift * stats.rstd);
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) {
    prefetch_block(next + i);
    LLMOPS_UNROLL for (int j = 0; j < 4; ++j) {
      normalize_at<kCenter, true, kStream>(weight, bias, v, k, r, z0, y, i + j * W, W);
    }
  }
  for (; i + W <= n; i += W)
    normalize_at<kCenter, true, kStream>(weight, bias, v, k, r, z0, y, i, W);
  if (i < n)
    normalize_at<kCenter, false, kStream>(weight, bias, v, k, r, z0, y, i, static_cast<int>(n - i));
}

template <bool kCenter, bool kStream, class V, class Y>
LLMOPS_INLINE void finish_row(const NormParams& p, Sums sums, const V* v, const Y* next, Y* y) {
  if (kCenter && imprecise(sums, p.n))
    sums = sums_around(v, p.n, sums.k + sums.d / static_cast<float>(p.n));
  const RowStats stats = finish_stats<kCenter>(sums, p.n, p.eps);
  if constexpr (sizeof(Y) == 2) {
    if (p.narrow_weight) {
      normalize<kCenter, kStream>(p.n, static_cast<const Y*>(p.narrow_weight),
                                  static_cast<const Y*>(p.narrow_bias), v, stats, next, y);
      return;
    }
  }
  normalize<kCenter, kStream>(p.n, p.weight, p.bias, v, stats, next, y);
}

template <bool kCenter, bool kStream, class X, class R>
LLMOPS_INLINE void forward_row(const NormParams& p, const X* x, const R* residual, const X* next,
                               X* y, Held<X, R>* h, float* scratch) {
  const Sums sums = gather<kCenter, kStream>(p.n, x, residual, h, scratch);
  if constexpr (!kAdds<R>) {
    finish_row<kCenter, kStream>(p, sums, x, next, y);
  } else if constexpr (kStream || sizeof(R) == 2) {
    finish_row<kCenter, kStream>(p, sums, static_cast<const float*>(scratch), next, y);
  } else {
    finish_row<kCenter, kStream>(p, sums, static_cast<const float*>(h), next, y);
  }
}

template <class T>
LLMOPS_INLINE bool vector_aligned(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % (W * sizeof(T)) == 0;
}

template <bool kCenter, class X, class R>
LLMOPS_INLINE void forward_rows(const NormParams& p, const NormForwardRows& rows) {
  for (int64_t row = 0; row < rows.count; ++row) {
    const X* x = row_of<X>(rows.x, rows.x_step, row);
    const X* next = row_of<X>(rows.x, rows.x_step, row + 1);
    const R* residual = row_of<R>(rows.residual, rows.residual_step, row);
    X* y = row_of<X>(rows.y, rows.y_step, row);
    auto* h = row_of<Held<X, R>>(rows.h, rows.h_step, row);
    if (p.stream && vector_aligned(y) && vector_aligned(h)) {
      forward_row<kCenter, true>(p, x, residual, next, y, h, rows.scratch);
    } else {
      forward_row<kCenter, false>(p, x, residual, next, y, h, rows.scratch);
    }
  }
  if (p.stream) stream_fence();
}

template <bool kCenter>
LLMOPS_INLINE void norm_forward(const NormParams& p, const NormForwardRows& rows) {
  LLMOPS_DISPATCH(p.x_type, X, {
    if (!rows.residual) {
      forward_rows<kCenter, X, None>(p, rows);
    } else if (p.residual_type == p.x_type) {
      forward_rows<kCenter, X, X>(p, rows);
    } else if constexpr (sizeof(X) == 2) {
      forward_rows<kCenter, X, float>(p, rows);
    }
  });
}

}  // namespace llmops::cpu::LLMOPS_ISA
