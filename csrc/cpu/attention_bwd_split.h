// The backward of long fp32 by AMX (attention_split.h). While tiles multiply, the vectors are free:
// P and dS of a block of queries and keys, and their parts, are made beside the scores of the next
// one and the sums of the one before. Two blocks of queries share what is read of keys.
#pragma once
#include "attention_bwd_rows.h"
#include "attention_dropout.h"

#ifdef LLMOPS_HAS_TILES

namespace llmops::cpu::LLMOPS_ISA {
namespace {

// A block of queries and a block of keys. Of two such that follow each other, what is made for one
// is where the other's is not.
struct Cross {
  const QueryBlock* block;
  const Scratch* rows;
  int64_t key;
  int keys;
  int visible[kBlockVecs];  // keys that some lane of a vector sees
  int64_t first, all;       // the pairs of vectors that see a key
  float *s, *dp;            // [32][64]
  float *p, *ds, *turned;   // strips: of keys by queries, and of pairs by keys
};

// P and dS of keys i and i + 16 and a pair of vectors, as strips.
template <bool kNatural>
LLMOPS_OUTLINE void split_gradients(const Cross& of, Vec factor, int64_t pair, int64_t i) {
  const GradLanes& lanes = of.rows->lanes;
  Vec p[2][2], ds[2][2];
  LLMOPS_UNROLL for (int v = 0; v < 2; ++v) {
    const int64_t j = 2 * pair + v;
    const Vec lse = load(lanes.lse + j * W), delta = load(lanes.delta + j * W);
    LLMOPS_UNROLL for (int h = 0; h < 2; ++h) {
      const int64_t k = i + h * kSide, at = k * kLanes + j * W;
      const Mask seen = first_n(k < of.visible[j] ? W : 0);
      const Vec grad = load(of.dp + at);
      Vec x = probability<kNatural>(load(of.s + at), lse, factor), y;
      if (kNatural) x = x * load(lanes.norm + j * W);
      if (kNatural && lanes.keep) {
        const Vec keep = load(lanes.keep + at);
        y = x * fma(grad, keep, zero() - delta);
        x = x * keep;
      } else {
        y = x * (grad - delta);
      }
      if (kNatural && lanes.slope) y = y * load(lanes.slope + at);
      p[h][v] = select(seen, x, zero()), ds[h][v] = select(seen, y, zero());
    }
  }
  const int64_t to = pair * Fp32Parts::kStepFloats + i * kSide;
  LLMOPS_UNROLL for (int h = 0; h < 2; ++h) {
    split<Fp32Parts>(p[h][0], p[h][1], of.p + to + h * kTileFloats);
    split<Fp32Parts>(ds[h][0], ds[h][1], of.ds + to + h * kTileFloats);
    split<Fp32Parts>(ds[0][h], ds[1][h], of.turned + to + h * kTileFloats);
  }
}

// All of them, one every `pace` calls.
template <bool kNatural>
struct Gradients {
  const Cross& of;
  Vec factor;
  int64_t pace, cell = 0, call = 0;

  bool done() const { return cell == (of.all - of.first) * kSide; }
  void some() {
    split_gradients<kNatural>(of, factor, of.first + cell / kSide, cell % kSide);
    ++cell;
  }
  LLMOPS_BESIDE void operator()() {
    if (++call % pace == 0 && !done()) some();
  }
};

template <bool kForm>
struct SplitBackward {
  const AttentionParams& p;
  const Scratch* rows;  // [count], as the blocks
  const QueryBlock* block;
  int count;
  Vec factor;
  float *dk, *dv;  // [Tk][padded D], [Tk][padded Dv], fp32

  // Strips hold whole blocks of keys: those before `begin` are seen by none.
  int64_t first_key(int i) const { return block[i].begin / kGradTiled * kGradTiled; }
  int64_t strips_of(int64_t key) const { return key / kGradTiled * rows[0].split.next; }

  // Block i of queries and the keys from `key` on, if it sees any.
  bool crosses(int i, int64_t key, int64_t parity, Cross& of) const {
    if (key < first_key(i) || key >= block[i].end) return false;
    const Scratch& s = rows[0];
    const int64_t cells = parity * kGradKeys * kLanes;
    const int64_t by_query = parity * strips_size(kGradTiled, kLanes);
    of = {block + i,
          rows + i,
          key,
          static_cast<int>(min64(kGradTiled, block[i].end - key)),
          {},
          0,
          tiled_steps(block[i].count),
          s.s + cells,
          s.dp + cells,
          s.split.p + by_query,
          s.split.ds + by_query,
          s.split.turned + parity * strips_size(kLanes, kGradTiled)};
    for (int j = 0; j < block[i].vecs; ++j)
      of.visible[j] = clamp_int(block[i].vec_limit[j] - key, 0, of.keys);
    while (of.first < of.all && of.visible[2 * of.first] == 0 && of.visible[2 * of.first + 1] == 0)
      ++of.first;
    return true;
  }

