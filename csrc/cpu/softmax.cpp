// Row softmax: y = softmax(scale * x + mask), columns past the causal limit zero. Formula:
// softmax.h
//
// Three sweeps over a row that stays in L1/L2: maximum; exponential and sum; division. The scale
// and log2 e are one factor of the distance to the maximum: subtracting first makes that exactly 0
// where the maximum is, however large the logits. Lanes run along the row, four vectors at a time;
// fp32 throughout. From memory's side each element is read once and written once (8 bytes in fp32),
// about 30 instructions per vector.
// With a mask the scaled, masked logits are kept in scratch by the first sweep, in natural units:
// an additive mask may hold the lowest finite number, which times log2 e would be -inf.
#include "softmax.h"

#include "simd.h"

namespace llmops::cpu::LLMOPS_ISA {
namespace {

constexpr int kBlock = 4 * W;
constexpr int64_t kRun = 4096;             // elements that are summed up before the next ones are
constexpr int64_t kNextBytes = 128 << 10;  // of a row that is fetched ahead
constexpr int64_t kAhead = 2 << 10;        // bytes of a longer row's stream that are

LLMOPS_INLINE float combine_max(const Vec* m) {
  return reduce_max(max(max(m[0], m[1]), max(m[2], m[3])));
}
LLMOPS_INLINE float combine_add(const Vec* s) { return reduce_add((s[0] + s[1]) + (s[2] + s[3])); }

// n elements; a whole vector where they fill one: loads of part of it copy.
template <class T>
LLMOPS_INLINE Vec read(const T* p, int n) {
  return n == W ? load(p) : load_n(p, n);
}

// The logits: scale * x + mask, -inf where a bool mask drops.
template <class X, class M>
LLMOPS_INLINE Vec logits(const SoftmaxParams& p, const X* x, const M* mask, int64_t i, int n) {
  const Vec raw = read(x + i, n) * set1(p.scale);
  if (p.mask_kind == MaskKind::boolean) {
    const uint8_t* keep = reinterpret_cast<const uint8_t*>(mask);
    if (p.mask_step == 0) return *keep ? raw : set1(-kInf);
    return select(load_mask_n(keep + i, n), raw, set1(-kInf));
  }
  const Vec bias = p.mask_step == 0 ? set1(to_float(*mask)) : read(mask + i, n);
  return raw + bias;
}

template <class Y>
LLMOPS_INLINE void fill_zero(Y* y, int64_t begin, int64_t end) {
  int64_t i = begin;
  for (; i + W <= end; i += W) store(y + i, zero());
  store_n(y + i, zero(), static_cast<int>(end - i));
}

// Divides: y[i] = e[i] * (1 / sum).
template <class Y>
LLMOPS_INLINE void normalize(const float* e, Y* y, int64_t n, float sum) {
  const Vec r = set1(1.0f / sum);
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) {
    LLMOPS_UNROLL for (int j = 0; j < 4; ++j) store(y + i + j * W, load(e + i + j * W) * r);
  }
  for (; i + W <= n; i += W) store(y + i, load(e + i) * r);
  store_n(y + i, load_n(e + i, static_cast<int>(n - i)) * r, static_cast<int>(n - i));
}

// Where the row after x begins, if rows are dense; null where it would only push x out of L2.
template <class X>
LLMOPS_INLINE const X* next_row(const X* x, int64_t n) {
  return n * static_cast<int64_t>(sizeof(X)) <= kNextBytes ? x + n : nullptr;
}

// e[i] = 2^(factor * (x[i] - top)) for n elements; returns their sum. `next`, what the row that
// follows has there, is fetched meanwhile where it is not null.
template <class X, class N>
LLMOPS_INLINE float exponentials_of(const X* x, const N* next, float* e, int64_t n, float factor,
                                    float top) {
  const Vec f = set1(factor), t = set1(top);
  Vec s[4] = {zero(), zero(), zero(), zero()};
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) {
    if (next) prefetch_block(next + i);
    LLMOPS_UNROLL for (int j = 0; j < 4; ++j) {
      const Vec v = exp2_softmax((load(x + i + j * W) - t) * f);
      store(e + i + j * W, v);
      s[j] = s[j] + v;
    }
  }
  for (; i < n; i += W) {
    const int left = n - i < W ? static_cast<int>(n - i) : W;
    const Vec v = select(first_n(left), exp2_softmax((load_n(x + i, left) - t) * f), zero());
    store_n(e + i, v, left);
    s[0] = s[0] + v;
  }
  return combine_add(s);
}

