// The forward of long fp32 by AMX (attention_split.h). While tiles multiply, the vectors are free:
// products, softmax and splitting run beside each other.
//
// Four blocks of queries share a block of keys, which is split once for them. Beside the scores of
// one and the update of the one before run the softmax of that between, and then the maximum of the
// first. Keys are split beside the last update of the block before, values beside the first scores.
#pragma once
#include "attention_dropout.h"
#include "attention_fwd_rows.h"

#ifdef LLMOPS_HAS_TILES

namespace llmops::cpu::LLMOPS_ISA {
namespace {

constexpr int kPairVecs = kPair / W, kBlockPairs = kBlockVecs / kPairVecs;  // of a block's vectors

// What a block of queries sees of a block of keys. Two vectors share a strip.
struct Seen {
  const QueryBlock* block;
  const Scratch* rows;
  int visible[kBlockVecs];           // keys that some lane of a vector sees
  int64_t steps[kBlockPairs], most;  // of 32 keys, up to the last of those; and of all pairs
  float *score, *strip;              // [kKeys][64]; P's strips
};

// Lines of rows that are split next, asked for one at a time.
struct Ahead {
  const char* row;
  int64_t stride, bytes, left, at;  // of a row; rows that are left; in the present one
  LLMOPS_BESIDE void operator()() {
    if (left == 0) return;
    __builtin_prefetch(row + at, 0, 2);
    at += 64;
    if (at >= bytes) at = 0, row += stride, --left;
  }
};

// A block's softmax, a cell of 32 probabilities at a time: exponentials of a vector's keys k and
// k + 16, their sums, their parts, and O * alpha in some rows. What is not seen is -inf.
template <bool kNatural>
struct Softmax {
  const Seen* seen;
  Vec factor, shift, alpha, sum0, sum1;
  const float *score, *keep;
  float *strip, *o;
  int64_t cell, cells;       // of vector `vec`
  int64_t row, rows, dim_v;  // of O: those that are left, and how many a cell takes
  int vec;
  Ahead keys, values;

  LLMOPS_BESIDE void begin_vector() {
    while (vec < kBlockVecs && seen->steps[vec / kPairVecs] == 0) ++vec;
    cell = cells = 0;
    if (vec == kBlockVecs) return;
    const Scratch& s = *seen->rows;
    const int at = vec * W;
    const Vec before = load(s.m + at), top = load(s.top + at);
    // Plain blocks keep m in units of log2 (factor applied), modified ones in natural units.
    const Vec m = reference(kNatural ? top : top * factor, before);
    // Nothing seen yet: -inf - -inf would be NaN.
    shift = select(equal(m, set1(-kInf)), zero(), m);
    const Vec fade = kNatural ? (before - shift) * factor : before - shift;
    alpha = rescaling(before, exp2_softmax(fade));
    store(s.m + at, m);
    if constexpr (!kNatural) shift = zero() - shift;
    sum0 = load(s.l + at) * alpha;
    sum1 = zero();
    score = seen->score + at;
    keep = kNatural && s.keep ? s.keep + at : nullptr;
    strip = seen->strip + vec / kPairVecs * strips_size(kPair, kKeys<Way::split>) +
            vec % kPairVecs * kTileFloats;
    cells = seen->steps[vec / kPairVecs] * kSide;
    o = s.o + at;
    row = mask_bits(equal(alpha, set1(1.0f))) == kAllLanes ? 0 : dim_v;
    rows = (dim_v + cells - 1) / cells;
  }
  LLMOPS_BESIDE void begin(const Seen& of) {
    seen = &of;
    vec = 0;
    begin_vector();
  }
  LLMOPS_BESIDE Vec probability(const float* at) const {
    const Vec x = load(at);
    return exp2_softmax(kNatural ? (x - shift) * factor : fma(x, factor, shift));
  }
  LLMOPS_BESIDE bool done() const { return cell == cells; }
  LLMOPS_BESIDE void some() {
    const int64_t step = cell / kSide, i = cell % kSide;
    const int64_t at = (step * kDepth + i) * kLanes, below = at + kSide * kLanes;
    Vec a = probability(score + at), b = probability(score + below);
    sum0 = sum0 + a;
    sum1 = sum1 + b;
    // Dropout spares the normalizer: what is summed is not what multiplies V.
    if (kNatural && keep) a = a * load(keep + at), b = b * load(keep + below);
    split<Fp32Parts>(a, b, strip + step * Fp32Parts::kStepFloats + i * kSide);
    keys();
    values();
    for (int64_t r = 0; r < rows && row > 0; ++r, --row, o += kLanes) store(o, load(o) * alpha);
    if (++cell == cells) {
      store(seen->rows->l + vec * W, sum0 + sum1);
      ++vec;
      begin_vector();
    }
  }
};

// The lanes' maximum over a block's scores, two keys at a time.
struct Maximum {
  const float* score;
  int64_t key, keys;
  Vec top[kBlockVecs];

