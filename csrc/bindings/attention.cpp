// attention: the CPU kernels as raw operators. llmops.ops.attention owns the public schema, the
// checks and autograd; what is checked here keeps memory safe whoever calls.
#include "cpu/attention.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <tuple>

#include "common.h"

namespace llmops {
namespace {

using cpu::AttentionParams;
using cpu::ScoreMask;

constexpr const char* kName = "llmops.attention";

// One block of 64-byte aligned scratch per thread, kept between calls: fresh pages would cost more
// than the work of a small call. Buffers past kKeepBytes go back after use.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : large_(bytes > kKeepBytes) {
    thread_local Buffer kept;
    if (large_) {
      own_.reserve(bytes);
      data_ = own_.data();
    } else {
      kept.reserve(bytes);
      data_ = kept.data();
    }
  }
  void* data() const { return data_; }

 private:
  static constexpr int64_t kKeepBytes = 8 << 20;
  class Buffer {
   public:
    void reserve(int64_t bytes) {
      if (bytes <= size_) return;
      storage_.reset(new char[bytes + 64]);
      size_ = bytes;
    }
    void* data() const {
      return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(storage_.get()) + 63) / 64 * 64);
    }

   private:
    std::unique_ptr<char[]> storage_;
    int64_t size_ = 0;
  };
  Buffer own_;
  bool large_;
  void* data_;
};

// [B, H, T, D] with stride 1 in the last dimension; t itself, or a copy.
Tensor heads_dense(const Tensor& t, const char* name) {
  LLMOPS_CHECK(t.dim() == 4, kName, ": ", name, " must be [batch, heads, tokens, head_dim], got ",
               t.dim(), " dimensions");
  return last_dim_dense(t);
}
void read_strides(const Tensor& t, int64_t* stride) {
  for (int64_t d = 0; d < 3; ++d) stride[d] = t.stride(d);
}

// A fresh [B, H, T, D] laid out as `like` is: [B, T, H, D] in memory where the heads of one token
// lie together, so that a model's transpose back costs nothing. The fake kernels say the same.
Tensor new_heads(const Tensor& like, int64_t dim, ScalarType type) {
  const int64_t b = like.size(0), h = like.size(1), t = like.size(2);
  if (like.stride(1) >= like.stride(2)) return new_output(like, {b, h, t, dim}, type);
  const Tensor fresh = new_output(like, {b, t, h, dim}, type);
  const int64_t sizes[] = {b, h, t, dim};
  const int64_t strides[] = {fresh.stride(0), fresh.stride(2), fresh.stride(1), 1};
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(fresh.get(), 4, sizes, strides, 0, &handle));
  return Tensor(handle);
}

int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t kSplitTasks = 64;  // tasks worth having when the queries alone give fewer
constexpr int64_t kSplitKeys = 512;  // and the fewest keys of one
constexpr int64_t kGradTasks = 8;
constexpr int64_t kGradBlocks = 4;  // query blocks that share one pair of dk, dv sums, at least

// Depends on shapes only, never on the number of threads.
void make_plan(AttentionParams& p) {
  const int64_t heads = p.heads / p.kv_heads, groups = p.batch * p.kv_heads;
  const int64_t rows = heads * p.queries;
  auto& plan = p.plan;
  // Few rows with dropout are a test or a short training sequence: the tiles serve them, and decode
  // need not know of it.
  plan.decode = rows <= cpu::kAttentionDecodeRows && !p.dropout.active;
  plan.packed = heads > 1 && p.queries < cpu::kAttentionLanes;
  plan.blocks = plan.packed ? div_up(rows, cpu::kAttentionLanes)
                            : heads * div_up(p.queries, cpu::kAttentionLanes);
  plan.first_key = 0;
  if (p.left >= 0) plan.first_key = std::clamp<int64_t>(p.keys - p.queries - p.left, 0, p.keys);
  const int64_t keys = p.keys - plan.first_key;
  plan.splits = 1;
  if (plan.blocks == 1 && groups > 0) {
    const int64_t wanted = div_up(kSplitTasks, groups), possible = keys / kSplitKeys;
    plan.splits = wanted < possible ? wanted : possible;
    if (plan.splits < 1) plan.splits = 1;
  }
  plan.split_keys = div_up(div_up(keys, plan.splits), 96) * 96;
  if (plan.split_keys > 0) plan.splits = div_up(keys, plan.split_keys);
  plan.parts = 1;
  if (groups > 0 && groups < kGradTasks) {
    const int64_t wanted = div_up(kGradTasks, groups), possible = plan.blocks / kGradBlocks;
    plan.parts = wanted < possible ? wanted : possible;
    if (plan.parts < 1) plan.parts = 1;
  }
}

