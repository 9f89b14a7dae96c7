// Row cross-entropy: log-sum-exp, the target's loss, and the gradient. Formula: cross_entropy.h
//
// Forward: online over runs of the row that fit L1. A run is swept twice, for its maximum and for
// its sum of exponentials; the sum so far is rescaled when the maximum grows. Memory is read once,
// whatever the length of the row. Backward: one sweep, exp(x - lse) from the saved log-sum-exp; the
// target's element is computed apart, by expm1, since softmax - 1 cancels where the model is sure.
// fp32 in the lanes, fp64 across runs. Bytes per element: x read (forward); x read, dx written
// (backward). Milakov and Gimelshein 2018.
#include "cross_entropy.h"

#include "simd.h"

namespace llmops::cpu::LLMOPS_ISA {
namespace {

constexpr int kBlock = 4 * W;
constexpr int64_t kRun = 4096;  // 16 KiB of fp32: half of an L1

// How the label-smoothing sum is taken: not at all, with all weights one, with class weights.
enum class Smooth : int { none, uniform, weighted };

LLMOPS_INLINE float combine_add(const Vec* s) { return reduce_add((s[0] + s[1]) + (s[2] + s[3])); }

// Maximum, NaNs aside: those show in the sum.
template <class X>
LLMOPS_INLINE float run_top(const X* x, int64_t n) {
  Vec m[4] = {set1(-kInf), set1(-kInf), set1(-kInf), set1(-kInf)};
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) {
    LLMOPS_UNROLL for (int j = 0; j < 4; ++j) m[j] = max(load(x + i + j * W), m[j]);
  }
  for (; i < n; i += W) {
    m[0] = max(load_n(x + i, n - i < W ? static_cast<int>(n - i) : W, -kInf), m[0]);
  }
  return reduce_max(max(max(m[0], m[1]), max(m[2], m[3])));
}

struct RunSums {
  float exps, gap, weight;
};

// Sums over a run of exp(x - shift), w (shift - x) and w. The run that follows is fetched
// meanwhile.
template <Smooth kSmooth, class X>
LLMOPS_INLINE RunSums run_sums(const X* x, const float* weight, int64_t n, float shift) {
  const Vec top = set1(shift), unit = set1(kLog2e);
  Vec s[4] = {zero(), zero(), zero(), zero()}, g[4] = {zero(), zero(), zero(), zero()};
  Vec w[4] = {zero(), zero(), zero(), zero()};
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) {
    prefetch_block(x + n + i);
    LLMOPS_UNROLL for (int j = 0; j < 4; ++j) {
      const Vec d = load(x + i + j * W) - top;
      s[j] = s[j] + exp2_softmax(d * unit);
      if constexpr (kSmooth == Smooth::uniform) g[j] = g[j] - d;
      if constexpr (kSmooth == Smooth::weighted) {
        const Vec own = load(weight + i + j * W);
        g[j] = fnma(own, d, g[j]);
        w[j] = w[j] + own;
      }
    }
  }
  for (; i < n; i += W) {
    const int left = n - i < W ? static_cast<int>(n - i) : W;
    const Vec d = load_n(x + i, left, -kInf) - top;
    s[0] = s[0] + exp2_softmax(d * unit);
    const Vec inside = select(first_n(left), d, zero());
    if constexpr (kSmooth == Smooth::uniform) g[0] = g[0] - inside;
    if constexpr (kSmooth == Smooth::weighted) {
      const Vec own = load_n(weight + i, left);
      g[0] = fnma(own, inside, g[0]);
      w[0] = w[0] + own;
    }
  }
  const float count = static_cast<float>(n);
  return {combine_add(s), kSmooth == Smooth::none ? 0.0f : combine_add(g),
          kSmooth == Smooth::weighted ? combine_add(w) : count};
}

template <Smooth kSmooth, class X>
LLMOPS_NOINLINE CrossEntropyRow forward(int64_t n, const X* x, int64_t target,
                                        const float* weight) {
  double top = -kInf, sum = 0.0, gap = 0.0, seen = 0.0;
  for (int64_t begin = 0; begin < n; begin += kRun) {
    const int64_t count = n - begin < kRun ? n - begin : kRun;
    const double m = run_top(x + begin, count);
    if (m > top) {
      sum *= __builtin_exp(top - m);
      if (kSmooth != Smooth::none && begin > 0) gap += seen * (m - top);
      top = m;
    }
    // Nothing but -inf so far: take off 0, or -inf - -inf is NaN.
    const float shift = top == -kInf ? 0.0f : static_cast<float>(top);
    const RunSums run =
        run_sums<kSmooth>(x + begin, weight ? weight + begin : weight, count, shift);
    sum += run.exps;
    gap += run.gap;
    seen += run.weight;
  }
  const double log_sum = __builtin_log(sum);
  return {top + log_sum, (top - static_cast<double>(to_float(x[target]))) + log_sum,
          kSmooth == Smooth::none ? 0.0 : gap + seen * log_sum};
}