  LLMOPS_BESIDE void begin(const Seen& seen) {
    score = seen.score;
    key = 0, keys = seen.most * kDepth;
    for (auto& t : top) t = set1(-kInf);
  }
  LLMOPS_BESIDE bool done() const { return key == keys; }
  LLMOPS_BESIDE void some() {
    LLMOPS_UNROLL for (int r = 0; r < 2; ++r) {
      LLMOPS_UNROLL for (int j = 0; j < kBlockVecs; ++j) top[j] =
          max(load(score + (key + r) * kLanes + j * W), top[j]);
    }
    key += 2;
  }
};

template <bool kForm>
struct Vectors {
  Softmax<kForm> softmax;
  Maximum maximum;
  LLMOPS_BESIDE void operator()() {
    if (!softmax.done()) {
      softmax.some();
    } else if (!maximum.done()) {
      maximum.some();
    }
  }
};

struct Splitting {
  Strips<true>* strips;
  LLMOPS_BESIDE void operator()() const {
    if (!strips->done()) strips->some();
  }
};

template <bool kForm>
struct SplitForward {
  const AttentionParams& p;
  Scratch rows[kShared];
  QueryBlock block[kShared];
  int count;
  Seen seen[kShared], last;  // the last of the block of keys before, if it has steps
  int last_keys;
  Vectors<kForm> vectors;
  Strips<true> strips;  // of keys or values

  // The blocks of queries that see some of [key, key + keys).
  int begin_keys(int64_t key, int keys) {
    int n = 0;
    for (int i = 0; i < count; ++i) {
      if (key >= block[i].end || key + keys <= block[i].begin) continue;
      Seen& s = seen[n] = {block + i, rows + i, {}, {}, 0, nullptr, nullptr};
      s.score = rows[0].s + n % 2 * kKeys<Way::split> * kLanes;
      s.strip = rows[0].pairs + n % 2 * kBlockPairs * strips_size(kPair, kKeys<Way::split>);
      for (int j = 0; j < block[i].vecs; ++j) {
        s.visible[j] = clamp_int(block[i].vec_limit[j] - key, 0, keys);
        int64_t& steps = s.steps[j / kPairVecs];
        steps = max64(steps, tiled_steps(s.visible[j]));
        s.most = max64(s.most, steps);
      }
      n += s.most > 0;
    }
    return n;
  }

  // What no lane of a vector sees, in the steps that the block takes.
  static void fill_unseen(const Seen& s, Vec value, float* cells) {
    for (int j = 0; j < kBlockVecs; ++j) {
      for (int64_t i = s.visible[j]; i < s.most * kDepth; ++i)
        store(cells + i * kLanes + j * W, value);
    }
  }

  // S^T, and -inf where a vector sees nothing.
  template <class F>
  void score(const Seen& s, int64_t key, int keys, F& beside) {
    const int64_t steps = tiled_steps(p.dim);
    F run = beside;  // in registers
    for (int64_t i = 0; i < s.most; ++i) {
      for (int x = 0; x < kBlockPairs; ++x) {
        const int c = i % 2 ? kBlockPairs - 1 - x : x;
        if (i < s.steps[c])
          split_product(rows[0].k + i * steps * Fp32Parts::kStepFloats,
                        s.rows->q_split + c * steps * Fp32Parts::kStepFloats, steps,
                        s.score + i * kPair * kLanes + c * kPair, kLanes, false, run);
      }
    }
    beside = run;
    fill_unseen(s, set1(-kInf), s.score);
    if (kForm || s.block->cuts(key, keys)) {
      for (int j = 0; j < kBlockVecs; ++j) store(s.rows->top + j * W, set1(-kInf));
      modify_scores<kForm>(p, *s.block, key, keys, s.visible, s.score, rows[0].bias, s.rows->top,
                           nullptr);
    } else {
      vectors.maximum.begin(s);
    }
  }

