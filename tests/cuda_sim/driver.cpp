// The kernels of csrc/cuda without Python or torch, for sanitizers and mutations: small calls that
// reach every barrier, with a line per call: its name and a hash of what it wrote. Same bits under
// every schedule, so that a line that differs from another run's is a fault.
//
//     driver <seed> [file: softmax, norm, ...]
#include <cstdio>
#include <string>

#include "activation.h"
#include "attention.h"
#include "attention_bwd.h"
#include "cross_entropy.h"
#include "driver_call.h"
#include "norm.h"
#include "rope.h"
#include "scheduler.h"
#include "softmax.h"

using namespace llmops::cuda;

namespace {

const Rows kNo;

std::string named(const char* what, int64_t n) {
  return what + std::string("-") + std::to_string(n);
}

void softmax() {
  for (int64_t n : {40, 601, 3000, 9000, 17001}) {
    const cuda_sim::Session session;
    Call call(named("softmax_fwd", n));
    SoftmaxForward p{};
    p.rows = 3, p.n = n, p.scale = 0.7f;
    p.x = call.rows(3, n, kF32), p.y = call.rows(3, n, kBf16, true);
    p.mask = n % 2 ? call.rows(1, n, kBf16) : kNo;
    p.mask.stride_a = 0;
    p.causal = n % 2;
    p.queries = Divisor(3);
    p.wide = p.x.wide(n) && p.y.wide(n);
    softmax_fwd(p, nullptr);
  }
  for (int64_t n : {40, 601, 3000, 17001}) {
    const cuda_sim::Session session;
    Call call(named("softmax_bwd", n));
    SoftmaxBackward p{};
    p.rows = 3, p.n = n, p.scale = 0.7f;
    p.dy = call.rows(3, n, kBf16), p.y = call.rows(3, n, kBf16), p.dx = call.rows(3, n, kF32, true);
    p.wide = p.y.wide(n) && p.dx.wide(n);
    softmax_bwd(p, nullptr);
  }
}

void norm() {
  for (int64_t n : {40, 601, 3000, 9000, 9001}) {
    const cuda_sim::Session session;
    Call call(named("norm_fwd", n));
    NormForward p{};
    p.rows = 3, p.n = n, p.eps = 1e-5f, p.centered = n != 3000;
    p.x = call.rows(3, n, kBf16), p.residual = call.rows(3, n, kF32);
    p.y = call.rows(3, n, kBf16, true), p.h = call.rows(3, n, kF32, true);
    p.weight = call.rows(1, n, kF32), p.bias = n % 2 ? call.rows(1, n, kBf16) : kNo;
    p.wide = p.x.wide(n) && p.h.wide(n);
    norm_fwd(p, nullptr);
  }
}
void norm_bwd() {
  for (int64_t n : {40, 601, 3000, 5000, 9000, 9001}) {
    const cuda_sim::Session session;
    Call call(named("norm_bwd", n));
    NormBackward p{};
    p.rows = 19, p.n = n, p.eps = 1e-5f, p.centered = n != 3000;
    p.dy = call.rows(19, n, kBf16), p.h = call.rows(19, n, kF32);
    p.dh_in = n % 2 ? call.rows(19, n, kF32) : kNo;
    p.dh = call.rows(19, n, kF32, true), p.dx = n % 2 ? call.rows(19, n, kBf16, true) : kNo;
    p.weight = call.rows(1, n, kF32);
    p.dweight = call.rows(1, n, kF32, true), p.dbias = call.rows(1, n, kBf16, true);
    p.wide = p.dy.wide(n) && p.h.wide(n);
    const int64_t sums = norm_bwd_programs(p) * n;
    p.weight_sums = call.floats(sums), p.bias_sums = call.floats(sums);
    llmops::cuda::norm_bwd(p, nullptr);
  }
}

void activation() {
  for (int64_t n : {40, 601, 5000}) {
    const cuda_sim::Session session;
    Call call(named("activation", n));
    ActivationForward f{};
    f.rows = 5, f.n = n, f.activation = static_cast<int>(n % 3);
    f.gate = call.rows(5, n, kBf16), f.up = call.rows(5, n, kBf16);
    f.y = call.rows(5, n, kBf16, true);
    f.wide = f.gate.wide(n);
    activation_fwd(f, nullptr);
    ActivationBackward b{};
    b.rows = 5, b.n = n, b.activation = f.activation, b.gate = f.gate, b.up = f.up, b.wide = f.wide;
    b.dy = call.rows(5, n, kBf16);
    b.dgate = call.rows(5, n, kBf16, true), b.dup = call.rows(5, n, kBf16, true);
    activation_bwd(b, nullptr);
  }
}

void rope() {
  for (int64_t half : {6, 16}) {
    const cuda_sim::Session session;
    Call call(named("rope", half));
    const int64_t tokens = 5, heads = 3, dim = 2 * half + 8;
    Rope p{};
    p.type = kBf16, p.batch = 2, p.tokens = tokens, p.of_tokens = Divisor(tokens), p.half = half,
    p.dim = dim;
    const auto whole = [&](int64_t h) {
      return RopeHeads{call.rows(2 * h * tokens, dim, kBf16).data,
                       call.rows(2 * h * tokens, dim, kBf16, true).data,
                       h,
                       {h * tokens * dim, tokens * dim, dim},
                       {h * tokens * dim, tokens * dim, dim}};
    };
    p.q = whole(heads), p.k = whole(1);
    p.cos = call.floats(tokens * half), p.sin = call.floats(tokens * half);
    p.cos_row = p.sin_row = half, p.table_rows = tokens;
    p.interleaved = half == 16;
    p.wide = half == 16;
    rope(p, nullptr);
  }
}

void cross_entropy() {
  for (int64_t n : {50, 3000, 9001}) {
    const cuda_sim::Session session;
    Call call(named("cross_entropy", n));
    const int64_t rows = 6;
    CrossEntropyForward f{};
    CrossEntropy& p = f.of;
    p.rows = rows, p.n = n, p.ignore_index = -100, p.smoothing = 0.1,
    p.uniform = 0.1 / static_cast<double>(n), p.z_loss = 0.01;
    p.reduction = n == 50 ? kNone : kMean;
    p.x = call.rows(rows, n, kBf16), p.wide = p.x.wide(n);
    auto* target = static_cast<int64_t*>(call.memory(rows * 8));
    for (int64_t r = 0; r < rows; ++r) target[r] = r == 2 ? -100 : r * n / rows;
    p.target = target, p.target_64 = true;
    p.weight = call.floats(n);
    p.lse = static_cast<double*>(call.written(rows * 8));
    f.losses = static_cast<double*>(call.memory(rows * 8));
    f.loss = call.rows(1, p.reduction == kNone ? rows : 1, kF32, true);
    cross_entropy_fwd(f, nullptr);
    CrossEntropyBackward b{};
    b.of = p;
    b.grad = call.rows(1, rows, kF32);
    b.scales = static_cast<double*>(call.memory(24));
    b.dx = call.rows(rows, n, kBf16, true);
    cross_entropy_bwd(b, nullptr);
  }
}

// q [heads, queries, dim] and k, v [heads / 2, keys, dim] of one batch item; not finite nowhere,
// and lse as a forward would not leave it: what comes out is only to be the same in every run.
void attention_bwd(int64_t queries, int64_t keys, int64_t dim, bool modified) {
  const cuda_sim::Session session;
  Call call(named("attention_bwd", dim) + (modified ? "-modified" : ""));
  const int64_t heads = 2;
  AttentionBackward b{};
  Attention& p = b.of;
  p.type = kBf16, p.scale = 0.2f, p.left = -1, p.right = modified ? -1 : 0;
  p.batch = 1, p.heads = heads, p.kv_heads = 1, p.queries = queries, p.keys = keys;
  p.dim = p.dim_v = dim;
  const auto set = [&](const void** data, int64_t (&stride)[3], int64_t h, int64_t tokens) {
    *data = call.rows(h * tokens, dim, kBf16).data;
    stride[0] = h * tokens * dim, stride[1] = tokens * dim, stride[2] = dim;
  };
  set(&p.q, p.q_stride, heads, queries);
  set(&p.k, p.k_stride, 1, keys);
  set(&p.v, p.v_stride, 1, keys);
  set(&b.grad_out, b.grad_out_stride, heads, queries);
  const void* out;
  set(&out, p.out_stride, heads, queries);
  p.out = const_cast<void*>(out);
  p.wide_q = p.wide_out = b.wide_grad = b.wide_k = b.wide_v = dim % 8 == 0;
  const int64_t rows = heads * queries;
  p.lse = call.floats(rows), b.grad_lse = call.floats(rows);
  b.grad_lse_stride[1] = queries, b.grad_lse_stride[2] = 1;
  b.row_lse = call.floats(rows), b.row_delta = call.floats(rows);
  if (modified) {
    b.row_norm = call.floats(rows), b.row_sink = call.floats(rows);
    p.sinks = call.floats(heads), b.dsinks = call.floats(heads, true);
    p.softcap = 2.0f;
    p.mask = call.rows(queries, keys, kBf16);
    p.mask_stride[2] = keys, p.mask_stride[3] = 1;
    b.dmask_size[0] = b.dmask_size[1] = 1, b.dmask_size[2] = queries, b.dmask_size[3] = keys;
    b.dmask = call.floats(queries * keys, true);
  }
  b.dq = call.written(rows * dim * 2);
  b.dk = call.written(keys * dim * 2), b.dv = call.written(keys * dim * 2);
  for (int d = 0; d < 3; ++d) {
    b.dq_stride[d] = p.q_stride[d];
    b.dk_stride[d] = p.k_stride[d], b.dv_stride[d] = p.v_stride[d];
  }
  llmops::cuda::attention_bwd(b, nullptr);
}
// Two tiles and more of either kind, those of one stage with D 256, those that are not wide.
void attention_bwd() {
  attention_bwd(140, 70, 16, false);
  attention_bwd(70, 140, 20, false);
  attention_bwd(70, 70, 136, false);
  attention_bwd(70, 70, 16, true);
}

// Causal, two heads that share keys and values.
void attend(const char* name, int64_t queries, int64_t keys, int64_t dim, bool softcap) {
  const cuda_sim::Session session;
  Call call(named(name, keys));
  Attention p{};
  p.type = kBf16, p.scale = 0.3f, p.left = -1, p.right = 0;
  p.batch = 1, p.heads = 2, p.kv_heads = 1, p.queries = queries, p.keys = keys;
  p.dim = p.dim_v = dim;
  p.softcap = softcap ? 1.5f : 0.0f;
  const auto dense = [&](int64_t heads, int64_t tokens, int64_t* stride, bool output = false) {
    stride[0] = heads * tokens * dim, stride[1] = tokens * dim, stride[2] = dim;
    return call.rows(heads * tokens, dim, kBf16, output).data;
  };
  p.q = dense(2, queries, p.q_stride);
  p.k = dense(1, keys, p.k_stride), p.v = dense(1, keys, p.v_stride);
  p.out = dense(2, queries, p.out_stride, true);
  p.lse = call.floats(2 * queries, true);
  p.wide_q = p.wide_out = dim % 8 == 0;
  p.wide_kv = p.wide_q && queries != 5;
  plan_attention(p);
  if (p.splits > 1) {
    p.partial_out = call.floats(p.splits * 2 * queries * dim);
    p.partial_lse = call.floats(p.splits * 2 * queries);
  }
  attention_fwd(p, nullptr);
}
void attention() {
  attend("attention", 80, 140, 64, false);
  attend("attention", 40, 100, 80, true);
  attend("attention", 40, 70, 20, false);
}
void attention_decode() {
  attend("attention_decode", 2, 150, 64, false);
  attend("attention_decode", 5, 90, 40, true);
  attend("attention_decode", 1, 600, 64, false);  // split
  attend("attention_decode", 1, 90, 136, false);
}

struct Named {
  const char* file;
  void (*run)();
};
const Named kFiles[] = {{"softmax", softmax},
                        {"norm", norm},
                        {"norm_bwd", norm_bwd},
                        {"activation", activation},
                        {"attention_bwd", attention_bwd},
                        {"attention_bwd_dkdv", attention_bwd},
                        {"attention_bwd_dq", attention_bwd},
                        {"attention_dmask", attention_bwd},
                        {"rope", rope},
                        {"attention", attention},
                        {"attention_decode", attention_decode},
                        {"cross_entropy", cross_entropy}};

}  // namespace

int main(int count, char** arguments) {
  const auto seed = static_cast<uint32_t>(count > 1 ? std::stoul(arguments[1]) : 1);
  cuda_sim::schedule() = {2, seed};
  bool known = false;
  try {
    for (const Named& one : kFiles)
      if (count < 3 || std::string(arguments[2]) == one.file) known = true, one.run();
  } catch (const cuda_sim::Fault& fault) {
    printf("fault: %s\n", fault.what());
    return 1;
  }
  if (!known) printf("no calls of %s here\n", arguments[2]);
  return known ? 0 : 2;
}
