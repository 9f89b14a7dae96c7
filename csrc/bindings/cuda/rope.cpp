// rope: the CUDA kernel as raw operators, with the signatures of the CPU's.
#include "cuda/rope.h"

#include "../rope.h"
#include "common.h"

namespace llmops {
namespace {

cuda::RopeHeads heads_of(Launcher& launcher, const Tensor& x, const Tensor& y) {
  return {launcher.data(x),
          launcher.data(y),
          x.size(1),
          {x.stride(0), x.stride(1), x.stride(2)},
          {y.stride(0), y.stride(1), y.stride(2)}};
}

bool wide(const cuda::RopeHeads& h, int64_t size) {
  bool fits =
      reinterpret_cast<uintptr_t>(h.x) % 16 == 0 && reinterpret_cast<uintptr_t>(h.y) % 16 == 0;
  for (int d = 0; d < 3; ++d)
    fits = fits && h.x_strides[d] * size % 16 == 0 && h.y_strides[d] * size % 16 == 0;
  return fits || h.heads == 0;
}

// Into p: cos and sin [N, R/2], or gathered [B, T, R/2].
void set_tables(cuda::Rope& p, Launcher& launcher, const Tensor& cos, const Tensor& sin,
                bool by_position) {
  const int64_t dims = cos.dim();
  LLMOPS_CHECK((dims == 2 || dims == 3) && same_shape(cos, sin), kRopeName,
               ": cos and sin must both be [N, R/2] or both [B, T, R/2]");
  LLMOPS_CHECK(cos.scalar_type() == ScalarType::Float && sin.scalar_type() == ScalarType::Float,
               kRopeName, ": cos and sin must be float32");
  p.half = cos.size(dims - 1);
  LLMOPS_CHECK(2 * p.half <= p.dim, kRopeName, ": cos and sin rotate ", 2 * p.half,
               " elements, but the head dim is ", p.dim);
  if (dims == 3) {
    LLMOPS_CHECK(!by_position, kRopeName,
                 ": position_ids does not go with gathered cos and sin [B, T, R/2]");
    LLMOPS_CHECK((cos.size(0) == 1 || cos.size(0) == p.batch) && cos.size(1) == p.tokens, kRopeName,
                 ": gathered cos and sin must be [B, T, R/2] with B ", p.batch, " and T ",
                 p.tokens);
  } else {
    LLMOPS_CHECK(by_position || cos.size(0) >= p.tokens, kRopeName, ": ", p.tokens,
                 " tokens need as many rows of cos and sin, got ", cos.size(0));
  }
  const bool per_batch = dims == 3 && cos.size(0) != 1;
  p.table_rows = cos.size(dims - 2);
  p.cos = static_cast<const float*>(launcher.data(cos));
  p.sin = static_cast<const float*>(launcher.data(sin));
  p.cos_batch = per_batch ? cos.stride(0) : 0;
  p.sin_batch = per_batch ? sin.stride(0) : 0;
  p.cos_row = cos.stride(dims - 2);
  p.sin_row = sin.stride(dims - 2);
}

void run(const Tensor& q, const Tensor& q_out, const Tensor* k, const Tensor* k_out,
         const Tensor& cos_in, const Tensor& sin_in, const std::optional<Tensor>& ids,
         bool interleaved, bool inverse, bool in_place) {
  Launcher launcher(q, kRopeName);
  cuda::Rope p{};
  p.type = static_cast<int>(kernel_dtype(q.scalar_type(), kRopeName));
  p.batch = q.size(0);
  p.tokens = q.size(2);
  p.of_tokens = cuda::Divisor(p.tokens > 0 ? p.tokens : 1);
  p.dim = q.size(3);
  p.interleaved = interleaved;
  p.inverse = inverse;
  p.in_place = in_place;
  const Tensor cos = last_dim_dense(cos_in), sin = last_dim_dense(sin_in);
  set_tables(p, launcher, cos, sin, ids.has_value());
  if (ids.has_value()) {
    const int64_t dims = ids->dim(), rows = dims == 2 ? ids->size(0) : 1;
    LLMOPS_CHECK((dims == 1 || dims == 2) && ids->size(dims - 1) == p.tokens &&
                     (rows == 1 || rows == p.batch),
                 kRopeName, ": position_ids must be [T] or [B, T] with B ", p.batch, " and T ",
                 p.tokens);
    LLMOPS_CHECK(ids->scalar_type() == ScalarType::Long || ids->scalar_type() == ScalarType::Int,
                 kRopeName, ": position_ids must be int64 or int32");
    p.ids = launcher.data(*ids);
    p.ids_64 = ids->scalar_type() == ScalarType::Long;
    p.ids_batch = rows > 1 ? ids->stride(0) : 0;
    p.ids_token = ids->stride(dims - 1);
  }
  p.q = heads_of(launcher, q, q_out);
  if (k) p.k = heads_of(launcher, *k, *k_out);
  LLMOPS_CHECK((p.q.heads + p.k.heads) * p.dim < 1LL << 31, kRopeName,
               ": the heads of one token hold 2^31 elements or more; use backend=\"triton\"");
  const int64_t size = element_size(q.scalar_type());
  const auto table = [](const float* data, int64_t batch, int64_t row) {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && batch % 4 == 0 && row % 4 == 0;
  };
  p.wide = p.half % 8 == 0 && wide(p.q, size) && wide(p.k, size) &&
           table(p.cos, p.cos_batch, p.cos_row) && table(p.sin, p.sin_batch, p.sin_row);
  launcher.check(cuda::rope(p, launcher.stream()));
}

Tensor rope_cuda(const Tensor& x_in, const Tensor& cos, const Tensor& sin,
                 const std::optional<Tensor>& ids, bool interleaved, bool inverse,
                 bool token_major) {
  check_heads(x_in);
  const Tensor x = last_dim_dense(x_in), y = output_like(x, token_major);
  run(x, y, nullptr, nullptr, cos, sin, ids, interleaved, inverse, false);
  return y;
}

std::tuple<Tensor, Tensor> rope_qk_cuda(const Tensor& q_in, const Tensor& k_in, const Tensor& cos,
                                        const Tensor& sin, const std::optional<Tensor>& ids,
                                        bool interleaved, bool inverse, bool token_major) {
  check_pair(q_in, k_in);
  const Tensor q = last_dim_dense(q_in), k = last_dim_dense(k_in);
  const Tensor q_out = output_like(q, token_major), k_out = output_like(k, token_major);
  run(q, q_out, &k, &k_out, cos, sin, ids, interleaved, inverse, false);
  return {q_out, k_out};
}

void rope_qk_in_place_cuda(Tensor q, Tensor k, const Tensor& cos, const Tensor& sin,
                           const std::optional<Tensor>& ids, bool interleaved, bool inverse) {
  check_pair(q, k);
  check_in_place(q, k);
  run(q, q, &k, &k, cos, sin, ids, interleaved, inverse, true);
}

}  // namespace

LLMOPS_CUDA_SCHEMAS(m) { define(m, kRopeSchemas); }
LLMOPS_CUDA_KERNELS(m) {
  m.impl("rope", TORCH_BOX(&rope_cuda));
  m.impl("rope_qk", TORCH_BOX(&rope_qk_cuda));
  m.impl("rope_qk_", TORCH_BOX(&rope_qk_in_place_cuda));
}

}  // namespace llmops