  // S^T = K Q^T, or dP^T = V dO^T, of the pairs that see a key.
  template <class F>
  static void products(const float* keys, const float* lanes, int64_t dim, const Cross& of,
                       float* out, F& beside) {
    const int64_t steps = tiled_steps(dim);
    for (int64_t pair = of.first; pair < of.all; ++pair)
      split_product(keys, lanes + pair * steps * Fp32Parts::kStepFloats, steps, out + pair * kPair,
                    kLanes, false, beside);
  }
  template <class F>
  void begin(const Cross& of, F& beside) const {
    products(rows[0].split.k + strips_of(of.key), of.rows->split.q, p.dim, of, of.s, beside);
    products(rows[0].split.v + strips_of(of.key), of.rows->split.g, p.dim_v, of, of.dp, beside);
  }
  void modify(const Cross& of) const {
    const GradLanes& lanes = of.rows->lanes;
    if (kForm || of.block->cuts(of.key, of.keys))
      modify_scores<kForm>(p, *of.block, of.key, of.keys, of.visible, of.s, rows[0].bias, nullptr,
                           lanes.slope);
    if (kForm && lanes.keep) dropout_weights(p, *of.block, of.key, of.visible, lanes.keep);
  }

  // sums [keys][ld] += A B: strips of keys, and of columns, by queries.
  template <class F>
  void add_to_keys(const float* a, const float* b, int64_t ld, const Cross& of, float* sums,
                   F& beside) const {
    float* const copy = rows[0].sums;  // for keys that fill no tile
    float* const out = of.keys == kPair ? sums : copy;
    const int64_t skipped = of.first * Fp32Parts::kStepFloats;
    for (int64_t c = 0; c < ld; c += kPair, b += of.all * Fp32Parts::kStepFloats)
      split_product(a + skipped, b + skipped, of.all - of.first, out + c, ld, out == sums, beside);
    for (int64_t d = 0; out == copy && d < of.keys * ld; d += W)
      store(sums + d, load(sums + d) + load(copy + d));
  }
  template <class F>
  void end(const Cross& of, F& beside) const {
    if (of.first == of.all) return;
    const int64_t dim = padded(p.dim), dim_v = padded(p.dim_v);
    const GradStrips& own = of.rows->split;
    add_to_keys(of.p, own.g_rows, dim_v, of, dv + of.key * dim_v, beside);
    add_to_keys(of.ds, own.q_rows, dim, of, dk + of.key * dim, beside);
    const float* k = rows[0].split.k_turned + strips_of(of.key);
    for (int64_t d = 0; d < p.dim; d += kPair, k += Fp32Parts::kStepFloats) {
      for (int64_t pair = of.first; pair < of.all; ++pair)
        split_product(k, of.turned + pair * Fp32Parts::kStepFloats, 1,
                      of.rows->dq + d * kLanes + pair * kPair, kLanes, true, beside);
    }
  }

  void run() const {
    // Calls are 12 for each step of a pair's products, of which dQ's have one.
    const int64_t steps = 3 * tiled_steps(p.dim) + 2 * tiled_steps(p.dim_v);
    Nothing nothing;
    Cross cross[3];
    int64_t n = 0;  // how many have begun; each ends two later
    int64_t begin_key = INT64_MAX, end_key = 0;
    for (int i = 0; i < count; ++i) {
      begin_key = min64(begin_key, first_key(i));
      end_key = max64(end_key, block[i].end);
    }
    const auto gradients = [&](const Cross& of) {
      return Gradients<kForm>{of, factor, 12 * steps / kSide};
    };
    for (int64_t key = begin_key; key < end_key; key += kGradTiled) {
      for (int i = 0; i < count; ++i) {
        Cross& next = cross[n % 3];
        if (!crosses(i, key, n % 2, next)) continue;
        if (n == 0) {
          begin(next, nothing);
        } else {
          auto beside = gradients(cross[(n - 1) % 3]);
          begin(next, beside);
          if (n > 1) end(cross[(n - 2) % 3], beside);
          while (!beside.done()) beside.some();
        }
        modify(next);
        ++n;
      }
    }
    if (n == 0) return;
    auto beside = gradients(cross[(n - 1) % 3]);
    if (n > 1) end(cross[(n - 2) % 3], beside);
    while (!beside.done()) beside.some();
    end(cross[(n - 1) % 3], nothing);
  }
};

}  // namespace
}  // namespace llmops::cpu::LLMOPS_ISA
#endif