template <bool kWeighted, class X>
struct Gradient {
  const X* x;
  const float* weight;
  Vec lse, a, c;
  X* dx;
};

template <bool kWeighted, class X>
LLMOPS_INLINE Vec gradient_of(const Gradient<kWeighted, X>& g, Vec x, Vec weight) {
  const Vec p = exp2_softmax((x - g.lse) * set1(kLog2e));
  return p * g.a - (kWeighted ? weight * g.c : g.c);
}
// The first `count` elements from i on.
template <bool kWeighted, class X>
LLMOPS_INLINE void gradient_n(const Gradient<kWeighted, X>& g, int64_t i, int count) {
  const Vec weight = kWeighted ? load_n(g.weight + i, count) : g.c;
  store_n(g.dx + i, gradient_of(g, load_n(g.x + i, count), weight), count);
}

// kStream: dx goes past the caches, which it would only push the logits out of.
template <bool kStream, bool kWeighted, class X>
LLMOPS_NOINLINE void backward(int64_t n, const Gradient<kWeighted, X>& row) {
  const Gradient<kWeighted, X> g = row;  // in registers: a store to dx cannot change it
  int64_t i = 0;
  if constexpr (kStream) {
    // Rows of an odd vocabulary start anywhere; whole vectors start where they are aligned.
    constexpr uintptr_t kBytes = W * sizeof(X);
    const uintptr_t over = reinterpret_cast<uintptr_t>(g.dx) % kBytes;
    const int64_t head = over == 0 ? 0 : static_cast<int64_t>((kBytes - over) / sizeof(X));
    i = head < n ? head : n;
    if (i > 0) gradient_n(g, 0, static_cast<int>(i));
  }
  for (; i + kBlock <= n; i += kBlock) {
    LLMOPS_UNROLL for (int j = 0; j < 4; ++j) {
      const int64_t at = i + j * W;
      const Vec d = gradient_of(g, load(g.x + at), kWeighted ? load(g.weight + at) : g.c);
      if constexpr (kStream) {
        stream(g.dx + at, d);
      } else {
        store(g.dx + at, d);
      }
    }
  }
  for (; i < n; i += W) gradient_n(g, i, n - i < W ? static_cast<int>(n - i) : W);
  if constexpr (kStream) stream_fence();
}

template <bool kWeighted, class X>
LLMOPS_INLINE void backward_row(int64_t n, const X* x, const CrossEntropyGrad& grad,
                                const float* weight, bool past_caches, X* dx) {
  // What fp32 drops of lse is a factor of all exponentials: it goes into a.
  const float lse = static_cast<float>(grad.lse);
  const double dropped = __builtin_exp(static_cast<double>(lse) - grad.lse);
  const Gradient<kWeighted, X> row{x,
                                   weight,
                                   set1(lse),
                                   set1(static_cast<float>(grad.a * dropped)),
                                   set1(static_cast<float>(grad.c)),
                                   dx};
  // a p - b - c w = a (p - 1) + rest. x is read before dx, which may be x, is written.
  const double gap = static_cast<double>(to_float(x[grad.target])) - grad.lse;
  const double at_target = grad.a * __builtin_expm1(gap) + grad.rest;
  if (past_caches) {
    backward<true>(n, row);
  } else {
    backward<false>(n, row);
  }
  from_float(static_cast<float>(at_target), dx + grad.target);
}

}  // namespace

CrossEntropyRow cross_entropy_fwd_row(DType type, int64_t n, const void* x, int64_t target,
                                      bool smooth, const float* weight) {
  CrossEntropyRow row{};
  LLMOPS_DISPATCH(type, X, {
    const auto* logits = static_cast<const X*>(x);
    if (!smooth) {
      row = forward<Smooth::none>(n, logits, target, weight);
    } else if (weight == nullptr) {
      row = forward<Smooth::uniform>(n, logits, target, weight);
    } else {
      row = forward<Smooth::weighted>(n, logits, target, weight);
    }
  });
  return row;
}

void cross_entropy_bwd_row(DType type, int64_t n, const void* x, const CrossEntropyGrad& grad,
                           const float* weight, bool past_caches, void* dx) {
  LLMOPS_DISPATCH(type, X, {
    const auto* logits = static_cast<const X*>(x);
    if (weight != nullptr && grad.c != 0.0) {
      backward_row<true>(n, logits, grad, weight, past_caches, static_cast<X*>(dx));
    } else {
      backward_row<false>(n, logits, grad, weight, past_caches, static_cast<X*>(dx));
    }
  });
}

}  // namespace llmops::cpu::LLMOPS_ISA
