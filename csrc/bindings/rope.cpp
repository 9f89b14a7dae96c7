// rope: rotary position embedding of one tensor, of q and k in one launch, and of both in place,
// as raw operators. llmops.ops.rope owns the public schema, the user's checks and autograd; what is
// checked here keeps memory safe whoever calls.
#include "cpu/rope.h"

#include "ids.h"
#include "rope.h"
#include "schemas.h"

namespace llmops {
namespace {

constexpr const char* kName = kRopeName;
// Tasks to aim for, whatever the thread count; below this many tokens a task is not cut further.
constexpr int64_t kTasks = 32;
constexpr int64_t kLeastTokens = 256;

struct Heads {  // one of q, k: [B, H, T, D], any strides with D dense
  const char* x;
  char* y;
  int64_t heads;
  int64_t x_strides[3], y_strides[3];  // B, H, T
};

// position_ids [T], [1, T] or [B, T].
struct Positions {
  CheckedIds ids;
  int64_t batch_step;

  Positions(const Tensor& given, int64_t batch, int64_t tokens, int64_t table)
      : ids(given, table, kName, "position_ids", "cos and sin have",
            "; make longer tables with llmops.rope_tables") {
    const int64_t dims = given.dim(), rows = dims == 2 ? given.size(0) : 1;
    LLMOPS_CHECK(
        (dims == 1 || dims == 2) && given.size(dims - 1) == tokens && (rows == 1 || rows == batch),
        kName, ": position_ids must be [T] or [B, T] with B ", batch, " and T ", tokens);
    batch_step = rows == 1 ? 0 : tokens;
  }
  const int64_t* at(int64_t b, int64_t t) const { return ids.data() + b * batch_step + t; }
};

// cos and sin as the kernel reads them, with the strides that lead from (batch, token or position)
// to a row.
struct Tables {
  Tensor cos, sin;
  const float *cos_data, *sin_data;
  int64_t cos_batch, sin_batch, cos_step, sin_step;
  int64_t rows;  // of a [N, R/2] table; 0 for gathered ones

  Tables(const Tensor& cos_in, const Tensor& sin_in, int64_t batch, int64_t tokens,
         int64_t head_dim)
      : cos(last_dim_dense(cos_in)), sin(last_dim_dense(sin_in)) {
    const int64_t dims = cos.dim();
    LLMOPS_CHECK((dims == 2 || dims == 3) && shape_of(cos) == shape_of(sin), kName,
                 ": cos and sin must both be [N, R/2] or both [B, T, R/2]");
    LLMOPS_CHECK(cos.scalar_type() == ScalarType::Float && sin.scalar_type() == ScalarType::Float,
                 kName, ": cos and sin must be float32");
    LLMOPS_CHECK(2 * cos.size(dims - 1) <= head_dim, kName, ": cos and sin rotate ",
                 2 * cos.size(dims - 1), " elements, but the head dim is ", head_dim);
    if (dims == 3) {
      LLMOPS_CHECK((cos.size(0) == 1 || cos.size(0) == batch) && cos.size(1) == tokens, kName,
                   ": gathered cos and sin must be [B, T, R/2] with B ", batch, " and T ", tokens);
    }
    const bool per_batch = dims == 3 && cos.size(0) != 1;
    rows = dims == 2 ? cos.size(0) : 0;
    cos_batch = per_batch ? cos.stride(0) : 0;
    sin_batch = per_batch ? sin.stride(0) : 0;
    cos_step = cos.stride(dims - 2);
    sin_step = sin.stride(dims - 2);
    cos_data = static_cast<const float*>(cos.data_ptr());
    sin_data = static_cast<const float*>(sin.data_ptr());
  }
};

Heads heads_of(const Tensor& x, const Tensor& y) {
  const auto xs = x.strides(), ys = y.strides();
  return {static_cast<const char*>(x.data_ptr()),
          static_cast<char*>(y.data_ptr()),
          x.size(1),
          {xs[0], xs[1], xs[2]},
          {ys[0], ys[1], ys[2]}};
}

// Turns every row of `list[0..count)`, all of the same batch, tokens, head dim and dtype as x.
void run(const Tensor& x, const Heads* list, int count, const Tensor& cos, const Tensor& sin,
         const std::optional<Tensor>& position_ids, bool interleaved, bool inverse) {
  const int64_t batch = x.size(0), tokens = x.size(2), head_dim = x.size(3);
  const Tables tables(cos, sin, batch, tokens, head_dim);
  const bool gathered = tables.cos.dim() == 3;
  LLMOPS_CHECK(!(gathered && position_ids.has_value()), kName,
               ": position_ids does not go with gathered cos and sin [B, T, R/2]");
  LLMOPS_CHECK(gathered || position_ids.has_value() || tables.rows >= tokens, kName, ": ", tokens,
               " tokens need as many rows of cos and sin, got ", tables.rows);
  std::optional<Positions> positions;
  if (position_ids.has_value()) positions.emplace(*position_ids, batch, tokens, tables.rows);

  const cpu::RopeParams params{kernel_dtype(x.scalar_type(), kName), interleaved, inverse, head_dim,
                               2 * tables.cos.size(-1)};
  const int64_t size = element_size(x.scalar_type());
  int64_t all_heads = 0;
  for (int i = 0; i < count; ++i) all_heads += list[i].heads;
  if (batch * tokens * head_dim * all_heads == 0) return;

  const auto kernel = LLMOPS_CPU_CALL(rope_rows);
  // Rows follow memory: along heads where a token's heads lie together in q and in k.
  bool along_heads = true;
  for (int i = 0; i < count; ++i)
    along_heads &= tokens == 1 || list[i].x_strides[1] < list[i].x_strides[2];

  if (along_heads) {
    parallel_rows(batch * tokens, all_heads * head_dim, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t b = task / tokens, t = task % tokens;
        const int64_t at = positions ? *positions->at(b, t) : t;
        cpu::RopeRows rows{};
        rows.cos = tables.cos_data + b * tables.cos_batch + at * tables.cos_step;
        rows.sin = tables.sin_data + b * tables.sin_batch + at * tables.sin_step;
        for (int i = 0; i < count; ++i) {
          const Heads& h = list[i];
          rows.x = h.x + (b * h.x_strides[0] + t * h.x_strides[2]) * size;
          rows.y = h.y + (b * h.y_strides[0] + t * h.y_strides[2]) * size;
          rows.x_step = h.x_strides[1];
          rows.y_step = h.y_strides[1];
          rows.rows = h.heads;
          kernel(params, rows);
        }
      }
    });
    return;
  }

