// Decode where several runs through memory are read at a time (AVX2): an AMD processor reads four
// at twice the rate of one (benchmarks/NOTES.md). With AVX-512, on an Intel server, four are at
// most 1.2 times as fast from memory and slower from a cache: attention_decode.cpp reads one there.
#pragma once
#include "attention_score.h"
#include "attention_tile.h"
#include "dot_tile.h"
#include "simd.h"

namespace llmops::cpu::LLMOPS_ISA {
namespace {

constexpr int kRun = 1024;  // keys whose scores are held
constexpr int kStreams = W == 8 ? 4 : 1;

// kStreams runs of `count` rows of k or v; scores and weights of run t begin at s[at[t]].
template <class T>
struct Streams {
  const T* first[kStreams];
  int at[kStreams];
  int64_t stride;
  int count;
};

// f(runs, Constant<n>), of which the first n are distinct, for keys [key, key + keys): quarters of
// what lies at one distance, or pages of equal length.
template <class T, class F>
LLMOPS_INLINE void for_streams(const AttentionParams& p, const QueryBlock& block, const void* base,
                               const int64_t* stride, int64_t key, int keys, const F& f) {
  Streams<T> runs;
  runs.stride = stride[2];
  for (int i = 0; i < keys;) {
    KeyRows<T> piece[kStreams];
    int pieces = 0, end = i;
    while (pieces < kStreams && end < keys) {
      piece[pieces] = key_run<T>(p, block, base, stride, key + end, keys - end);
      if (piece[pieces].count != piece[0].count) break;
      end += piece[pieces++].count;
    }
    if (pieces == kStreams) {
      runs.count = piece[0].count;
      for (int t = 0; t < kStreams; ++t) {
        runs.first[t] = piece[t].first;
        runs.at[t] = i + t * runs.count;
      }
      f(runs, Constant<kStreams>{});
      i = end;
      continue;
    }
    const int all = piece[0].count;
    runs.count = all / kStreams;
    for (int t = 0; t < kStreams; ++t) {
      runs.first[t] = piece[0].first + t * runs.count * runs.stride;
      runs.at[t] = i + t * runs.count;
    }
    if (runs.count > 0) f(runs, Constant<kStreams>{});
    const int whole = runs.count * kStreams;
    for (int rest = whole; rest < all; ++rest) {
      runs.count = 1;
      for (int t = 0; t < kStreams; ++t) {
        runs.first[t] = piece[0].first + rest * runs.stride;
        runs.at[t] = i + rest;
      }
      f(runs, Constant<1>{});
    }
    i += all;
  }
}

// s[r][i] = q[r] . k[i] for all keys of the runs, W of them at a time, W / R to R rows. Past a
// run's end its last key again.
template <class T, int R>
LLMOPS_OUTLINE void score_rows(const Streams<T>& runs, int64_t dim, int rows, const float* q,
                               int64_t ldq, float* s) {
  constexpr int K = W / R;
  for (int n = 0; n < runs.count; n += W / kStreams) {
    const T* key[W];
    int at[W];
    LLMOPS_UNROLL for (int t = 0; t < W; ++t) {
      const int i = n + t / kStreams < runs.count ? n + t / kStreams : runs.count - 1;
      key[t] = runs.first[t % kStreams] + i * runs.stride;
      at[t] = runs.at[t % kStreams] + i;
    }
    for (int r = 0; r < rows; r += R) {
      for (int t = 0; t < W; t += K) {
        Vec acc[W];
        dot_tile<T, false, R>(key + t, dim, q + r * ldq, ldq, acc);
        float sums[W];
        store(sums, reduce_each(acc));
        LLMOPS_UNROLL for (int i = 0; i < R; ++i) {
          LLMOPS_UNROLL for (int j = 0; j < K; ++j) s[(r + i) * kRun + at[t + j]] = sums[i * K + j];
        }
      }
    }
  }
}

template <class T>
LLMOPS_INLINE void score_streams(const Streams<T>& runs, int64_t dim, int rows, const float* q,
                                 int64_t ldq, float* s) {
  if (rows == 1) return score_rows<T, 1>(runs, dim, rows, q, ldq, s);
  if (rows == 2) return score_rows<T, 2>(runs, dim, rows, q, ldq, s);
  score_rows<T, 4>(runs, dim, rows, q, ldq, s);
}

// o [R][ldo] += weights s [R][kRun] times row i of S runs.
template <class T, int R, int S>
LLMOPS_INLINE void add_values(const Streams<T>& runs, int i, int64_t dim, const float* s, float* o,
                              int64_t ldo) {
  Vec weight[R][S];
  const T* v[S];
  LLMOPS_UNROLL for (int t = 0; t < S; ++t) {
    v[t] = runs.first[t] + i * runs.stride;
    LLMOPS_UNROLL for (int r = 0; r < R; ++r) weight[r][t] = set1(s[r * kRun + runs.at[t] + i]);
  }
  const auto column = [&](int64_t d, const auto& load_row) __attribute__((always_inline)) {
    Vec x[S];
    LLMOPS_UNROLL for (int t = 0; t < S; ++t) x[t] = load_row(v[t] + d);
    LLMOPS_UNROLL for (int r = 0; r < R; ++r) {
      // By itself, then added: the exacter, and o waits for one addition, not for S products.
      Vec sum = weight[r][0] * x[0];
      LLMOPS_UNROLL for (int t = 1; t < S; ++t) sum = fma(weight[r][t], x[t], sum);
      store(o + r * ldo + d, load(o + r * ldo + d) + sum);
    }
  };
  int64_t d = 0;
  for (; d + W <= dim; d += W)
    column(d, [](const T* p) __attribute__((always_inline)) { return load(p); });
  const int tail = static_cast<int>(dim - d);
  if (tail > 0)
    column(d, [&](const T* p) __attribute__((always_inline)) { return load_n(p, tail); });
}

// The same for all rows, and all of the runs.
template <class T, int S>
LLMOPS_OUTLINE void value_streams(const Streams<T>& runs, int64_t dim, int rows, const float* s,
                                  float* o, int64_t ldo) {
  for (int i = 0; i < runs.count; ++i) {
    int r = 0;
    for (; r + 2 <= rows; r += 2) add_values<T, 2, S>(runs, i, dim, s + r * kRun, o + r * ldo, ldo);
    if (r < rows) add_values<T, 1, S>(runs, i, dim, s + r * kRun, o + r * ldo, ldo);
  }
}

}  // namespace
}  // namespace llmops::cpu::LLMOPS_ISA
