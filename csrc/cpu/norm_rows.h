// The row loops of rms_norm (kCenter false: the mean counts as zero) and layer_norm (kCenter true).
//
// Forward: statistics, then normalize, over a row that stays in L1/L2; from memory's side x (and
// the residual) are read once and y (and h) written once. The sum x + residual is formed anew in
// each sweep, rounded to h's dtype as its reader will see it: that costs an addition, and lets h be
// written past the caches. Lanes run along the row, four vectors at a time, fp32 throughout.
//
// Variance: a first sweep gives the mean m, a second sums d = h - m and d^2. h - m is exact or
// nearly so however large the mean is, and the sum of d repairs what rounding did to m, which at a
// mean of 25,000 and a deviation of 1 is otherwise the largest error of the result.
//
// Backward: one sweep for the statistics and the two row sums (a sweep for the mean before it), one
// for dh, dweight and dbias. The last runs over kRows rows at once, so that the parameter gradients
// are loaded and stored once per kRows rows.
#pragma once
#include "norm.h"
#include "simd.h"

namespace llmops::cpu::LLMOPS_ISA {

constexpr int kBlock = 4 * W;
constexpr int kRows = 4;

struct NoResidual {};

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

// h[i] = x[i] + residual[i]; a 16-bit residual means a 16-bit h (fp32 beside 16-bit gives fp32).
template <class X, class R>
struct Source {
  using H = R;
  const X* x;
  const R* residual;
  template <bool kFull>
  LLMOPS_INLINE Vec at(const Source& s, int64_t i, int left) {
    return round_as(fetch<kFull>(s.x + i, left) + fetch<kFull>(s.residual + i, left), R{});
  }
};
template <class X>
struct Source<X, NoResidual> {
  using H = X;
  const X* x;
  const NoResidual* residual;
  template <bool kFull>
  LLMOPS_INLINE Vec at(const Source& s, int64_t i, int left) {
    return fetch<kFull>(s.x + i, left);
  }
};

struct RowStats {
  float mean, shift, rstd;  // z = (h - mean) * rstd - shift * rstd
};

template <class S>
LLMOPS_INLINE float row_mean(const S& source, int64_t n) {
  Vec s[4] = {zero(), zero(), zero(), zero()};
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) {
    LLMOPS_UNROLL for (int j = 0; j < 4; ++j) {
      s[j] = s[j] + S::template at<true>(source, i + j * W, W);
    }
  }
  for (; i + W <= n; i += W) s[0] = s[0] + S::template at<true>(source, i, W);
  if (i < n) s[1] = s[1] + S::template at<false>(source, i, static_cast<int>(n - i));
  return combine(s) / static_cast<float>(n);
}

// From sum d and sum d^2 (d = h - mean).
template <bool kCenter>
LLMOPS_INLINE RowStats finish_stats(float mean, float sum, float squares, int64_t n, float eps) {
  const float length = static_cast<float>(n);
  const float shift = kCenter ? sum / length : 0.0f;
  float variance = squares / length - shift * shift;
  if (variance < 0.0f) variance = 0.0f;  // by rounding; a NaN stays
  return {mean, shift, 1.0f / __builtin_sqrtf(variance + eps)};
}

template <bool kCenter, class S>
LLMOPS_INLINE RowStats row_stats(const S& source, int64_t n, float eps) {
  const float mean = kCenter ? row_mean(source, n) : 0.0f;
  const Vec m = set1(mean);
  Vec s[4] = {zero(), zero(), zero(), zero()}, q[4] = {zero(), zero(), zero(), zero()};
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) {
    LLMOPS_UNROLL for (int j = 0; j < 4; ++j) {
      Vec d = S::template at<true>(source, i + j * W, W);
      if constexpr (kCenter) d = d - m;
      if constexpr (kCenter) s[j] = s[j] + d;
      q[j] = fma(d, d, q[j]);
    }
  }
  for (; i < n; i += W) {
    const int left = n - i < W ? static_cast<int>(n - i) : W;
    Vec d = S::template at<false>(source, i, left);
    if constexpr (kCenter) d = keep<false>(d - m, left);
    if constexpr (kCenter) s[0] = s[0] + d;
    q[0] = fma(d, d, q[0]);
  }
  return finish_stats<kCenter>(mean, kCenter ? combine(s) : 0.0f, combine(q), n, eps);
}

