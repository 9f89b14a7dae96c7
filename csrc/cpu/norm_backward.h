// The backward's row loops of rms_norm (kCenter false) and layer_norm (kCenter true).
//
// One sweep for the statistics (taken as in norm_forward.h) and the row sums, one for dh, dweight
// and dbias, both over a row in cache. fp32 throughout; from memory's side dy, h and dh_in are read
// once and dh written once.
#pragma once
#include "norm_forward.h"

namespace llmops::cpu::LLMOPS_ISA {

// Rows of one second sweep, which loads and stores the parameters' gradients once for all: as many
// as leave their five constants in registers. With AVX2's sixteen two would, but are no faster in
// cache, and slower from memory: of 768 fp32 values, two rows and the next two exceed L1.
constexpr int kRows = W == 16 ? 4 : 1;

// Whether the next rows are fetched meanwhile. Not where there are four of them: with these they
// exceed L1, and push out what the sweep is about to read.
constexpr bool kAhead = kRows == 1;

// Chains of each of the first sweep's sums: four times four spill where there are 16 registers, and
// a chain through memory is three times as long.
template <bool kCenter>
constexpr int kChains = kCenter && W <= 8 ? 2 : 4;

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
  const float* weight = p.weight;
  const Vec shift = set1(sums.k);
  constexpr int kEach = kChains<kCenter>;
  Vec s[4] = {zero(), zero(), zero(), zero()}, q[4] = {zero(), zero(), zero(), zero()};
  Vec a[4] = {zero(), zero(), zero(), zero()}, b[4] = {zero(), zero(), zero(), zero()};
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) {
    LLMOPS_UNROLL for (int j = 0; j < 4; ++j) {
      const int64_t c = i + j * W;
      const int m = j % kEach;
      Vec d = load(h + c);
      const Vec g = load(dy + c) * load(weight + c);
      if constexpr (kCenter) {
        d = d - shift;
        s[m] = s[m] + d;
        a[m] = a[m] + g;
      }
      q[m] = fma(d, d, q[m]);
      b[m] = fma(d, g, b[m]);
    }
  }
  for (; i < n; i += W) {
    const int left = n - i < W ? static_cast<int>(n - i) : W;
    Vec d = load_n(h + i, left);
    const Vec g = load_n(dy + i, left) * load_n(weight + i, left);
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

// What the second sweep reads and writes, and its constants: a copy, since a vector's store may
// alias anything that has an address, and its loops would load all of them again for each.
template <int kCount, class X, class H>
struct BlockRows {
  const float* weight;
  float *dweight, *dbias;
  const X* dy[kCount];
  const H *h[kCount], *dh_in[kCount];  // null where not wanted, as dh and dx
  H* dh[kCount];
  X* dx[kCount];
  Vec k[kCount], rstd[kCount], z0[kCount], slope[kCount], level[kCount];
};

// kPlain: dh is wanted, and neither a dh_in comes nor a dx goes.
template <bool kCenter, bool kPlain, bool kParams, bool kFull, int kCount, class X, class H>
LLMOPS_INLINE void gradients_at(const BlockRows<kCount, X, H>& at, int64_t i, int left) {
  const Vec w = fetch<kFull>(at.weight + i, left);
  Vec dw = zero(), db = zero();
  if constexpr (kParams) {
    dw = fetch<kFull>(at.dweight + i, left);
    if constexpr (kCenter) db = fetch<kFull>(at.dbias + i, left);
  }
  LLMOPS_UNROLL for (int j = 0; j < kCount; ++j) {
    const Vec dy = fetch<kFull>(at.dy[j] + i, left);
    Vec d = fetch<kFull>(at.h[j] + i, left);
    if constexpr (kCenter) d = d - at.k[j];
    if constexpr (kParams) {
      dw = fma(dy, kCenter ? fma(d, at.rstd[j], at.z0[j]) : d * at.rstd[j], dw);
      if constexpr (kCenter) db = db + dy;
    }
    if (kPlain || at.dh[j]) {
      Vec dh = kCenter ? fma(d, at.slope[j], at.level[j]) : d * at.slope[j];
      dh = fma(dy * w, at.rstd[j], dh);
      if constexpr (!kPlain) {
        if (at.dh_in[j]) dh = dh + fetch<kFull>(at.dh_in[j] + i, left);
        if constexpr (sizeof(X) != sizeof(H)) {
          if (at.dx[j]) put<kFull, false>(at.dx[j] + i, dh, left);
        }
      }
      put<kFull, false>(at.dh[j] + i, dh, left);
    }
  }
  if constexpr (kParams) {
    put<kFull, false>(at.dweight + i, dw, left);
    if constexpr (kCenter) put<kFull, false>(at.dbias + i, db, left);
  }
}

template <bool kCenter, bool kPlain, bool kParams, int kCount, class X, class H>
LLMOPS_INLINE void backward_block(const NormParams& p, const NormBackwardRows& rows,
                                  int64_t first) {
  BlockRows<kCount, X, H> at;
  at.weight = p.weight;
  at.dweight = rows.dweight;
  at.dbias = rows.dbias;
  const X* dy_next[kCount];
  const H* h_next[kCount];
  LLMOPS_UNROLL for (int j = 0; j < kCount; ++j) {
    const int64_t row = first + j;
    at.dy[j] = row_of<X>(rows.dy, rows.dy_step, row);
    at.h[j] = row_of<H>(rows.h, rows.h_step, row);
    at.dh_in[j] = rows.dh_in ? row_of<H>(rows.dh_in, rows.dh_in_step, row) : nullptr;
    at.dh[j] = rows.dh ? row_of<H>(rows.dh, rows.dh_step, row) : nullptr;
    at.dx[j] = rows.dx ? row_of<X>(rows.dx, rows.dx_step, row) : nullptr;
    dy_next[j] = row_of<X>(rows.dy, rows.dy_step, row + kCount);
    h_next[j] = row_of<H>(rows.h, rows.h_step, row + kCount);
    const RowGrad c = row_grad<kCenter>(p, at.dy[j], at.h[j]);
    at.k[j] = set1(c.k);
    at.rstd[j] = set1(c.rstd);
    at.z0[j] = set1(c.z0);
    at.slope[j] = set1(c.slope);
    at.level[j] = set1(c.level);
  }
  const int64_t n = p.n;
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) {
    if constexpr (kAhead) {
      LLMOPS_UNROLL for (int j = 0; j < kCount; ++j) {
        prefetch_block(dy_next[j] + i);
        prefetch_block(h_next[j] + i);
      }
    }
    LLMOPS_UNROLL for (int j = 0; j < 4; ++j) {
      gradients_at<kCenter, kPlain, kParams, true>(at, i + j * W, W);
    }
  }
  for (; i + W <= n; i += W) gradients_at<kCenter, kPlain, kParams, true>(at, i, W);
  if (i < n) gradients_at<kCenter, kPlain, kParams, false>(at, i, static_cast<int>(n - i));
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