  // Otherwise along tokens, in runs as long as parallelism allows: keeping the tables in L1 by
  // short runs across heads was 1.5 to 2.5 times slower, since it breaks the prefetchers' streams.
  int64_t block = batch * all_heads * tokens / kTasks;
  if (block < kLeastTokens) block = kLeastTokens;
  if (block > tokens) block = tokens;
  const int64_t blocks = (tokens + block - 1) / block;
  parallel_rows(batch * blocks * all_heads, block * head_dim, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t run = task / all_heads, b = run / blocks, first = run % blocks * block;
      const int64_t skip = positions ? 0 : first;
      int64_t head = task % all_heads;
      const Heads* h = list;
      for (; head >= h->heads; ++h) head -= h->heads;
      cpu::RopeRows rows{};
      rows.x =
          h->x + (b * h->x_strides[0] + head * h->x_strides[1] + first * h->x_strides[2]) * size;
      rows.y =
          h->y + (b * h->y_strides[0] + head * h->y_strides[1] + first * h->y_strides[2]) * size;
      rows.x_step = h->x_strides[2];
      rows.y_step = h->y_strides[2];
      rows.rows = first + block < tokens ? block : tokens - first;
      rows.cos = tables.cos_data + b * tables.cos_batch + skip * tables.cos_step;
      rows.sin = tables.sin_data + b * tables.sin_batch + skip * tables.sin_step;
      rows.cos_step = tables.cos_step;
      rows.sin_step = tables.sin_step;
      rows.positions = positions ? positions->at(b, first) : nullptr;
      kernel(params, rows);
    }
  });
}

Tensor rope_cpu(const Tensor& x_in, const Tensor& cos, const Tensor& sin,
                const std::optional<Tensor>& position_ids, bool interleaved, bool inverse,
                bool token_major) {
  check_heads(x_in);
  const Tensor x = last_dim_dense(x_in);
  Tensor y = output_like(x, token_major);
  const Heads heads = heads_of(x, y);
  run(x, &heads, 1, cos, sin, position_ids, interleaved, inverse);
  return y;
}

std::tuple<Tensor, Tensor> rope_qk_cpu(const Tensor& q_in, const Tensor& k_in, const Tensor& cos,
                                       const Tensor& sin, const std::optional<Tensor>& position_ids,
                                       bool interleaved, bool inverse, bool token_major) {
  check_pair(q_in, k_in);
  const Tensor q = last_dim_dense(q_in), k = last_dim_dense(k_in);
  Tensor q_out = output_like(q, token_major), k_out = output_like(k, token_major);
  const Heads heads[2] = {heads_of(q, q_out), heads_of(k, k_out)};
  run(q, heads, 2, cos, sin, position_ids, interleaved, inverse);
  return {q_out, k_out};
}

void rope_qk_in_place_cpu(Tensor q, Tensor k, const Tensor& cos, const Tensor& sin,
                          const std::optional<Tensor>& position_ids, bool interleaved,
                          bool inverse) {
  check_pair(q, k);
  check_in_place(q, k);
  const Heads heads[2] = {heads_of(q, q), heads_of(k, k)};
  run(q, heads, 2, cos, sin, position_ids, interleaved, inverse);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(llmops_cpu, m) { define(m, kRopeSchemas); }
STABLE_TORCH_LIBRARY_IMPL(llmops_cpu, CPU, m) {
  m.impl("rope", TORCH_BOX(&rope_cpu));
  m.impl("rope_qk", TORCH_BOX(&rope_qk_cpu));
  m.impl("rope_qk_", TORCH_BOX(&rope_qk_in_place_cpu));
}

}  // namespace llmops