template <bool kCenter, bool kFull, bool kStream, class S, class Y>
LLMOPS_INLINE void normalize_at(const NormParams& p, const S& source, const RowStats& stats,
                                int64_t i, int left, Y* y, typename S::H* h) {
  const Vec v = S::template at<kFull>(source, i, left), w = fetch<kFull>(p.weight + i, left);
  Vec out;
  if constexpr (kCenter) {
    const Vec z = fma(v - set1(stats.mean), set1(stats.rstd), set1(-stats.shift * stats.rstd));
    out = fma(z, w, fetch<kFull>(p.bias + i, left));
  } else {
    out = v * set1(stats.rstd) * w;
  }
  if (h) put<kFull, kStream>(h + i, v, left);
  put<kFull, kStream>(y + i, out, left);
}

template <bool kCenter, bool kStream, class S, class Y>
LLMOPS_INLINE void normalize(const NormParams& p, const S& source, const RowStats& stats, Y* y,
                             typename S::H* h) {
  int64_t i = 0;
  for (; i + kBlock <= p.n; i += kBlock) {
    LLMOPS_UNROLL for (int j = 0; j < 4; ++j) {
      normalize_at<kCenter, true, kStream>(p, source, stats, i + j * W, W, y, h);
    }
  }
  for (; i + W <= p.n; i += W) normalize_at<kCenter, true, kStream>(p, source, stats, i, W, y, h);
  if (i < p.n)
    normalize_at<kCenter, false, kStream>(p, source, stats, i, static_cast<int>(p.n - i), y, h);
}

template <class T>
LLMOPS_INLINE bool vector_aligned(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % (W * sizeof(T)) == 0;
}

template <bool kCenter, class X, class R>
LLMOPS_INLINE void forward_rows(const NormParams& p, const NormForwardRows& rows) {
  using S = Source<X, R>;
  using H = typename S::H;
  for (int64_t row = 0; row < rows.count; ++row) {
    const S source{row_of<X>(rows.x, rows.x_step, row),
                   row_of<R>(rows.residual, rows.residual_step, row)};
    X* y = row_of<X>(rows.y, rows.y_step, row);
    H* h = rows.h ? row_of<H>(rows.h, rows.h_step, row) : nullptr;
    const RowStats stats = row_stats<kCenter>(source, p.n, p.eps);
    if (p.stream && vector_aligned(y) && (!h || vector_aligned(h))) {
      normalize<kCenter, true>(p, source, stats, y, h);
    } else {
      normalize<kCenter, false>(p, source, stats, y, h);
    }
  }
  if (p.stream) stream_fence();
}

template <bool kCenter>
LLMOPS_INLINE void norm_forward(const NormParams& p, const NormForwardRows& rows) {
  LLMOPS_DISPATCH(p.x_type, X, {
    if (!rows.residual) {
      forward_rows<kCenter, X, NoResidual>(p, rows);
    } else if (p.residual_type == p.x_type) {
      forward_rows<kCenter, X, X>(p, rows);
    } else if constexpr (sizeof(X) == 2) {
      forward_rows<kCenter, X, float>(p, rows);
    }
  });
}

// What the last sweep needs of a row: z = d * rstd + z0, dh = g * rstd + d * slope + level.
struct RowGrad {
  float mean, rstd, z0, slope, level;
};

template <bool kCenter, class X, class H>
LLMOPS_INLINE RowGrad row_grad(const NormParams& p, const X* dy, const H* h) {
  const int64_t n = p.n;
  const float length = static_cast<float>(n);
  const Source<H, NoResidual> source{h, nullptr};
  const float mean = kCenter ? row_mean(source, n) : 0.0f;
  const Vec m = set1(mean);
  // Sums of d, d^2, g and g d.
  Vec s[4] = {zero(), zero(), zero(), zero()}, q[4] = {zero(), zero(), zero(), zero()};
  Vec a[4] = {zero(), zero(), zero(), zero()}, b[4] = {zero(), zero(), zero(), zero()};
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) {
    LLMOPS_UNROLL for (int j = 0; j < 4; ++j) {
      const int64_t k = i + j * W;
      Vec d = load(h + k);
      const Vec g = load(dy + k) * load(p.weight + k);
      if constexpr (kCenter) {
        d = d - m;
        s[j] = s[j] + d;
        a[j] = a[j] + g;
      }
      q[j] = fma(d, d, q[j]);
      b[j] = fma(d, g, b[j]);
    }
  }
  for (; i < n; i += W) {
    const int left = n - i < W ? static_cast<int>(n - i) : W;
    Vec d = load_n(h + i, left);
    const Vec g = load_n(dy + i, left) * load_n(p.weight + i, left);
    if constexpr (kCenter) {
      d = keep<false>(d - m, left);
      s[0] = s[0] + d;
      a[0] = a[0] + g;
    }
    q[0] = fma(d, d, q[0]);
    b[0] = fma(d, g, b[0]);
  }
  const RowStats stats =
      finish_stats<kCenter>(mean, kCenter ? combine(s) : 0.0f, combine(q), n, p.eps);
  const float r = stats.rstd, sum_g = kCenter ? combine(a) : 0.0f;
  // mean(g z) with z = (d - shift) r
  const float mean_gz = r * (combine(b) - stats.shift * sum_g) / length;
  const float slope = -r * (r * mean_gz);
  return {mean, r, -stats.shift * r, slope, -r * (sum_g / length) - slope * stats.shift};
}

