// What the bindings of attention share between CPU and CUDA: checks that keep memory safe, how
// outputs are laid out, and the arguments in the form kernels take. A kernel's parameters,
// whichever they are, name their members as cpu::AttentionParams does.
#pragma once
#include <algorithm>
#include <cmath>
#include <initializer_list>

#include "common.h"

namespace llmops {

constexpr const char* kAttentionName = "llmops.attention";

// What happens to the scores, as it comes through the schema. A window bound of -1, a soft cap of 0
// and a dropout of 0 are none.
struct AttentionModifiers {
  int64_t window_left, window_right;
  const std::optional<Tensor>& alibi_slopes;  // [Hq] or [B, Hq], float32
  double softcap;
  const std::optional<Tensor>& sinks;  // [Hq], float32, contiguous
  double dropout_p;
  const std::optional<Tensor>& seed;  // [1], int64
};

// [B, H, T, D] with stride 1 in the last dimension; t itself, or a copy.
inline Tensor heads_dense(const Tensor& t, const char* name) {
  LLMOPS_CHECK(t.dim() == 4, kAttentionName, ": ", name,
               " must be [batch, heads, tokens, head_dim], got ", t.dim(), " dimensions");
  return last_dim_dense(t);
}
inline void read_strides(const Tensor& t, int64_t* stride) {
  for (int64_t d = 0; d < 3; ++d) stride[d] = t.stride(d);
}

// t's memory with other sizes and strides: half a microsecond, where the stable ABI's transpose and
// unsqueeze are one each.
inline Tensor viewed(const Tensor& t, std::initializer_list<int64_t> sizes,
                     std::initializer_list<int64_t> strides) {
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(
      t.get(), static_cast<int64_t>(sizes.size()), sizes.begin(), strides.begin(), 0, &handle));
  return Tensor(handle);
}

// A fresh [B, H, T, D] laid out as `like` is: [B, T, H, D] in memory where the heads of one token
// lie together, so that a model's transpose back costs nothing. The fake kernels say the same.
inline Tensor new_heads(const Tensor& like, int64_t dim, ScalarType type) {
  const int64_t b = like.size(0), h = like.size(1), t = like.size(2);
  if (like.stride(1) >= like.stride(2)) return new_output(like, {b, h, t, dim}, type);
  const Tensor fresh = new_output(like, {b, t, h, dim}, type);
  return viewed(fresh, {b, h, t, dim}, {fresh.stride(0), fresh.stride(2), fresh.stride(1), 1});
}

// Sizes and strides of q, k and v, which have a dense last dimension. Of a paged cache, k and v
// hold blocks, not batch items.
template <class Params>
void read_heads(const Tensor& q, const Tensor& k, const Tensor& v, double scale, bool paged,
                Params& p) {
  LLMOPS_CHECK(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(),
               kAttentionName, ": q, k and v must have one dtype");
  p.batch = q.size(0), p.heads = q.size(1), p.queries = q.size(2), p.dim = q.size(3);
  p.kv_heads = k.size(1), p.keys = k.size(2), p.dim_v = v.size(3);
  LLMOPS_CHECK((paged || k.size(0) == p.batch) && v.size(0) == k.size(0) &&
                   v.size(1) == p.kv_heads && v.size(2) == p.keys && k.size(3) == p.dim,
               kAttentionName,
               ": k and v must be [B, Hkv, Tk, D] and [B, Hkv, Tk, Dv] for q [B, Hq, Tq, D]");
  LLMOPS_CHECK(p.kv_heads > 0 ? p.heads % p.kv_heads == 0 : p.heads == 0, kAttentionName, ": ",
               p.heads, " query heads are no multiple of ", p.kv_heads, " key/value heads");
  p.scale = static_cast<float>(scale);
  read_strides(q, p.q_stride);
  read_strides(k, p.k_stride);
  read_strides(v, p.v_stride);
}

// Bounds, soft cap, dropout's threshold and factor, strides of the slopes. Pointers are the
// caller's.
template <class Params>
void read_modifiers(const AttentionModifiers& m, bool causal, Params& p) {
  // Bounds as wide as all there is are none; this also keeps sums with them far from overflow.
  const int64_t all = p.queries + p.keys;
  p.left = m.window_left < all ? std::max<int64_t>(m.window_left, -1) : -1;
  p.right = m.window_right < all ? std::max<int64_t>(m.window_right, -1) : -1;
  if (causal) p.right = 0;
  p.softcap = static_cast<float>(m.softcap);
  if (m.alibi_slopes.has_value()) {
    const Tensor& t = *m.alibi_slopes;
    const int64_t dims = t.dim();
    LLMOPS_CHECK(t.scalar_type() == ScalarType::Float && (dims == 1 || dims == 2) &&
                     t.size(dims - 1) == p.heads && (dims == 1 || t.size(0) == p.batch),
                 kAttentionName, ": alibi_slopes must be float32 [Hq] or [B, Hq]");
    p.slope_stride[0] = dims == 2 ? t.stride(0) : 0;
    p.slope_stride[1] = t.stride(dims - 1);
  }
  if (m.sinks.has_value()) {
    LLMOPS_CHECK(m.sinks->scalar_type() == ScalarType::Float && m.sinks->dim() == 1 &&
                     m.sinks->size(0) == p.heads && m.sinks->is_contiguous(),
                 kAttentionName, ": sinks must be float32 [Hq], contiguous");
  }
  if (m.dropout_p == 0.0) return;
  LLMOPS_CHECK(m.dropout_p > 0.0 && m.dropout_p <= 1.0, kAttentionName,
               ": dropout_p must be in [0, 1], got ", m.dropout_p);
  LLMOPS_CHECK(
      m.seed.has_value() && m.seed->scalar_type() == ScalarType::Long && m.seed->numel() == 1,
      kAttentionName, ": dropout needs a seed, one int64");
  p.dropout.active = true;
  p.dropout.below = static_cast<uint32_t>(std::min(std::round(m.dropout_p * 0x1p32), 0x1p32 - 1));
  p.dropout.scale = m.dropout_p < 1.0 ? static_cast<float>(1.0 / (1.0 - m.dropout_p)) : 0.0f;
}

// Strides of a mask that broadcasts to [B, Hq, Tq, Tk].
template <class Params>
void read_mask(const Tensor& mask, Params& p) {
  const int64_t full[] = {p.batch, p.heads, p.queries, p.keys}, shift = 4 - mask.dim();
  LLMOPS_CHECK(shift >= 0, kAttentionName, ": mask has more than 4 dimensions");
  for (int64_t d = shift; d < 4; ++d) {
    const int64_t size = mask.size(d - shift);
    LLMOPS_CHECK(size == full[d] || size == 1, kAttentionName, ": mask size ", size,
                 " in dimension ", d - shift, " does not broadcast to ", full[d]);
    p.mask_stride[d] = size == 1 ? 0 : mask.stride(d - shift);
  }
}

}  // namespace llmops