// A worker takes 55-85 us to wake: about 4M multiply-adds, or 1 MB of keys and values.
bool worth_threads(const AttentionParams& p) {
  int64_t seen = p.keys;  // by one query
  if (p.left >= 0 && p.right >= 0) seen = std::min(seen, p.left + p.right + cpu::kAttentionLanes);
  const int64_t work = p.batch * p.heads * p.queries * seen * (p.dim + p.dim_v);
  const int64_t bytes = p.batch * p.kv_heads * (p.keys - p.plan.first_key) * (p.dim + p.dim_v) *
                        (p.type == cpu::DType::f32 ? 4 : 2);
  return work > 4000000 || bytes > 1000000;
}

// What happens to the scores, as it comes through the schema. A window bound of -1, a soft cap of 0
// and a dropout of 0 are none.
struct Modifiers {
  int64_t window_left, window_right;
  const std::optional<Tensor>& alibi_slopes;  // [Hq] or [B, Hq], float32
  double softcap;
  const std::optional<Tensor>& sinks;  // [Hq], float32, contiguous
  double dropout_p;
  const std::optional<Tensor>& seed;  // [1], int64
};

void read_modifiers(const Modifiers& m, bool causal, AttentionParams& p) {
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
                 kName, ": alibi_slopes must be float32 [Hq] or [B, Hq]");
    p.slopes = static_cast<const float*>(t.data_ptr());
    p.slope_stride[0] = dims == 2 ? t.stride(0) : 0;
    p.slope_stride[1] = t.stride(dims - 1);
  }
  if (m.sinks.has_value()) {
    LLMOPS_CHECK(m.sinks->scalar_type() == ScalarType::Float && m.sinks->dim() == 1 &&
                     m.sinks->size(0) == p.heads && m.sinks->is_contiguous(),
                 kName, ": sinks must be float32 [Hq], contiguous");
    p.sinks = static_cast<const float*>(m.sinks->data_ptr());
  }
  if (m.dropout_p == 0.0) return;
  LLMOPS_CHECK(m.dropout_p > 0.0 && m.dropout_p <= 1.0, kName,
               ": dropout_p must be in [0, 1], got ", m.dropout_p);
  LLMOPS_CHECK(
      m.seed.has_value() && m.seed->scalar_type() == ScalarType::Long && m.seed->numel() == 1,
      kName, ": dropout needs a seed, one int64");
  p.dropout.active = true;
  p.dropout.below = static_cast<uint32_t>(std::min(std::round(m.dropout_p * 0x1p32), 0x1p32 - 1));
  p.dropout.scale = m.dropout_p < 1.0 ? static_cast<float>(1.0 / (1.0 - m.dropout_p)) : 0.0f;
  p.dropout.seed = *static_cast<const uint64_t*>(m.seed->data_ptr());
}