// The same of a row, in runs: the longer a lane's sum, the more it loses to rounding.
template <class X, class N>
LLMOPS_INLINE float exponentials(const X* x, const N* next, float* e, int64_t n, float factor,
                                 float top) {
  float sum = 0.0f;
  for (int64_t i = 0; i < n; i += kRun) {
    const int64_t count = n - i < kRun ? n - i : kRun;
    sum += exponentials_of(x + i, next ? next + i : next, e + i, count, factor, top);
  }
  return sum;
}

// The phases are functions of one or two types each, dispatched one after the other: all
// combinations of x, mask and y in one function would be 27 copies of it.

// Of the valid part of a row, the element whose logit is the largest. A row that none before it has
// fetched is read as four streams, a vector of each at a time, which memory answers sooner than
// one.
template <class X>
LLMOPS_INLINE float row_top(const X* x, int64_t valid, float factor) {
  // A negative factor turns the order round: the largest logit is then the smallest x.
  const Vec sign = set1(factor < 0.0f ? -1.0f : 1.0f);
  Vec m[4] = {set1(-kInf), set1(-kInf), set1(-kInf), set1(-kInf)};
  const int64_t length = valid / kBlock * W;
  if (next_row(x, valid) == nullptr) {
    for (int64_t i = 0; i < length; i += W) {
      LLMOPS_UNROLL for (int j = 0; j < 4; ++j) {
        const X* const from = x + j * length + i;
        m[j] = max(m[j], load(from) * sign);
        __builtin_prefetch(reinterpret_cast<const char*>(from) + kAhead);
      }
    }
  } else {
    for (int64_t i = 0; i < 4 * length; i += kBlock) {
      LLMOPS_UNROLL for (int j = 0; j < 4; ++j) m[j] = max(m[j], load(x + i + j * W) * sign);
    }
  }
  for (int64_t i = 4 * length; i < valid; i += W) {
    const int left = valid - i < W ? static_cast<int>(valid - i) : W;
    m[0] = max(m[0], select(first_n(left), load_n(x + i, left) * sign, set1(-kInf)));
  }
  return combine_max(m) * first_lane(sign);
}

// Scaled and masked logits of the valid part, kept in `z`; returns their maximum.
template <class X, class M>
LLMOPS_INLINE float masked_logits(const SoftmaxParams& p, const X* x, const M* mask, int64_t valid,
                                  float* z) {
  Vec m[4] = {set1(-kInf), set1(-kInf), set1(-kInf), set1(-kInf)};
  int64_t i = 0;
  for (; i + kBlock <= valid; i += kBlock) {
    LLMOPS_UNROLL for (int j = 0; j < 4; ++j) {
      const Vec v = logits(p, x, mask, i + j * W, W);
      store(z + i + j * W, v);
      m[j] = max(m[j], v);
    }
  }
  for (; i < valid; i += W) {
    const int left = valid - i < W ? static_cast<int>(valid - i) : W;
    const Vec v = select(first_n(left), logits(p, x, mask, i, left), set1(-kInf));
    store_n(z + i, v, left);
    m[0] = max(m[0], v);
  }
  return combine_max(m);
}

