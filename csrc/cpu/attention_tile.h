// The matrix products of attention, as register tiles, and the packing around them.
//
// Queries live in vector lanes, 64 to a block, so that S^T = K Q^T, and the running maximum, the
// sum and the rescaling of a row are lane-wise. Each product has the form
//   acc[i][j] += sum_n A(i, n) * B[n][j]   (A broadcast from memory, B[n] a row of vectors)
// with kTileRows x kTileVecs accumulators: 24 of 32 registers on AVX-512, 12 of 16 on AVX2. K and V
// are then read row by row where they lie, and nothing but Q is ever transposed.
// With kPairs a 32-bit cell of A and B is two bf16 and a step is one vdpbf16ps.
#pragma once
#include "amx.h"
#include "attention.h"
#include "simd.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace llmops::cpu::LLMOPS_ISA {
namespace {

constexpr int kLanes = static_cast<int>(kAttentionLanes);
constexpr int kBlockVecs = kLanes / W;
constexpr int kTileRows = W == 1 ? 4 : 6;
constexpr int kTileVecs = W == 8 ? 2 : 4;
#ifdef LLMOPS_HAS_DOT_PAIRS
constexpr bool kHasPairs = true;
#else
constexpr bool kHasPairs = false;
#endif

// How products are computed: of bf16 there are three ways, and fp32 may be split into bf16 parts.
enum class Way { widened, pairs, tiles, split };
// Rows of O^T and dQ^T that a product reads and writes at a time, existing or not.
template <Way kWay>
constexpr int64_t kWholeRows = kWay == Way::split   ? 32
                               : kWay == Way::tiles ? 16
                                                    : 1;
// Pairs know a sign of the scale, not the factor 0.
LLMOPS_INLINE Way way_of(const AttentionParams& p) {
  if (!kHasPairs || p.type != DType::bf16 || p.scale == 0.0f) return Way::widened;
  return kHasTiles && active_isa() == Isa::amx ? Way::tiles : Way::pairs;
}

// Floats from a row of a vector's lanes to the next, and from a vector's first row to the next
// one's: 64 lanes lie side by side, or each vector's rows by themselves.
struct LaneSteps {
  int64_t row, vec;
};
constexpr LaneSteps kSideBySide{kLanes, W};
// How packed queries, O or dQ, of `rows` rows lie: tiles take one vector of queries after the
// other.
template <Way kWay>
LLMOPS_INLINE LaneSteps lane_steps(int64_t rows) {
  return kWay == Way::tiles ? LaneSteps{W, rows * W} : kSideBySide;
}

// Called once per block: inlining these everywhere would cost minutes of compiling.
#define LLMOPS_OUTLINE __attribute__((noinline))

LLMOPS_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
LLMOPS_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
LLMOPS_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
LLMOPS_INLINE int clamp_int(int64_t x, int64_t low, int64_t high) {
  return static_cast<int>(x < low ? low : (x > high ? high : x));
}

// f(Constant<n>) for 1 <= n <= N.
template <int N>
struct Constant {
  static constexpr int value = N;
};
template <int N, class F>
LLMOPS_INLINE void with_constant(int n, const F& f) {
  if constexpr (N > 1) {
    if (n != N) return with_constant<N - 1>(n, f);
  }
  f(Constant<N>{});
}

// Scratch is carved from one block of memory, in 64-byte steps. AddressSanitizer is told where each
// piece ends, and of some bytes behind it.
struct Arena {
  char* next;
  template <class T>
  T* take(int64_t count) {
    T* result = reinterpret_cast<T*>(next);
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
#ifdef __SANITIZE_ADDRESS__
    const int64_t step = round_up(bytes, 64) + 4096;
    if (next) {
      __asan_unpoison_memory_region(next, bytes);
      __asan_poison_memory_region(next + bytes, step - bytes);
    }
#else
    const int64_t step = round_up(bytes, 64);
#endif
    next += step;
    return result;
  }
};

LLMOPS_INLINE Vec broadcast(const char* p) {
  float cell;  // float, or two bf16: only moved, never computed with
  __builtin_memcpy(&cell, p, 4);
  return set1(cell);
}
template <bool kPairs>
LLMOPS_INLINE Vec madd(Vec a, Vec b, Vec c) {
#ifdef LLMOPS_HAS_DOT_PAIRS
  if constexpr (kPairs) return dot_pairs(a, b, c);
#endif
  return fma(a, b, c);
}

// The A operand: cell (i, n) is at base + i * row + n * step, in bytes. Tiles that are called take
// the three by themselves: the struct would pass through memory, and each call wait for it.
struct Cells {
  const char* base;
  int64_t row, step;
  Cells at(int64_t i, int64_t n) const { return {base + i * row + n * step, row, step}; }
};
LLMOPS_INLINE Cells cells(const void* base, int64_t row, int64_t step) {
  return {static_cast<const char*>(base), row, step};
}

template <int MR, int NV, bool kPairs>
LLMOPS_INLINE void accumulate_run(Cells a, const float* b, int64_t ldb, int64_t n,
                                  Vec (&acc)[MR][NV]) {
  const char* p = a.base;
  _Pragma("GCC unroll 2") for (int64_t s = 0; s < n; ++s) {
    Vec row[NV];
    LLMOPS_UNROLL for (int j = 0; j < NV; ++j) row[j] = load(b + j * W);
    LLMOPS_UNROLL for (int i = 0; i < MR; ++i) {
      const Vec cell = broadcast(p + i * a.row);
      LLMOPS_UNROLL for (int j = 0; j < NV; ++j) acc[i][j] = madd<kPairs>(cell, row[j], acc[i][j]);
    }
    p += a.step;
    b += ldb;
  }
}

template <int MR, int NV, bool kPairs>
LLMOPS_INLINE void accumulate(Cells a, const float* b, int64_t ldb, int64_t n, Vec (&acc)[MR][NV]) {
  if constexpr (W > 1) return accumulate_run<MR, NV, kPairs>(a, b, ldb, n, acc);
  // Without vectors a long sum is one of runs, as torch's are: one alone rounds too often.
  constexpr int64_t kRun = 64;
  for (int64_t s = 0; s < n; s += kRun) {
    Vec part[MR][NV];
    LLMOPS_UNROLL for (int i = 0; i < MR; ++i) {
      LLMOPS_UNROLL for (int j = 0; j < NV; ++j) part[i][j] = zero();
    }
    accumulate_run<MR, NV, kPairs>(a.at(0, s), b + s * ldb, ldb, min64(kRun, n - s), part);
    LLMOPS_UNROLL for (int i = 0; i < MR; ++i) {
      LLMOPS_UNROLL for (int j = 0; j < NV; ++j) acc[i][j] = acc[i][j] + part[i][j];
    }
  }
}

// out [MR][64] = A B, B [n][64]; and the lanes' running maximum, when asked for.
template <int MR, int NV, bool kPairs>
LLMOPS_OUTLINE void score_tile(const char* base, int64_t row, int64_t step, const float* b,
                               int64_t n, float* out, float* top) {
  Vec acc[MR][NV];
  LLMOPS_UNROLL for (int i = 0; i < MR; ++i) {
    LLMOPS_UNROLL for (int j = 0; j < NV; ++j) acc[i][j] = zero();
  }
  accumulate<MR, NV, kPairs>({base, row, step}, b, kLanes, n, acc);
  LLMOPS_UNROLL for (int i = 0; i < MR; ++i) {
    LLMOPS_UNROLL for (int j = 0; j < NV; ++j) store(out + i * kLanes + j * W, acc[i][j]);
  }
  if (top) {
    LLMOPS_UNROLL for (int j = 0; j < NV; ++j) {
      Vec m = load(top + j * W);
      LLMOPS_UNROLL for (int i = 0; i < MR; ++i) m = max(acc[i][j], m);
      store(top + j * W, m);
    }
  }
}

// out [MR][ldo] = out * alpha + A B, alpha lane-wise, or 1 when null.
template <int MR, int NV, bool kPairs>
LLMOPS_OUTLINE void update_tile(const char* base, int64_t row, int64_t step, const float* b,
                                int64_t ldb, int64_t n, float* out, int64_t ldo,
                                const float* alpha) {
  Vec acc[MR][NV];
  LLMOPS_UNROLL for (int i = 0; i < MR; ++i) {
    LLMOPS_UNROLL for (int j = 0; j < NV; ++j) acc[i][j] = zero();
  }
  accumulate<MR, NV, kPairs>({base, row, step}, b, ldb, n, acc);
  if (alpha) {
    LLMOPS_UNROLL for (int j = 0; j < NV; ++j) {
      const Vec factor = load(alpha + j * W);
      LLMOPS_UNROLL for (int i = 0; i < MR; ++i) {
        float* o = out + i * ldo + j * W;
        store(o, fma(load(o), factor, acc[i][j]));
      }
    }
  } else {
    LLMOPS_UNROLL for (int i = 0; i < MR; ++i) {
      LLMOPS_UNROLL for (int j = 0; j < NV; ++j) {
        float* o = out + i * ldo + j * W;
        store(o, load(o) + acc[i][j]);
      }
    }
  }
}

// S^T [keys][64] = rows of A times B [n][64]. visible[j]: keys that some lane of vector j sees;
// not decreasing in j, so that the vectors a group of keys needs are the last ones.
template <bool kPairs>
LLMOPS_OUTLINE void scores(Cells a, const float* b, int64_t n, int keys, int vecs,
                           const int* visible, float* out, float* top) {
  for (int i = 0; i < keys; i += kTileRows) {
    const int rows = keys - i < kTileRows ? keys - i : kTileRows;
    for (int c = 0; c < vecs; c += kTileVecs) {
      const int end = c + kTileVecs < vecs ? c + kTileVecs : vecs;
      int j = c;
      while (j < end && visible[j] <= i) ++j;
      if (j == end) continue;
      with_constant<kTileRows>(rows, [&](auto r) {
        with_constant<kTileVecs>(end - j, [&](auto v) {
          score_tile<r.value, v.value, kPairs>(a.at(i, 0).base, a.row, a.step, b + j * W, n,
                                               out + i * kLanes + j * W,
                                               top ? top + j * W : nullptr);
        });
      });
    }
  }
}

// out [rows][64] = out * alpha + A B over the visible steps of B [steps][64] only.
// visible[j]: steps for vector j, not decreasing.
template <bool kPairs>
LLMOPS_OUTLINE void update_lanes(Cells a, int64_t rows, const float* b, int vecs,
                                 const int* visible, float* out, const float* alpha) {
  for (int c = 0; c < vecs; c += kTileVecs) {
    const int end = c + kTileVecs < vecs ? c + kTileVecs : vecs;
    int done = 0;
    for (int j = c; j < end; ++j) {
      if (visible[j] == done) continue;
      // The first steps of a vector carry its alpha; vectors without any step have alpha 1.
      const float* factor = alpha && done == 0 ? alpha + j * W : nullptr;
      for (int64_t d = 0; d < rows; d += kTileRows) {
        const int left = rows - d < kTileRows ? static_cast<int>(rows - d) : kTileRows;
        with_constant<kTileRows>(left, [&](auto r) {
          with_constant<kTileVecs>(end - j, [&](auto v) {
            update_tile<r.value, v.value, kPairs>(
                a.at(d, done).base, a.row, a.step, b + done * kLanes + j * W, kLanes,
                visible[j] - done, out + d * kLanes + j * W, kLanes, factor);
          });
        });
      }
      done = visible[j];
    }
  }
}

template <class T>
LLMOPS_INLINE Vec load_some(const T* p, int64_t left) {
  return left >= W ? load(p) : load_n(p, static_cast<int>(left));
}
template <class T>
LLMOPS_INLINE void store_some(T* p, Vec a, int64_t left) {
  if (left >= W) {
    store(p, a);
  } else {
    store_n(p, a, static_cast<int>(left));
  }
}

// out [round_up(dim, W)][64]: lane i is factor * row[i]; lanes from count to a full vector are 0.
template <class T>
LLMOPS_OUTLINE void pack_lanes(const T* const* row, int count, int64_t dim, float factor,
                               float* out) {
  const Vec f = set1(factor);
  for (int a = 0; a < count; a += W) {
    for (int64_t d = 0; d < dim; d += W) {
      Vec r[W];
      if (a + W <= count && d + W <= dim) {
        LLMOPS_UNROLL for (int i = 0; i < W; ++i) r[i] = load(row[a + i] + d) * f;
      } else {
        for (int i = 0; i < W; ++i)
          r[i] = a + i < count ? load_some(row[a + i] + d, dim - d) * f : zero();
      }
      transpose(r);
      LLMOPS_UNROLL for (int i = 0; i < W; ++i) store(out + (d + i) * kLanes + a, r[i]);
    }
  }
}

// The reverse: row[i][d] = in[d][i] * factor[i], zero where the factor is.
template <class T>
LLMOPS_OUTLINE void unpack_lanes(const float* in, LaneSteps steps, int count, int64_t dim,
                                 const float* factor, T* const* row) {
  for (int a = 0; a < count; a += W, in += steps.vec) {
    const Vec f = load(factor + a);
    const Mask none = equal(f, zero());
    for (int64_t d = 0; d < dim; d += W) {
      Vec r[W];
      LLMOPS_UNROLL for (int i = 0; i < W; ++i) {
        r[i] = d + i < dim ? select(none, zero(), load(in + (d + i) * steps.row) * f) : zero();
      }
      transpose(r);
      if (a + W <= count && d + W <= dim) {
        LLMOPS_UNROLL for (int i = 0; i < W; ++i) store(row[a + i] + d, r[i]);
      } else {
        for (int i = 0; i < W && a + i < count; ++i) store_some(row[a + i] + d, r[i], dim - d);
      }
    }
  }
}

// Widens rows to dense fp32 rows of ld floats; what lies past dim up to a full vector is 0.
template <class T>
LLMOPS_OUTLINE void widen_rows(const T* in, int64_t stride, int64_t rows, int64_t dim, float* out,
                               int64_t ld) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t d = 0; d < dim; d += W)
      store(out + i * ld + d, load_some(in + i * stride + d, dim - d));
  }
}