// Everything but the outputs. q, k, v have a dense last dimension.
AttentionParams make_params(const Tensor& q, const Tensor& k, const Tensor& v,
                            const std::optional<Tensor>& mask, bool causal, double scale,
                            const Modifiers& modifiers) {
  AttentionParams p{};
  p.type = kernel_dtype(q.scalar_type(), kName);
  LLMOPS_CHECK(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(), kName,
               ": q, k and v must have one dtype");
  p.batch = q.size(0), p.heads = q.size(1), p.queries = q.size(2), p.dim = q.size(3);
  p.kv_heads = k.size(1), p.keys = k.size(2), p.dim_v = v.size(3);
  LLMOPS_CHECK(k.size(0) == p.batch && v.size(0) == p.batch && v.size(1) == p.kv_heads &&
                   v.size(2) == p.keys && k.size(3) == p.dim,
               kName,
               ": k and v must be [B, Hkv, Tk, D] and [B, Hkv, Tk, Dv] for q [B, Hq, Tq, D]");
  LLMOPS_CHECK(p.kv_heads > 0 ? p.heads % p.kv_heads == 0 : p.heads == 0, kName, ": ", p.heads,
               " query heads are no multiple of ", p.kv_heads, " key/value heads");
  p.scale = static_cast<float>(scale);
  read_modifiers(modifiers, causal, p);
  p.q = q.data_ptr(), p.k = k.data_ptr(), p.v = v.data_ptr();
  read_strides(q, p.q_stride);
  read_strides(k, p.k_stride);
  read_strides(v, p.v_stride);
  if (mask.has_value()) {
    const bool boolean = mask->scalar_type() == ScalarType::Bool;
    p.mask_kind = boolean ? ScoreMask::boolean : ScoreMask::additive;
    if (!boolean) p.mask_type = kernel_dtype(mask->scalar_type(), "llmops.attention: mask");
    p.mask = mask->data_ptr();
    const int64_t full[] = {p.batch, p.heads, p.queries, p.keys}, shift = 4 - mask->dim();
    LLMOPS_CHECK(shift >= 0, kName, ": mask has more than 4 dimensions");
    for (int64_t d = shift; d < 4; ++d) {
      const int64_t size = mask->size(d - shift);
      LLMOPS_CHECK(size == full[d] || size == 1, kName, ": mask size ", size, " in dimension ",
                   d - shift, " does not broadcast to ", full[d]);
      p.mask_stride[d] = size == 1 ? 0 : mask->stride(d - shift);
    }
  }
  return p;
}

std::tuple<Tensor, Tensor> attention_fwd_cpu(const Tensor& q_in, const Tensor& k_in,
                                             const Tensor& v_in, const std::optional<Tensor>& mask,
                                             bool causal, double scale, int64_t window_left,
                                             int64_t window_right,
                                             const std::optional<Tensor>& alibi_slopes,
                                             double softcap, const std::optional<Tensor>& sinks,
                                             double dropout_p, const std::optional<Tensor>& seed) {
  const Tensor q = heads_dense(q_in, "q"), k = heads_dense(k_in, "k"), v = heads_dense(v_in, "v");
  AttentionParams p =
      make_params(q, k, v, mask, causal, scale,
                  {window_left, window_right, alibi_slopes, softcap, sinks, dropout_p, seed});
  Tensor out = new_heads(q_in, p.dim_v, q.scalar_type());
  Tensor lse = new_output(q, {p.batch, p.heads, p.queries}, ScalarType::Float);
  if (lse.numel() == 0) return {out, lse};
  p.out = out.data_ptr();
  p.lse = static_cast<float*>(lse.data_ptr());
  read_strides(out, p.out_stride);
  make_plan(p);
  const int64_t groups = p.batch * p.kv_heads, rows = p.heads / p.kv_heads * p.queries;
  std::optional<Tensor> partial;
  if (p.plan.splits > 1) {
    partial = new_output(q, {groups * p.plan.splits * rows * (p.dim_v + 1)}, ScalarType::Float);
    p.partial = static_cast<float*>(partial->data_ptr());
  }
  const bool threads = worth_threads(p);
  const auto kernel =
      p.plan.decode ? LLMOPS_CPU_CALL(attention_decode) : LLMOPS_CPU_CALL(attention_fwd);
  const int64_t bytes = p.plan.decode ? LLMOPS_CPU_CALL(attention_decode_scratch)(p)
                                      : LLMOPS_CPU_CALL(attention_fwd_scratch)(p);
  parallel_tasks(groups * p.plan.blocks * p.plan.splits, threads, [&](int64_t task) {
    const Scratch scratch(bytes);
    kernel(p, task, scratch.data());
  });
  if (p.plan.splits > 1) {
    const auto combine = LLMOPS_CPU_CALL(attention_combine);
    parallel_rows(groups * rows, p.dim_v * p.plan.splits,
                  [&](int64_t begin, int64_t end) { combine(p, begin, end); });
  }
  return {out, lse};
}