// kStream: dx goes past the caches, which it would only push y and dy out of.
template <bool kStream, class Y, class X>
LLMOPS_INLINE void backward(int64_t n, float scale, const Y* y, const Y* dy, X* dx) {
  Vec s[4] = {zero(), zero(), zero(), zero()};
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) {
    LLMOPS_UNROLL for (int j = 0; j < 4; ++j) {
      s[j] = fma(load(y + i + j * W), load(dy + i + j * W), s[j]);
    }
  }
  for (; i < n; i += W) {
    const int left = n - i < W ? static_cast<int>(n - i) : W;
    s[0] = fma(load_n(y + i, left), load_n(dy + i, left), s[0]);
  }
  const Vec dot = set1(combine_add(s)), factor = set1(scale);
  const bool ahead = next_row(y, n) != nullptr;
  for (i = 0; i + kBlock <= n; i += kBlock) {
    if (ahead) {
      prefetch_block(y + n + i);
      prefetch_block(dy + n + i);
    }
    LLMOPS_UNROLL for (int j = 0; j < 4; ++j) {
      const int64_t k = i + j * W;
      const Vec d = load(y + k) * factor * (load(dy + k) - dot);
      if constexpr (kStream) {
        stream(dx + k, d);
      } else {
        store(dx + k, d);
      }
    }
  }
  for (; i < n; i += W) {
    const int left = n - i < W ? static_cast<int>(n - i) : W;
    store_n(dx + i, load_n(y + i, left) * factor * (load_n(dy + i, left) - dot), left);
  }
}

}  // namespace

void softmax_fwd_row(const SoftmaxParams& p, const SoftmaxRow& row, int64_t valid, float* scratch) {
  const bool masked = p.mask_kind != MaskKind::none;
  const float factor = (masked ? 1.0f : p.scale) * kLog2e;
  float top = -kInf;
  if (!masked) {
    LLMOPS_DISPATCH(p.x_type, X, top = row_top(static_cast<const X*>(row.x), valid, factor));
  } else {
    const DType mask_type = p.mask_kind == MaskKind::additive ? p.mask_type : DType::f32;
    LLMOPS_DISPATCH(p.x_type, X, LLMOPS_DISPATCH(mask_type, M, {
                      top = masked_logits(p, static_cast<const X*>(row.x),
                                          static_cast<const M*>(row.mask), valid, scratch);
                    }));
  }
  // Nothing left in the row: its maximum is -inf, and -inf - -inf would be NaN.
  if (p.zero_if_empty && (valid == 0 || (factor < 0.0f ? -top : top) == -kInf)) {
    LLMOPS_DISPATCH(p.y_type, Y, fill_zero(static_cast<Y*>(row.y), 0, p.n));
    return;
  }
  float* e = p.y_type == DType::f32 ? static_cast<float*>(row.y) : scratch;
  float sum = 0.0f;
  if (!masked) {
    LLMOPS_DISPATCH(p.x_type, X, {
      const auto* x = static_cast<const X*>(row.x);
      sum = exponentials(x, next_row(x, p.n), e, valid, factor, top);
    });
  } else {
    LLMOPS_DISPATCH(p.x_type, X, {
      const auto* x = static_cast<const X*>(row.x);
      sum = exponentials(scratch, next_row(x, p.n), e, valid, factor, top);
    });
  }
  LLMOPS_DISPATCH(p.y_type, Y, {
    normalize(e, static_cast<Y*>(row.y), valid, sum);
    if (valid < p.n) fill_zero(static_cast<Y*>(row.y), valid, p.n);
  });
}

void softmax_bwd_row(DType y_type, DType dx_type, int64_t n, float scale, bool past_caches,
                     const void* y, const void* dy, void* dx) {
  LLMOPS_DISPATCH(y_type, Y, LLMOPS_DISPATCH(dx_type, X, {
                    const auto* from = static_cast<const Y*>(y);
                    const auto* grad = static_cast<const Y*>(dy);
                    auto* to = static_cast<X*>(dx);
                    const bool aligned = reinterpret_cast<uintptr_t>(to) % (W * sizeof(X)) == 0;
                    if (past_caches && aligned) {
                      backward<true>(n, scale, from, grad, to);
                      stream_fence();
                    } else {
                      backward<false>(n, scale, from, grad, to);
                    }
                  }));
}

}  // namespace llmops::cpu::LLMOPS_ISA
