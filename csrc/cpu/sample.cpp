// Sampling from one row of logits without sorting it. Interface: sample.h
//
// Thresholds instead of an order. A filter keeps the tokens at or above a value, and that value is
// found by bisection over the bit patterns of fp32 (32 sweeps at most), on the few tokens that can
// still matter:
// - top-k: the k-th largest of the maxima of groups of 8 is a lower bound of the k-th largest; only
//   tokens above it are kept for the exact search.
// - top-p: of n tokens with total weight Z, one below (1 - p) Z / n is outside: all at or below it
//   weigh less than (1 - p) Z together.
// Tokens tied with the last one kept are kept. Lanes run along the row; sums in fp32 lanes, and in
// double across blocks. Everything is in a fixed order: same row and uniform number, same token.
#include "sample.h"

#include "simd.h"

namespace llmops::cpu::LLMOPS_ISA {
namespace {

constexpr int64_t kGroup = 8;       // vectors whose lane maxima stand for them
constexpr int64_t kSumBlock = 256;  // elements summed before the sum goes to double

LLMOPS_INLINE int lanes_left(int64_t i, int64_t n) {
  return n - i < W ? static_cast<int>(n - i) : W;
}

// Integers in the order of the floats, and back.
LLMOPS_INLINE int32_t to_key(float x) {
  const int32_t i = static_cast<int32_t>(float_bits(x));
  return i ^ ((i >> 31) & 0x7fffffff);
}
LLMOPS_INLINE float from_key(int32_t key) {
  return bits_float(static_cast<uint32_t>(key ^ ((key >> 31) & 0x7fffffff)));
}

// Values to fp32, their maximum, and the lane maxima of every group (n / 8 of them, or a vector per
// group). False where a value is NaN.
template <class T>
LLMOPS_INLINE bool read_row(const T* x, int64_t n, float* values, float* tops, int64_t* top_count,
                            float* top) {
  Vec best = set1(-kInf), ok = zero();
  int64_t tops_n = 0;
  for (int64_t begin = 0; begin < n; begin += kGroup * W) {
    const int64_t end = begin + kGroup * W < n ? begin + kGroup * W : n;
    Vec m = set1(-kInf);
    for (int64_t i = begin; i < end; i += W) {
      const int left = lanes_left(i, n);
      const Vec v = load_n(x + i, left, -kInf);
      store_n(values + i, v, left);
      ok = select(equal(v, v), ok, set1(1.0f));
      m = max(m, v);
    }
    store(tops + tops_n, m);
    tops_n += W;
    best = max(best, m);
  }
  *top_count = tops_n;
  *top = reduce_max(best);
  return reduce_max(ok) == 0.0f;
}

// How many of v reach `least`; the counts are small integers, exact in fp32 lanes.
LLMOPS_INLINE int64_t count_from(const float* v, int64_t n, float least) {
  const Vec t = set1(least), one = set1(1.0f);
  int64_t total = 0;
  for (int64_t begin = 0; begin < n; begin += int64_t{1} << 20) {
    const int64_t end = begin + (int64_t{1} << 20) < n ? begin + (int64_t{1} << 20) : n;
    Vec s = zero();
    int64_t i = begin;
    for (; i + W <= end; i += W) s = s + select(less(load(v + i), t), zero(), one);
    if (i < end) {
      const int left = lanes_left(i, end);
      const Mask below = less(load_n(v + i, left), t);
      s = s + select(first_n(left), select(below, zero(), one), zero());
    }
    total += static_cast<int64_t>(reduce_add(s));
  }
  return total;
}

// The sum of the weights that reach `least` > 0.
LLMOPS_INLINE double sum_from(const float* w, int64_t begin, int64_t n, float least) {
  const Vec t = set1(least);
  double total = 0.0;
  for (int64_t block = begin; block < n; block += kSumBlock) {
    const int64_t end = block + kSumBlock < n ? block + kSumBlock : n;
    Vec s = zero();
    for (int64_t i = block; i < end; i += W) {
      const Vec v = load_n(w + i, lanes_left(i, end));
      s = s + select(less(v, t), zero(), v);
    }
    total += reduce_add(s);
  }
  return total;
}

// The k-th largest of v, 1 <= k <= n.
LLMOPS_INLINE float kth_largest(const float* v, int64_t n, int64_t k, float top) {
  int64_t low = to_key(-kInf), high = to_key(top);
  while (low < high) {
    const int64_t middle = low + (high - low + 1) / 2;
    if (count_from(v, n, from_key(static_cast<int32_t>(middle))) >= k) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return from_key(static_cast<int32_t>(low));
}

// The largest t >= floor such that the weights that reach t sum to `target`, or floor.
LLMOPS_INLINE float mass_threshold(const float* w, int64_t n, double target, float floor) {
  int64_t low = to_key(floor), high = to_key(1.0f);
  while (low < high) {
    const int64_t middle = low + (high - low + 1) / 2;
    if (sum_from(w, 0, n, from_key(static_cast<int32_t>(middle))) >= target) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return from_key(static_cast<int32_t>(low));
}

// The values that reach `least`, in order, and where they stood; out may be v. Returns how many.
LLMOPS_INLINE int64_t gather_from(const float* v, int64_t n, float least, float* out,
                                  int32_t* places) {
  const Vec t = set1(least);
  int64_t kept = 0;
  for (int64_t i = 0; i < n; i += W) {
    const int left = lanes_left(i, n);
    uint32_t bits = ~mask_bits(less(load_n(v + i, left, -kInf), t)) & mask_bits(first_n(left));
    for (; bits != 0; bits &= bits - 1) {
      const int64_t at = i + __builtin_ctz(bits);
      out[kept] = v[at];
      if (places != nullptr) places[kept] = static_cast<int32_t>(at);
      ++kept;
    }
  }
  return kept;
}

LLMOPS_INLINE int64_t first_equal(const float* v, int64_t n, float value) {
  for (int64_t i = 0; i < n; i += W) {
    const int left = lanes_left(i, n);
    const uint32_t bits =
        mask_bits(equal(load_n(v + i, left), set1(value))) & mask_bits(first_n(left));
    if (bits != 0) return i + __builtin_ctz(bits);
  }
  return 0;
}

// The first place whose cumulative weight, over the weights that reach `least`, exceeds `target`.
LLMOPS_INLINE int64_t walk(const float* w, int64_t n, float least, double target) {
  double below = 0.0;
  int64_t last = 0;
  for (int64_t block = 0; block < n; block += kSumBlock) {
    const int64_t end = block + kSumBlock < n ? block + kSumBlock : n;
    const double own = sum_from(w, block, end, least);
    if (below + own > target || end == n) {
      double sum = below;
      for (int64_t i = block; i < end; ++i) {
        if (w[i] < least || w[i] <= 0.0f) continue;
        sum += w[i];
        last = i;
        if (sum > target) return i;
      }
      // The block's sum in lanes and one by one differ in rounding: its last token, if it has one.
      if (own > 0.0) return last;
    } else if (own > 0.0) {
      for (int64_t i = end; i-- > block;) {
        if (w[i] >= least && w[i] > 0.0f) {
          last = i;
          break;
        }
      }
    }
    below += own;
  }
  return last;
}

template <class T>
LLMOPS_INLINE int64_t sample(const SampleParams& p, int64_t n, const T* x, double uniform,
                             float* scratch) {
  // values [n] (later weights), candidates of top-k and of top-p [n] each, places [n].
  float *values = scratch, *tops = scratch + n, *narrow = scratch + 2 * n;
  int32_t* places = nullptr;
  int64_t top_count = 0;
  float top = 0.0f;
  // The maxima of groups: at most n / 8 rounded up to vectors, within their n + 64 - n places.
  if (!read_row(x, n, values, narrow, &top_count, &top)) return kSampleNan;
  if (top == -kInf) return kSampleEmpty;
  if (p.temperature == 0.0f) return first_equal(values, n, top);
  if (top == kInf) return kSampleInfinite;

  int64_t m = n;
  if (p.top_k > 0 && p.top_k < n) {
    const float bound = top_count >= p.top_k ? kth_largest(narrow, top_count, p.top_k, top) : -kInf;
    places = reinterpret_cast<int32_t*>(scratch + 3 * n + 64);
    m = gather_from(values, n, bound, tops, places);
    const float least = kth_largest(tops, m, p.top_k, top);
    // In place: a value never moves up.
    int64_t kept = 0;
    for (int64_t i = 0; i < m; ++i) {
      if (tops[i] < least) continue;
      tops[kept] = tops[i];
      places[kept++] = places[i];
    }
    values = tops;
    m = kept;
  }

  // Weights relative to the maximum's, which is 1. A division: 1 / temperature may overflow.
  Vec sum = zero();
  double total = 0.0;
  const Vec t = set1(p.temperature), shift = set1(top);
  for (int64_t block = 0; block < m; block += kSumBlock) {
    const int64_t end = block + kSumBlock < m ? block + kSumBlock : m;
    sum = zero();
    for (int64_t i = block; i < end; i += W) {
      const int left = lanes_left(i, end);
      const Vec v = exp((load_n(values + i, left, -kInf) - shift) / t);
      store_n(values + i, v, left);
      sum = sum + v;
    }
    total += reduce_add(sum);
  }

  float least = p.min_p;
  if (p.top_p < 1.0f) {
    const double target = static_cast<double>(p.top_p) * total;
    // Half the bound: its own rounding must not cut a token off.
    const double bound =
        0.5 * (1.0 - static_cast<double>(p.top_p)) * total / static_cast<double>(m);
    const float floor = bound < 1.0 ? static_cast<float>(bound) : 1.0f;
    const int64_t kept = gather_from(values, m, floor, narrow, nullptr);
    const float nucleus = mass_threshold(narrow, kept, target, floor);
    least = nucleus > least ? nucleus : least;
  }
  const double kept_total = least > 0.0f ? sum_from(values, 0, m, least) : total;
  const int64_t place = walk(values, m, least, uniform * kept_total);
  return places != nullptr ? places[place] : place;
}

}  // namespace

int64_t sample_row(const SampleParams& p, DType type, int64_t n, const void* logits, double uniform,
                   float* scratch) {
  LLMOPS_DISPATCH(type, T,
                  { return sample(p, n, static_cast<const T*>(logits), uniform, scratch); });
  return kSampleNan;
}

}  // namespace llmops::cpu::LLMOPS_ISA
