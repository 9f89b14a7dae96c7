// Attention backward. Formula: csrc/cpu/attention.h
//
// Three launches. The first makes what the others need of each row: delta = dout . out - dlse, and
// its log-sum-exp in the unit of the exponent. In the second a block holds 64 keys and their values
// and walks over the queries that see them, head by head of their group, summing dK and dV in
// registers; in the third a block holds 64 queries and walks over the keys they see, for dQ. Both
// compute scores and P again; no sum is shared between blocks, so that the same bits come of every
// run. Tiles come by cp.async, the next one while this one is used; a warp has 16 rows (with D over
// 128 two warps share them, each with half of the columns of dK and dV), skips strips that nothing
// sees, and compares positions only in those that a limit cuts. fp32 sums; P and dS are rounded to
// the inputs' type for the tensor cores. 14 Tq Tk D flops per head. Dao, "FlashAttention-2", 2023.
#include "attention_bwd.h"

#include "attention_bwd_tile.h"

namespace llmops::cuda {
namespace {

constexpr int kRowThreads = 256, kRowLanes = 8;

// From here on the spacing of fp32 numbers hides the sum that lse holds beside the maximum, as in
// a row whose keys all got the lowest finite number from an additive mask.
constexpr float kLseResolves = 1024.0f;

__device__ __forceinline__ float widened_at(const void* data, int64_t at, bool bf16) {
  return widened(load(static_cast<const uint16_t*>(data) + at), bf16);
}

// One lane's part of the sum over keys of exp(s - lse): every kRowLanes-th key. Rare and slow.
__device__ __forceinline__ float part_of_weight(const Attention& p, int batch, int head, int query,
                                                float lse, int lane) {
  const bool bf16 = p.type == kBf16;
  const ScoreHead of(p, batch, head);
  const int64_t q = batch * p.q_stride[0] + head * p.q_stride[1] + query * p.q_stride[2];
  const int64_t k = batch * p.k_stride[0] + head / (p.heads / p.kv_heads) * p.k_stride[1];
  const Span seen = keys_of(p, query, 1);
  float sum = 0.0f;
  for (int key = seen.begin + lane; key < seen.end; key += kRowLanes) {
    float product = 0.0f, derivative;
    for (int d = 0; d < p.dim; ++d)
      product = fmaf(widened_at(p.q, q + d, bf16),
                     widened_at(p.k, k + key * p.k_stride[2] + d, bf16), product);
    const float s = modified_score(p, of, query, key, product, derivative);
    sum += exp2_approx((s - lse) * kLog2e);
  }
  return sum;
}

// Eight lanes a row.
__global__ void __launch_bounds__(kRowThreads, 1)
    attention_bwd_rows_kernel(AttentionBackward b, Divisor of_queries, Divisor of_heads) {
  const Attention& p = b.of;
  const bool bf16 = p.type == kBf16;
  const int64_t rows = p.batch * p.heads * p.queries;
  const int64_t row =
      static_cast<int64_t>(blockIdx.x) * (kRowThreads / kRowLanes) + threadIdx.x / kRowLanes;
  const int lane = threadIdx.x % kRowLanes;
  const bool there = row < rows;
  const int64_t plane = there ? divided(row, of_queries) : 0;
  const int query = there ? static_cast<int>(row - plane * p.queries) : 0;
  const int batch = static_cast<int>(divided(plane, of_heads));
  const int head = static_cast<int>(plane - batch * p.heads);
  const float lse = there ? load(p.lse + row) : -INFINITY;
  const bool alive = lse != -INFINITY;
  float sum = 0.0f;
  if (alive) {
    const auto* out = static_cast<const uint16_t*>(p.out) + batch * p.out_stride[0] +
                      head * p.out_stride[1] + query * p.out_stride[2];
    const auto* grad = static_cast<const uint16_t*>(b.grad_out) + batch * b.grad_out_stride[0] +
                       head * b.grad_out_stride[1] + query * b.grad_out_stride[2];
    if (p.wide_out && b.wide_grad) {
      for (int d = lane * 8; d < p.dim_v; d += kRowLanes * 8) {
        float x[8], y[8];
        load_8(out + d, bf16, x);
        load_8(grad + d, bf16, y);
#pragma unroll
        for (int j = 0; j < 8; ++j) sum = fmaf(x[j], y[j], sum);
      }
    } else {
      for (int d = lane; d < p.dim_v; d += kRowLanes)
        sum = fmaf(widened(load(out + d), bf16), widened(load(grad + d), bf16), sum);
    }
  }
  float weight = 0.0f;
  const bool modified = b.row_norm != nullptr;
  const bool lost = modified && alive && fabsf(lse) > kLseResolves;
  if (lost) weight = part_of_weight(p, batch, head, query, lse, lane);
#pragma unroll
  for (int distance = kRowLanes / 2; distance > 0; distance /= 2) {
    sum += __shfl_xor_sync(kAllLanes, sum, distance);
    weight += __shfl_xor_sync(kAllLanes, weight, distance);
  }
  if (!there || lane != 0) return;
  if (alive && b.grad_lse)
    sum -= load(b.grad_lse + batch * b.grad_lse_stride[0] + head * b.grad_lse_stride[1] +
                query * b.grad_lse_stride[2]);
  float sink = 0.0f;
  if (p.sinks && alive) sink = exp2_approx((load(p.sinks + head) - lse) * kLog2e);
  // No weight at all: the products, summed in another order, differ from the forward's by too much.
  const float norm = !lost ? 1.0f : (weight + sink == 0.0f ? 0.0f : 1.0f / (weight + sink));
  store(b.row_lse + row, alive ? (modified ? lse : lse * kLog2e) : INFINITY);
  store(b.row_delta + row, sum);
  if (modified) store(b.row_norm + row, norm);
  if (b.row_sink) store(b.row_sink + row, alive ? -sink * norm * sum : 0.0f);
}

// A block sums the rows of a head, in fp64: the sum cancels.
__global__ void __launch_bounds__(kRowThreads, 1) attention_dsinks_kernel(AttentionBackward b) {
  const Attention& p = b.of;
  LLMOPS_SHARED(double, parts, kRowThreads);
  double sum = 0.0;
  for (int64_t batch = 0; batch < p.batch; ++batch) {
    const float* rows = b.row_sink + (batch * p.heads + blockIdx.x) * p.queries;
    for (int64_t t = threadIdx.x; t < p.queries; t += kRowThreads) sum += load(rows + t);
  }
  parts[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int i = 1; i < kRowThreads; ++i) sum += parts[i];
  store(b.dsinks + blockIdx.x, static_cast<float>(sum));
}

}  // namespace

int attention_bwd(const AttentionBackward& b, void* stream) {
  const Attention& p = b.of;
  const auto s = static_cast<cudaStream_t>(stream);
  const int64_t rows = p.batch * p.heads * p.queries, of_block = kRowThreads / kRowLanes;
  const int64_t grid = (rows + of_block - 1) / of_block;
  if (grid > kMostBlocks) return static_cast<int>(cudaErrorInvalidValue);
  if (grid > 0)
    LLMOPS_LAUNCH(attention_bwd_rows_kernel, static_cast<unsigned>(grid), kRowThreads, 0, s, b,
                  Divisor(p.queries), Divisor(p.heads));
  if (b.dsinks && p.heads > 0)
    LLMOPS_LAUNCH(attention_dsinks_kernel, static_cast<unsigned>(p.heads), kRowThreads, 0, s, b);
  int error = static_cast<int>(cudaGetLastError());
  if (!error) error = attention_bwd_dkdv(b, stream);
  if (!error) error = attention_bwd_dq(b, stream);
  return error || !b.dmask ? error : attention_dmask(b, stream);
}

}  // namespace llmops::cuda
