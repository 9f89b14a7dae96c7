// Row cross-entropy: log-sum-exp, the target's loss, and the gradient. Formula: cross_entropy.h
//
// Forward, in one pass: the row is read as four streams at once, a vector of each to a step, and
// exponentials are taken relative to the largest logit so far, sought in the first steps. Where a
// step holds a larger one, which is seldom, what the lanes have summed is brought to it. fp32 in
// the lanes, fp64 across runs. Backward: one sweep, exp(x - lse) from the saved log-sum-exp; the
// target's element is computed apart, by expm1, since softmax - 1 cancels where the model is sure.
// Bytes per element: x read (forward); x read, dx written (backward). Milakov and Gimelshein 2018.
#include "cross_entropy.h"

#include "simd.h"

namespace llmops::cpu::LLMOPS_ISA {
namespace {

constexpr int kBlock = 4 * W;
constexpr int64_t kRun = 128 * W;     // elements of a stream that are summed up before the next are
constexpr int64_t kLook = 32 * W;     // elements of a stream that the first maximum is sought in
constexpr int64_t kShort = 16 << 10;  // bytes of a row, the next of which is fetched meanwhile
constexpr int64_t kAhead = 2 << 10;   // bytes of a longer row's stream that are fetched ahead

// How the label-smoothing sum is taken: not at all, with all weights one, with class weights.
enum class Smooth : int { none, uniform, weighted };

LLMOPS_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
LLMOPS_INLINE float combine_add(const Vec* s) { return reduce_add((s[0] + s[1]) + (s[2] + s[3])); }

// A row is read as four streams, which memory answers sooner than one: vector j of a step is in
// stream j, `length` elements from the last one's. What is left, less than a step, comes after.
struct Streams {
  int64_t length, ahead;
};
template <class X>
LLMOPS_INLINE Streams streams_of(int64_t n) {
  const int64_t bytes = n * static_cast<int64_t>(sizeof(X));
  return {n / kBlock * W, bytes <= kShort ? bytes : kAhead};
}

// Maximum of the first `count` elements of each stream, NaNs aside: those show in the sum.
template <class X>
LLMOPS_INLINE float first_top(const X* x, int64_t length, int64_t count) {
  Vec m[4] = {set1(-kInf), set1(-kInf), set1(-kInf), set1(-kInf)};
  for (int64_t i = 0; i < count; i += W) {
    LLMOPS_UNROLL for (int j = 0; j < 4; ++j) m[j] = max(load(x + j * length + i), m[j]);
  }
  return reduce_max(max(max(m[0], m[1]), max(m[2], m[3])));
}

// The maximum so far is the shift; before there is one, or -inf - -inf would be NaN, 0 is.
LLMOPS_INLINE float shift_of(float top) { return top == -kInf ? 0.0f : top; }

// Sums over a row so far, relative to its maximum so far.
struct Row {
  float top;
  double sum, gap, seen;
};

// To sums relative to a maximum that is larger.
LLMOPS_INLINE void raise(float top, Row* row) {
  row->sum *= __builtin_exp(static_cast<double>(row->top) - top);
  row->gap += row->seen * (static_cast<double>(top) - shift_of(row->top));
  row->top = top;
}

// Adds elements begin to end of each stream. The maximum seldom grows: what the lanes hold is then
// brought to the new one.
template <Smooth kSmooth, class X>
LLMOPS_INLINE void add_streams(const X* x, const float* weight, const Streams& streams,
                               int64_t begin, int64_t end, Row* row) {
  const Streams at = streams;  // in registers
  const Vec unit = set1(kLog2e);
  float top = row->top;
  Vec limit = set1(top), shift = set1(shift_of(top));
  Vec s[4] = {zero(), zero(), zero(), zero()}, g[4] = {zero(), zero(), zero(), zero()};
  Vec w[4] = {zero(), zero(), zero(), zero()};
  for (int64_t i = begin; i < end; i += W) {
    Vec v[4];
    LLMOPS_UNROLL for (int j = 0; j < 4; ++j) {
      const X* from = x + j * at.length + i;
      v[j] = load(from);
      __builtin_prefetch(reinterpret_cast<const char*>(from) + at.ahead);
    }
    const Vec most = max(max(v[0], v[1]), max(v[2], v[3]));
    if (__builtin_expect(mask_bits(less(limit, most)) != 0, 0)) {
      const float m = reduce_max(most);
      const Vec factor = exp2_softmax((limit - set1(m)) * unit), rise = set1(m - shift_of(top));
      const Vec steps = set1(static_cast<float>((i - begin) / W));
      // Not of nothing: 0 times a rise from fp32's lowest to its largest value is NaN.
      LLMOPS_UNROLL for (int j = 0; j < 4; ++j) {
        if (i == begin) break;
        s[j] = s[j] * factor;
        if constexpr (kSmooth == Smooth::uniform) g[j] = fma(steps, rise, g[j]);
        if constexpr (kSmooth == Smooth::weighted) g[j] = fma(w[j], rise, g[j]);
      }
      top = m;
      limit = shift = set1(m);
    }
    LLMOPS_UNROLL for (int j = 0; j < 4; ++j) {
      const Vec d = v[j] - shift;
      s[j] = s[j] + exp2_softmax(d * unit);
      if constexpr (kSmooth == Smooth::uniform) g[j] = g[j] - d;
      if constexpr (kSmooth == Smooth::weighted) {
        const Vec own = load(weight + j * at.length + i);
        g[j] = fnma(own, d, g[j]);
        w[j] = w[j] + own;
      }
    }
  }
  if (top > row->top) raise(top, row);
  row->sum += combine_add(s);
  if constexpr (kSmooth != Smooth::none) row->gap += combine_add(g);
  row->seen += kSmooth == Smooth::weighted ? combine_add(w) : static_cast<float>(4 * (end - begin));
}

// Adds the elements from i to n.
template <Smooth kSmooth, class X>
LLMOPS_INLINE void add_rest(const X* x, const float* weight, int64_t i, int64_t n, Row* row) {
  const auto left = [&] { return n - i < W ? static_cast<int>(n - i) : W; };
  const int64_t begin = i;
  Vec m = set1(-kInf);
  for (; i < n; i += W) m = max(load_n(x + i, left(), -kInf), m);
  const float top = reduce_max(m);
  if (top > row->top) raise(top, row);
  const Vec shift = set1(shift_of(row->top)), unit = set1(kLog2e);
  Vec s = zero(), g = zero(), w = zero();
  for (i = begin; i < n; i += W) {
    const Vec d = load_n(x + i, left(), -kInf) - shift;
    const Vec inside = select(first_n(left()), d, zero());
    s = s + exp2_softmax(d * unit);
    if constexpr (kSmooth == Smooth::uniform) g = g - inside;
    if constexpr (kSmooth == Smooth::weighted) {
      const Vec own = load_n(weight + i, left());
      g = fnma(own, inside, g);
      w = w + own;
    }
  }
  row->sum += reduce_add(s);
  if constexpr (kSmooth != Smooth::none) row->gap += reduce_add(g);
  row->seen += kSmooth == Smooth::weighted ? reduce_add(w) : static_cast<float>(n - begin);
}

template <Smooth kSmooth, class X>
LLMOPS_NOINLINE CrossEntropyRow forward(int64_t n, const X* x, int64_t target,
                                        const float* weight) {
  const Streams streams = streams_of<X>(n);
  const int64_t length = streams.length;
  Row row{first_top(x, length, least(kLook, length)), 0.0, 0.0, 0.0};
  for (int64_t i = 0; i < length; i += kRun) {
    add_streams<kSmooth>(x, weight, streams, i, least(i + kRun, length), &row);
  }
  add_rest<kSmooth>(x, weight, 4 * length, n, &row);
  const double top = row.top, log_sum = __builtin_log(row.sum);
  return {top + log_sum, (top - static_cast<double>(to_float(x[target]))) + log_sum,
          kSmooth == Smooth::none ? 0.0 : row.gap + row.seen * log_sum};
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
