// Cross-entropy, forward and backward. Formulas: cross_entropy.h
//
// Forward: a warp has a short row, a block of 512 threads a long one; the logits are read once. A
// thread keeps a maximum and a sum of its own and meets 16 elements at a time, their maximum first.
// Backward: elementwise over tiles of rows, whatever the target; a thread reads no logit but its
// own, for dx may be x. Reductions over rows are one block's, in fp64 and in a fixed order: the
// same bits each run.
//
// fp32 in the threads, fp64 for what is one number per row, rounded once. Ignored rows are not
// read. A target outside [0, C), which a GPU cannot report, reads nothing; its row's loss and
// gradient are NaN. 1 access per element forward, 2 backward. Milakov and Gimelshein, "Online
// normalizer calculation for softmax", 2018.
#include "cross_entropy.h"

#include "tile.h"

namespace llmops::cuda {
namespace {

constexpr int kReducing = 512;

__device__ __forceinline__ double not_a_number() {
  return __longlong_as_double(0x7ff8000000000000LL);
}

struct Target {
  int64_t at;
  bool kept, valid;  // counts; and has a class
};
__device__ __forceinline__ Target target_of(const CrossEntropy& p, int64_t row) {
  const int64_t t = p.target_64 ? load(static_cast<const int64_t*>(p.target) + row)
                                : load(static_cast<const int32_t*>(p.target) + row);
  const bool kept = t != p.ignore_index;
  return {t, kept, kept && t >= 0 && t < p.n};
}
__device__ __forceinline__ double weight_of(const CrossEntropy& p, const Target& t) {
  if (!t.valid) return 0.0;
  return p.weight ? static_cast<double>(load(p.weight + t.at)) : 1.0;
}
__device__ __forceinline__ float exponential(float z, float top) {
  return exp2_approx((z - top) * kLog2e);
}

template <int kThreads>
__global__ void __launch_bounds__(kBlock<kThreads>, kBlocks<kThreads, kThreads == 32 ? 80 : 64>)
    cross_entropy_fwd_kernel(CrossEntropyForward f) {
  using T = Tile<kThreads>;
  constexpr int kRows = kRowsOfBlock<kThreads>;
  const CrossEntropy& p = f.of;
  const int thread = threadIdx.x % kThreads;
  const bool smooth = p.smoothing > 0.0;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.x / kThreads;
       row < p.rows; row += static_cast<int64_t>(gridDim.x) * kRows) {
    const Target t = target_of(p, row);
    const int64_t at = place_of(p.x, row), length = t.valid ? p.n : 0;
    float top = -INFINITY, total = 0.0f;
    float gap = 0.0f, seen = 0.0f;  // sums of w (maximum - x) and of w
    for (int64_t begin = 0; begin < length; begin += T::kElements) {
      float z[T::kHeld];
      T::read(p.x, at + begin, length - begin, p.wide, thread, z, -INFINITY);
      float next = top;
#pragma unroll
      for (int i = 0; i < T::kHeld; ++i) next = fmaxf(next, z[i]);
      // A thread that has seen nothing, or only -inf, adds nothing; a NaN makes its sum NaN.
      const float shift = next == -INFINITY ? 0.0f : next;
      total *= exponential(top, shift);
#pragma unroll
      for (int i = 0; i < T::kHeld; ++i) total += exponential(z[i], shift);
      if (smooth) {
        gap += seen * (shift - (top == -INFINITY ? 0.0f : top));
#pragma unroll
        for (int i = 0; i < T::kHeld; ++i) {
          const int64_t column = begin + T::column(p.wide, thread, i);
          if (column >= length) continue;
          const float w = p.weight ? load(p.weight + column) : 1.0f;
          gap = fmaf(w, shift - z[i], gap);
          seen += w;
        }
      }
      top = next;
    }
    const float row_top = row_max<kThreads>(top), shift = row_top == -INFINITY ? 0.0f : row_top;
    if (top != -INFINITY) total *= exponential(top, shift);
    gap += seen * (shift - (top == -INFINITY ? 0.0f : top));
    float sums[3] = {total, gap, seen};
    row_sums<kThreads>(sums);
    if (thread != 0) continue;
    const double log_sum = log(static_cast<double>(sums[0]));
    const double lse = t.valid ? static_cast<double>(row_top) + log_sum : not_a_number();
    double loss = not_a_number();
    if (t.valid) {
      const double x_t = static_cast<double>(element(p.x, at + t.at));
      loss = (static_cast<double>(row_top) - x_t + log_sum) * weight_of(p, t);
      if (smooth) {
        const double spread = static_cast<double>(sums[1]) + static_cast<double>(sums[2]) * log_sum;
        loss = (1.0 - p.smoothing) * loss + p.uniform * spread;
      }
    }
    store(p.lse + row, t.kept ? lse : 0.0);
    if (p.reduction != kNone) {
      store(f.losses + row, t.kept ? loss : 0.0);
    } else {
      if (p.z_loss != 0.0) loss += p.z_loss * lse * lse;
      set_element(f.loss, row, t.kept ? static_cast<float>(loss) : 0.0f);
    }
  }
}

// The sum or the mean of the rows' losses, and z times that of lse^2.
__global__ void __launch_bounds__(kReducing, 1) cross_entropy_reduce_kernel(CrossEntropyForward f) {
  const CrossEntropy& p = f.of;
  double sums[4] = {0.0, 0.0, 0.0, 0.0};  // losses, lse^2, weights, rows
  for (int64_t row = threadIdx.x; row < p.rows; row += kReducing) {
    sums[0] += load(f.losses + row);
    if (p.z_loss != 0.0) {
      const double lse = load(p.lse + row);
      sums[1] += lse * lse;
    }
    if (p.reduction == kMean) {
      const Target t = target_of(p, row);
      sums[2] += weight_of(p, t);
      sums[3] += t.valid ? 1.0 : 0.0;
    }
  }
  row_sums<kReducing>(sums);
  if (threadIdx.x != 0) return;
  const bool mean = p.reduction == kMean;
  double loss = mean ? sums[0] / sums[2] : sums[0];
  if (p.z_loss != 0.0) loss += p.z_loss * (mean ? sums[1] / sums[3] : sums[1]);
  set_element(f.loss, 0, static_cast<float>(loss));
}

// What the mean multiplies by, 1 / sum of the targets' weights and 1 / number of rows (1 and 1
// without a mean), and the sum of all weights.
__global__ void __launch_bounds__(kReducing, 1)
    cross_entropy_scales_kernel(CrossEntropyBackward f) {
  const CrossEntropy& p = f.of;
  double sums[3] = {0.0, 0.0, 0.0};
  if (p.reduction == kMean) {
    for (int64_t row = threadIdx.x; row < p.rows; row += kReducing) {
      const Target t = target_of(p, row);
      sums[0] += weight_of(p, t);
      sums[1] += t.valid ? 1.0 : 0.0;
    }
  }
  if (p.smoothing > 0.0)
    for (int64_t i = threadIdx.x; i < p.n; i += kReducing)
      sums[2] += p.weight ? static_cast<double>(load(p.weight + i)) : 1.0;
  row_sums<kReducing>(sums);
  if (threadIdx.x != 0) return;
  store(f.scales, p.reduction == kMean ? 1.0 / sums[0] : 1.0);
  store(f.scales + 1, p.reduction == kMean ? 1.0 / sums[1] : 1.0);
  store(f.scales + 2, sums[2]);
}

template <int kThreads>
__global__ void __launch_bounds__(kBlock<kThreads>, kBlocks<kThreads, kThreads == 32 ? 96 : 80>)
    cross_entropy_bwd_kernel(CrossEntropyBackward f, Tiles tiles) {
  using T = Tile<kThreads>;
  const CrossEntropy& p = f.of;
  const int thread = threadIdx.x % kThreads;
  for_tiles<kThreads>(tiles, [&](int64_t row, int64_t begin) {
    const int64_t n = p.n - begin;
    const Target t = target_of(p, row);
    float v[T::kHeld];
    if (!t.valid) {  // ignored, or NaN
#pragma unroll
      for (int i = 0; i < T::kHeld; ++i) v[i] = t.kept ? static_cast<float>(not_a_number()) : 0.0f;
      T::write(f.dx, place_of(f.dx, row) + begin, n, p.wide, thread, v);
      return;
    }
    // In fp64, as few as they are: a result may be a small difference of them.
    const double lse = load(p.lse + row), own = weight_of(p, t);
    const double g = element(f.grad, p.reduction == kNone ? row : 0);
    const double per_loss = g * load(f.scales), per_row = g * load(f.scales + 1);
    double rest =
        p.z_loss != 0.0 ? 2.0 * p.z_loss * per_row * lse : 0.0;  // that comes by lse alone
    if (f.grad_lse) rest += load(f.grad_lse + row);
    const double b = per_loss * (1.0 - p.smoothing) * own;
    const double c = per_loss * p.uniform;
    const double every = load(f.scales + 2);
    const double a = b + rest + c * every;
    // No difference of two products: fused, the rounding of one would remain at a single class.
    rest += c * (every - own);
    // What fp32 drops of lse is a factor of all exponentials, 1 - low: it goes into a.
    const float high = static_cast<float>(lse), low = static_cast<float>(lse - high);
    const float scale = static_cast<float>(a * (1.0 - static_cast<double>(low)));
    const float each = static_cast<float>(c);
    T::read(p.x, place_of(p.x, row) + begin, n, p.wide, thread, v, 0.0f);
    // The target's element is taken out and put back: what is computed for it alone is once in the
    // program, not once for each element it may be.
    const int64_t ahead = t.at - begin;
    const int target = ahead >= 0 && ahead < T::kElements ? static_cast<int>(ahead) : -1;
    bool mine = false;
    float at_target = 0.0f;
#pragma unroll
    for (int i = 0; i < T::kHeld; ++i) {
      if (T::column(p.wide, thread, i) == target) mine = true, at_target = v[i];
      v[i] = scale * exponential(v[i], high);
    }
    if (mine) {
      const float d = at_target - high;
      // a e - b - c w = a (e - 1) + rest: where the model is sure, e is 1 but for its rounding.
      at_target = d > -0.5f ? fmaf(static_cast<float>(a), expm1f(d - low), static_cast<float>(rest))
                            : scale * exponential(at_target, high) - static_cast<float>(c * own) -
                                  static_cast<float>(b);
    }
    if (p.smoothing > 0.0) {
      T::each(p.wide, thread, T::within(n), [&](int i) {
        const int64_t column = begin + T::column(p.wide, thread, i);
        v[i] -= p.weight ? each * load(p.weight + column) : each;
      });
    }
    if (mine) {
#pragma unroll
      for (int i = 0; i < T::kHeld; ++i)
        if (T::column(p.wide, thread, i) == target) v[i] = at_target;
    }
    T::write(f.dx, place_of(f.dx, row) + begin, n, p.wide, thread, v);
  });
}

}  // namespace