#ifdef LLMOPS_HAS_DOT_PAIRS
// As pack_lanes, two dimensions to a cell: out [round_up(dim / 2, 16)][64].
[[maybe_unused]] LLMOPS_OUTLINE void pack_lane_pairs(const bf16* const* row, int count, int64_t dim,
                                                     bool negate, LaneSteps steps, float* out) {
  for (int a = 0; a < count; a += W, out += steps.vec) {
    for (int64_t d = 0; d < dim; d += 2 * W) {
      Vec r[W];
      for (int i = 0; i < W; ++i) {
        r[i] = a + i < count ? load_pairs_n(row[a + i] + d, clamp_int(dim - d, 0, 2 * W)) : zero();
        if (negate) r[i] = flip_pair_signs(r[i]);
      }
      transpose(r);
      LLMOPS_UNROLL for (int i = 0; i < W; ++i) store(out + (d / 2 + i) * steps.row, r[i]);
    }
  }
}

// out [ceil(rows / 2)][dim up to the next 32nd]: cell (i, d) is (in[2i][d], in[2i + 1][d]); how
// its rows and vectors of columns lie, as packed lanes do.
template <class Row>
LLMOPS_OUTLINE void pack_row_pairs(const Row& row, int64_t rows, int64_t dim, float* out,
                                   LaneSteps steps) {
  for (int64_t i = 0; i < rows; i += 2) {
    const bf16 *x = row(i), *y = i + 1 < rows ? row(i + 1) : nullptr;
    for (int64_t d = 0; d < dim; d += 2 * W) {
      const int n = clamp_int(dim - d, 0, 2 * W);
      Vec pairs[2];
      interleave_pairs(load_pairs_n(x + d, n), y ? load_pairs_n(y + d, n) : zero(), pairs);
      float* const to = out + i / 2 * steps.row + d / W * steps.vec;
      store(to, pairs[0]);
      store(to + steps.vec, pairs[1]);
    }
  }
}

// Dense rows of ld bf16 (ld even), zero past dim: for an odd dim, whose last pair is half outside.
[[maybe_unused]] LLMOPS_OUTLINE void copy_rows(const bf16* in, int64_t stride, int64_t rows,
                                               int64_t dim, bf16* out, int64_t ld) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t d = 0; d < ld; ++d) out[i * ld + d] = d < dim ? in[i * stride + d] : bf16{0};
  }
}
#endif

}  // namespace
}  // namespace llmops::cpu::LLMOPS_ISA