template <bool kCenter, int kCount, bool kFull, class X, class H>
LLMOPS_INLINE void gradients_at(const NormParams& p, const NormBackwardRows& rows, int64_t first,
                                const RowGrad* grads, int64_t i, int left) {
  const Vec w = fetch<kFull>(p.weight + i, left);
  Vec dw = zero(), db = zero();
  LLMOPS_UNROLL for (int k = 0; k < kCount; ++k) {
    const RowGrad& c = grads[k];
    const Vec dy = fetch<kFull>(row_of<X>(rows.dy, rows.dy_step, first + k) + i, left);
    Vec d = fetch<kFull>(row_of<H>(rows.h, rows.h_step, first + k) + i, left);
    if constexpr (kCenter) {
      d = d - set1(c.mean);
      dw = fma(dy, fma(d, set1(c.rstd), set1(c.z0)), dw);
      db = db + dy;
    } else {
      dw = fma(dy, d * set1(c.rstd), dw);
    }
    if (rows.dh) {
      Vec dh = d * set1(c.slope);
      if constexpr (kCenter) dh = dh + set1(c.level);
      dh = fma(dy * w, set1(c.rstd), dh);
      if (rows.dh_in)
        dh = dh + fetch<kFull>(row_of<H>(rows.dh_in, rows.dh_in_step, first + k) + i, left);
      put<kFull, false>(row_of<H>(rows.dh, rows.dh_step, first + k) + i, dh, left);
      if constexpr (sizeof(X) != sizeof(H)) {
        if (rows.dx) put<kFull, false>(row_of<X>(rows.dx, rows.dx_step, first + k) + i, dh, left);
      }
    }
  }
  if (rows.dweight) {
    float* out = rows.dweight + i;
    put<kFull, false>(out, fetch<kFull>(out, left) + dw, left);
    if constexpr (kCenter) {
      out = rows.dbias + i;
      put<kFull, false>(out, fetch<kFull>(out, left) + db, left);
    }
  }
}

template <bool kCenter, int kCount, class X, class H>
LLMOPS_INLINE void backward_block(const NormParams& p, const NormBackwardRows& rows,
                                  int64_t first) {
  RowGrad grads[kCount];
  for (int k = 0; k < kCount; ++k)
    grads[k] = row_grad<kCenter>(p, row_of<X>(rows.dy, rows.dy_step, first + k),
                                 row_of<H>(rows.h, rows.h_step, first + k));
  int64_t i = 0;
  for (; i + W <= p.n; i += W)
    gradients_at<kCenter, kCount, true, X, H>(p, rows, first, grads, i, W);
  if (i < p.n)
    gradients_at<kCenter, kCount, false, X, H>(p, rows, first, grads, i, static_cast<int>(p.n - i));
}

template <bool kCenter, class X, class H>
LLMOPS_INLINE void backward_rows(const NormParams& p, const NormBackwardRows& rows) {
  int64_t row = 0;
  for (; row + kRows <= rows.count; row += kRows)
    backward_block<kCenter, kRows, X, H>(p, rows, row);
  for (; row < rows.count; ++row) backward_block<kCenter, 1, X, H>(p, rows, row);
}

template <bool kCenter>
LLMOPS_INLINE void norm_backward(const NormParams& p, const NormBackwardRows& rows) {
  LLMOPS_DISPATCH(p.x_type, X, {
    if (p.h_type == p.x_type) {
      backward_rows<kCenter, X, X>(p, rows);
    } else if constexpr (sizeof(X) == 2) {
      backward_rows<kCenter, X, float>(p, rows);
    }
  });
}

}  // namespace llmops::cpu::LLMOPS_ISA
