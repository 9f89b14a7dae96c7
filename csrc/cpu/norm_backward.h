// The backward's row loops of rms_norm (kCenter false) and layer_norm (kCenter true).
//
// One sweep for the statistics (taken as in norm_forward.h) and the row sums, one for dh, dweight
// and dbias, both over a row in cache. The second runs over kRows rows at once: the parameter
// gradients are loaded and stored once per kRows rows. fp32 throughout; from memory's side dy, h
// and dh_in are read once and dh written once.
#pragma once
#include "norm_forward.h"

namespace llmops::cpu::LLMOPS_ISA {

// As many as leave their five constants in registers, of which AVX2 has half.
constexpr int kRows = W == 16 ? 4 : 2;

// What the second sweep needs of a row: z = d * rstd + z0, dh = g * rstd + d * slope + level.
struct RowGrad {
  float k, rstd, z0, slope, level;
};

// Sums of g = dy * weight and of g d.
struct GradSums {
  float g, gd;
};

template <bool kCenter, class X, class H>
LLMOPS_INLINE GradSums backward_sums(const NormParams& p, const X* dy, const H* h, Sums& sums) {
  const int64_t n = p.n;
  const Vec shift = set1(sums.k);
  Vec s[4] = {zero(), zero(), zero(), zero()}, q[4] = {zero(), zero(), zero(), zero()};
  Vec a[4] = {zero(), zero(), zero(), zero()}, b[4] = {zero(), zero(), zero(), zero()};
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) {
    LLMOPS_UNROLL for (int j = 0; j < 4; ++j) {
      const int64_t c = i + j * W;
      Vec d = load(h + c);
      const Vec g = load(dy + c) * load(p.weight + c);
      if constexpr (kCenter) {
        d = d - shift;
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
      d = keep<false>(d - shift, left);
      s[0] = s[0] + d;
      a[0] = a[0] + g;
    }
    q[0] = fma(d, d, q[0]);
    b[0] = fma(d, g, b[0]);
  }
  sums.d = kCenter ? combine(s) : 0.0f;
  sums.squares = combine(q);
  return {kCenter ? combine(a) : 0.0f, combine(b)};
}

template <bool kCenter, class X, class H>
LLMOPS_NOINLINE RowGrad row_grad(const NormParams& p, const X* dy, const H* h) {
  const None* none = nullptr;
  const float length = static_cast<float>(p.n);
  Sums sums{kCenter ? first_mean(h, none, p.n) : 0.0f, 0.0f, 0.0f};
  GradSums grads = backward_sums<kCenter>(p, dy, h, sums);
  if (kCenter && imprecise(sums, p.n)) {
    sums.k += sums.d / length;
    grads = backward_sums<kCenter>(p, dy, h, sums);
  }
  const RowStats stats = finish_stats<kCenter>(sums, p.n, p.eps);
  const float r = stats.rstd;
  // mean(g z) with z = (d - shift) r
  const float mean_gz = r * (grads.gd - stats.shift * grads.g) / length;
  const float slope = -r * (r * mean_gz);
  return {stats.k, r, -stats.shift * r, slope, -r * (grads.g / length) - slope * stats.shift};
}

// The rows of one block; null where not wanted.
template <int kCount, class X, class H>
struct BlockRows {
  const X* dy[kCount];
  const H *h[kCount], *dh_in[kCount];
  H* dh[kCount];
  X* dx[kCount];
};

// kPlain: dh is wanted, and neither a dh_in comes nor a dx goes.
template <bool kCenter, bool kPlain, bool kParams, bool kFull, int kCount, class X, class H>
LLMOPS_INLINE void gradients_at(const NormParams& p, const NormBackwardRows& rows,
                                const BlockRows<kCount, X, H>& at, const RowGrad* grads, int64_t i,
                                int left) {
  const Vec w = fetch<kFull>(p.weight + i, left);
  Vec dw = zero(), db = zero();
  LLMOPS_UNROLL for (int k = 0; k < kCount; ++k) {
    const RowGrad& c = grads[k];
    const Vec dy = fetch<kFull>(at.dy[k] + i, left);
    Vec d = fetch<kFull>(at.h[k] + i, left);
    if constexpr (kCenter) d = d - set1(c.k);
    if constexpr (kParams) {
      dw = fma(dy, kCenter ? fma(d, set1(c.rstd), set1(c.z0)) : d * set1(c.rstd), dw);
      if constexpr (kCenter) db = db + dy;
    }
    if (kPlain || rows.dh) {
      Vec dh = kCenter ? fma(d, set1(c.slope), set1(c.level)) : d * set1(c.slope);
      dh = fma(dy * w, set1(c.rstd), dh);
      if constexpr (!kPlain) {
        if (rows.dh_in) dh = dh + fetch<kFull>(at.dh_in[k] + i, left);
        if constexpr (sizeof(X) != sizeof(H)) {
          if (rows.dx) put<kFull, false>(at.dx[k] + i, dh, left);
        }
      }
      put<kFull, false>(at.dh[k] + i, dh, left);
    }
  }
  if constexpr (kParams) {
    put<kFull, false>(rows.dweight + i, fetch<kFull>(rows.dweight + i, left) + dw, left);
    if constexpr (kCenter)
      put<kFull, false>(rows.dbias + i, fetch<kFull>(rows.dbias + i, left) + db, left);
  }
}

template <bool kCenter, bool kPlain, bool kParams, int kCount, class X, class H>
LLMOPS_INLINE void backward_block(const NormParams& p, const NormBackwardRows& rows,
                                  int64_t first) {
  RowGrad grads[kCount];
  BlockRows<kCount, X, H> at;
  for (int k = 0; k < kCount; ++k) {
    const int64_t row = first + k;
    at.dy[k] = row_of<X>(rows.dy, rows.dy_step, row);
    at.h[k] = row_of<H>(rows.h, rows.h_step, row);
    at.dh_in[k] = row_of<H>(rows.dh_in, rows.dh_in_step, row);
    at.dh[k] = row_of<H>(rows.dh, rows.dh_step, row);
    at.dx[k] = row_of<X>(rows.dx, rows.dx_step, row);
    grads[k] = row_grad<kCenter>(p, at.dy[k], at.h[k]);
  }
  int64_t i = 0;
  for (; i + kBlock <= p.n; i += kBlock) {
    for (int k = 0; k < kCount; ++k) {  // the rows of the next block
      prefetch_block(row_of<X>(rows.dy, rows.dy_step, first + kCount + k) + i);
      prefetch_block(row_of<H>(rows.h, rows.h_step, first + kCount + k) + i);
    }
    LLMOPS_UNROLL for (int j = 0; j < 4; ++j) {
      gradients_at<kCenter, kPlain, kParams, true>(p, rows, at, grads, i + j * W, W);
    }
  }
  for (; i + W <= p.n; i += W)
    gradients_at<kCenter, kPlain, kParams, true>(p, rows, at, grads, i, W);
  if (i < p.n)
    gradients_at<kCenter, kPlain, kParams, false>(p, rows, at, grads, i, static_cast<int>(p.n - i));
}

template <bool kCenter, bool kPlain, bool kParams, class X, class H>
LLMOPS_INLINE void backward_rows(const NormParams& p, const NormBackwardRows& rows) {
  int64_t row = 0;
  for (; row + kRows <= rows.count; row += kRows)
    backward_block<kCenter, kPlain, kParams, kRows, X, H>(p, rows, row);
  for (; row < rows.count; ++row) backward_block<kCenter, kPlain, kParams, 1, X, H>(p, rows, row);
}

template <bool kCenter, class X, class H>
LLMOPS_INLINE void backward_form(const NormParams& p, const NormBackwardRows& rows) {
  const bool plain = rows.dh && !rows.dh_in && !rows.dx;
  if (plain && rows.dweight) {
    backward_rows<kCenter, true, true, X, H>(p, rows);
  } else if (plain) {
    backward_rows<kCenter, true, false, X, H>(p, rows);
  } else if (rows.dweight) {
    backward_rows<kCenter, false, true, X, H>(p, rows);
  } else {
    backward_rows<kCenter, false, false, X, H>(p, rows);
  }
}

template <bool kCenter>
LLMOPS_INLINE void norm_backward(const NormParams& p, const NormBackwardRows& rows) {
  LLMOPS_DISPATCH(p.x_type, X, {
    if (p.h_type == p.x_type) {
      backward_form<kCenter, X, X>(p, rows);
    } else if constexpr (sizeof(X) == 2) {
      backward_form<kCenter, X, float>(p, rows);
    }
  });
}

}  // namespace llmops::cpu::LLMOPS_ISA