int cross_entropy_fwd(const CrossEntropyForward& f, void* stream) {
  const CrossEntropy& p = f.of;
  const auto s = static_cast<cudaStream_t>(stream);
  if (p.rows > 0) {
    if (p.n <= Tile<32>::kElements) {
      LLMOPS_LAUNCH(cross_entropy_fwd_kernel<32>, grid_of((p.rows + 3) / 4), kBlock<32>, 0, s, f);
    } else {
      LLMOPS_LAUNCH(cross_entropy_fwd_kernel<512>, grid_of(p.rows), kBlock<512>, 0, s, f);
    }
  }
  int status = static_cast<int>(cudaGetLastError());
  if (status == 0 && p.reduction != kNone) {
    LLMOPS_LAUNCH(cross_entropy_reduce_kernel, 1, kReducing, 0, s, f);
    status = static_cast<int>(cudaGetLastError());
  }
  return status;
}

int cross_entropy_bwd(const CrossEntropyBackward& f, void* stream) {
  const CrossEntropy& p = f.of;
  if (p.rows == 0 || p.n == 0) return 0;
  const auto s = static_cast<cudaStream_t>(stream);
  LLMOPS_LAUNCH(cross_entropy_scales_kernel, 1, kReducing, 0, s, f);
  int status = static_cast<int>(cudaGetLastError());
  if (status != 0) return status;
  with_tiles(p.rows, p.n, [&](auto threads, unsigned grid, const Tiles& tiles) {
    constexpr int kThreads = decltype(threads)::value;
    LLMOPS_LAUNCH(cross_entropy_bwd_kernel<kThreads>, grid, kBlock<kThreads>, 0, s, f, tiles);
  });
  return static_cast<int>(cudaGetLastError());
}

}  // namespace llmops::cuda