  // O^T += V^T P
  template <class F>
  void update(const Seen& s, int keys, F& beside) const {
    const float* v = rows[0].v;
    F run = beside;
    for (int64_t d = 0; d < p.dim_v; d += kPair, v += tiled_steps(keys) * Fp32Parts::kStepFloats) {
      for (int x = 0; x < kBlockPairs; ++x) {
        const int c = d / kPair % 2 ? kBlockPairs - 1 - x : x;
        if (s.steps[c] > 0)
          split_product(v, s.strip + c * strips_size(kPair, kKeys<Way::split>), s.steps[c],
                        s.rows->o + d * kLanes + c * kPair, kLanes, true, run);
      }
    }
    beside = run;
  }

  void begin_softmax(const Seen& s, int64_t key) {
    Maximum& maximum = vectors.maximum;
    if (maximum.keys > 0) {
      while (!maximum.done()) maximum.some();
      for (int j = 0; j < kBlockVecs; ++j) store(s.rows->top + j * W, maximum.top[j]);
      maximum.key = maximum.keys = 0;
    }
    if (kForm && rows[0].keep) {
      dropout_weights(p, *s.block, key, s.visible, rows[0].keep);
      fill_unseen(s, zero(), rows[0].keep);
    }
    vectors.softmax.begin(s);
  }

  void add_keys(int64_t key, int keys) {
    const int n = begin_keys(key, keys);
    if (n == 0) return;
    const KeyRows<float> k = key_rows(p, block[0], p.k, p.k_stride, key, keys, p.dim,
                                      static_cast<float*>(rows[0].k_page));
    const KeyRows<float> v = key_rows(p, block[0], p.v, p.v_stride, key, keys, p.dim_v,
                                      static_cast<float*>(rows[0].v_page));
    Splitting splitting{&strips};
    strips.begin({k.first, k.stride, 1, keys, p.dim}, rows[0].k);
    if (last.most > 0) update(last, last_keys, splitting);
    strips.finish();
    strips.begin({v.first, 1, v.stride, p.dim_v, keys}, rows[0].v);
    score(seen[0], key, keys, splitting);
    strips.finish();
    const auto ahead = [&](const KeyRows<float>& of, int64_t dim) {
      return Ahead{reinterpret_cast<const char*>(of.first + keys * of.stride), of.stride * 4,
                   dim * 4, keys, 0};
    };
    vectors.softmax.keys = ahead(k, p.dim), vectors.softmax.values = ahead(v, p.dim_v);
    for (int i = 0; i < n; ++i) {
      begin_softmax(seen[i], key);
      if (i + 1 < n) score(seen[i + 1], key, keys, vectors);
      if (i > 0) update(seen[i - 1], keys, vectors);
      while (!vectors.softmax.done()) vectors.softmax.some();
    }
    last = seen[n - 1], last_keys = keys;
  }
  void finish() {
    Nothing nothing;
    if (last.most > 0) update(last, last_keys, nothing);
  }
};

template <bool kForm>
bool run_split(const AttentionParams& p, int64_t task, void* scratch) {
  SplitForward<kForm> forward{p, {}, {}, 0, {}, {}, 0, {}, {}};
  forward.vectors.softmax.factor = set1(kForm ? kLog2e : split_scale(p.scale).score * kLog2e);
  forward.vectors.softmax.dim_v = p.dim_v;
  return run_shared<float, Way::split, kForm>(p, task, scratch, kShared, forward);
}

}  // namespace
}  // namespace llmops::cpu::LLMOPS_ISA
#endif