// dsinks [Hq] from what each row adds, [B, Hq, Tq].
Tensor sum_rows_of_heads(const Tensor& rows) {
  const int64_t batch = rows.size(0), heads = rows.size(1), queries = rows.size(2);
  Tensor sums = new_output(rows, {heads}, ScalarType::Float);
  const float* from = static_cast<const float*>(rows.data_ptr());
  for (int64_t h = 0; h < heads; ++h) {
    double sum = 0.0;
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t t = 0; t < queries; ++t) sum += from[(b * heads + h) * queries + t];
    static_cast<float*>(sums.data_ptr())[h] = static_cast<float>(sum);
  }
  return sums;
}

std::tuple<Tensor, Tensor, Tensor, std::optional<Tensor>, std::optional<Tensor>> attention_bwd_cpu(
    const Tensor& grad_out_in, const std::optional<Tensor>& grad_lse, const Tensor& q_in,
    const Tensor& k_in, const Tensor& v_in, const std::optional<Tensor>& mask, const Tensor& out_in,
    const Tensor& lse_in, bool causal, double scale, bool need_mask_grad, int64_t window_left,
    int64_t window_right, const std::optional<Tensor>& alibi_slopes, double softcap,
    const std::optional<Tensor>& sinks, double dropout_p, const std::optional<Tensor>& seed) {
  const Tensor q = heads_dense(q_in, "q"), k = heads_dense(k_in, "k"), v = heads_dense(v_in, "v");
  const Tensor out = heads_dense(out_in, "out"), grad_out = heads_dense(grad_out_in, "grad_out");
  const Tensor lse = lse_in.is_contiguous() ? lse_in : torch::stable::contiguous(lse_in);
  cpu::AttentionGradParams g{};
  AttentionParams& p = g.fwd;
  p = make_params(q, k, v, mask, causal, scale,
                  {window_left, window_right, alibi_slopes, softcap, sinks, dropout_p, seed});
  const std::vector<int64_t> out_shape = {p.batch, p.heads, p.queries, p.dim_v};
  LLMOPS_CHECK(shape_of(out) == out_shape && shape_of(grad_out) == out_shape &&
                   out.scalar_type() == q.scalar_type() &&
                   grad_out.scalar_type() == q.scalar_type(),
               kName, ": out and grad_out must be [B, Hq, Tq, Dv] in q's dtype");
  const std::vector<int64_t> lse_shape = {p.batch, p.heads, p.queries};
  LLMOPS_CHECK(shape_of(lse) == lse_shape && lse.scalar_type() == ScalarType::Float, kName,
               ": lse must be float32 [B, Hq, Tq]");
  p.out = out.data_ptr();
  p.lse = static_cast<float*>(lse.data_ptr());
  read_strides(out, p.out_stride);
  g.grad_out = grad_out.data_ptr();
  read_strides(grad_out, g.grad_out_stride);
  if (grad_lse.has_value()) {
    LLMOPS_CHECK(shape_of(*grad_lse) == lse_shape && grad_lse->scalar_type() == ScalarType::Float,
                 kName, ": grad_lse must be float32 [B, Hq, Tq]");
    g.grad_lse = static_cast<const float*>(grad_lse->data_ptr());
    read_strides(*grad_lse, g.grad_lse_stride);
  }
  Tensor dq = new_heads(q_in, p.dim, q.scalar_type());
  Tensor dk = new_heads(k_in, p.dim, q.scalar_type());
  Tensor dv = new_heads(v_in, p.dim_v, q.scalar_type());
  g.dq = dq.data_ptr(), g.dk = dk.data_ptr(), g.dv = dv.data_ptr();
  read_strides(dq, g.dq_stride);
  read_strides(dk, g.dk_stride);
  read_strides(dv, g.dv_stride);

  const int64_t groups = p.batch * p.kv_heads;
  const bool threads = worth_threads(p);
  if (p.queries > 0 && groups > 0) {
    make_plan(p);
  } else {
    p.plan = {false, false, 0, 1, 0, p.keys, 1};  // no queries: dk and dv are zeros
  }
  std::optional<Tensor> partial;
  if (p.plan.parts > 1) {
    const int64_t width = LLMOPS_CPU_CALL(attention_bwd_width)(p);
    partial = new_output(q, {groups * p.plan.parts * p.keys * width}, ScalarType::Float);
    g.partial = static_cast<float*>(partial->data_ptr());
  }
  std::optional<Tensor> dsink;
  if (p.sinks) {
    dsink = new_output(q, lse_shape, ScalarType::Float);
    g.dsink = static_cast<float*>(dsink->data_ptr());
  }
  const auto kernel = LLMOPS_CPU_CALL(attention_bwd);
  const int64_t bytes = LLMOPS_CPU_CALL(attention_bwd_scratch)(g);
  parallel_tasks(groups * p.plan.parts, threads, [&](int64_t task) {
    const Scratch scratch(bytes);
    kernel(g, task, scratch.data());
  });
  if (p.plan.parts > 1) {
    const auto combine = LLMOPS_CPU_CALL(attention_bwd_combine);
    parallel_rows(groups * p.keys, (p.dim + p.dim_v) * p.plan.parts,
                  [&](int64_t begin, int64_t end) { combine(g, begin, end); });
  }
  if (dsink.has_value()) dsink = sum_rows_of_heads(*dsink);
  if (!need_mask_grad) return {dq, dk, dv, std::nullopt, dsink};

  LLMOPS_CHECK(p.mask_kind == ScoreMask::additive, kName,
               ": only a floating-point mask has a gradient");
  Tensor dmask = new_output(q, shape_of(*mask), ScalarType::Float);
  if (dmask.numel() == 0) return {dq, dk, dv, dmask, dsink};
  const int64_t shift = 4 - mask->dim();
  for (int64_t d = 0; d < 4; ++d) {
    g.dmask_size[d] = d < shift ? 1 : mask->size(d - shift);
    g.dmask_stride[d] = d < shift ? 0 : dmask.stride(d - shift);
  }
  g.dmask = static_cast<float*>(dmask.data_ptr());
  const auto mask_kernel = LLMOPS_CPU_CALL(attention_dmask);
  const int64_t mask_bytes = LLMOPS_CPU_CALL(attention_dmask_scratch)(g);
  parallel_tasks(LLMOPS_CPU_CALL(attention_dmask_tasks)(g), threads, [&](int64_t task) {
    const Scratch scratch(mask_bytes);
    mask_kernel(g, task, scratch.data());
  });
  return {dq, dk, dv, dmask, dsink};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(llmops_cpu, m) {
  m.def(
      "attention_fwd(Tensor q, Tensor k, Tensor v, Tensor? mask, bool causal, float scale, "
      "int window_left=-1, int window_right=-1, Tensor? alibi_slopes=None, float softcap=0.0, "
      "Tensor? sinks=None, float dropout_p=0.0, Tensor? seed=None) -> (Tensor, Tensor)");
  // dmask is float32, whatever the mask is; dsinks too.
  m.def(
      "attention_bwd(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor? "
      "mask, "
      "Tensor out, Tensor lse, bool causal, float scale, bool need_mask_grad, "
      "int window_left=-1, int window_right=-1, Tensor? alibi_slopes=None, float softcap=0.0, "
      "Tensor? sinks=None, float dropout_p=0.0, Tensor? seed=None) -> "
      "(Tensor, Tensor, Tensor, Tensor?, Tensor?)");
}
STABLE_TORCH_LIBRARY_IMPL(llmops_cpu, CPU, m) {
  m.impl("attention_fwd", TORCH_BOX(&attention_fwd_cpu));
  m.impl("attention_bwd", TORCH_BOX(&attention_bwd_cpu));
}

}  // namespace llmops
