// attention_varlen: the attention kernels over packed sequences [total, H, D]. llmops.ops owns the
// public schema, the checks and autograd; what is checked here keeps memory safe whoever calls.
#include "attention.h"
#include "attention_checks.h"
#include "sequences.h"

namespace llmops {
namespace {

constexpr const char* kName = "llmops.attention_varlen";

// [total, H, D] as [1, H, total, D], and back.
Tensor as_heads(const Tensor& t, const char* name) {
  LLMOPS_CHECK(t.dim() == 3, kName, ": ", name, " must be [total, heads, head_dim], got ", t.dim(),
               " dimensions");
  return viewed(t, {1, t.size(1), t.size(0), t.size(2)},
                {t.size(0) * t.stride(0), t.stride(1), t.stride(0), t.stride(2)});
}
Tensor as_packed(const Tensor& t) {
  return viewed(t, {t.size(2), t.size(1), t.size(3)}, {t.stride(2), t.stride(1), t.stride(3)});
}

// Where each sequence begins, and where the last one ends.
std::vector<int64_t> read_bounds(const Tensor& bounds, int64_t rows, int64_t longest,
                                 const char* side) {
  const char* argument = *side == 'q' ? "cu_seqlens_q" : "cu_seqlens_k";
  LLMOPS_CHECK(bounds.dim() == 1 && bounds.size(0) > 0, kName, ": ", argument, " must be [B + 1]");
  const auto found = read_integers(bounds, bounds.size(0), kName, argument);
  if (found.front() != 0 || found.back() != rows)
    throw_value_error(kName, ": ", argument, " must run from 0 to ", rows, ", the rows of ", side,
                      "; got ", found.front(), " to ", found.back());
  for (size_t b = 0; b + 1 < found.size(); ++b) {
    const int64_t length = found[b + 1] - found[b];
    if (length < 0)
      throw_value_error(kName, ": ", argument, " must not decrease; got ", found[b], ", ",
                        found[b + 1], " at index ", b);
    if (length > longest)
      throw_value_error(kName, ": max_seqlen_", side, " is ", longest, ", but sequence ", b,
                        " has ", length, " rows; pass the largest length");
  }
  return found;
}

UnequalSequences read_sequences(const Tensor& q, const Tensor& k, const Tensor& cu_seqlens_q,
                                const Tensor& cu_seqlens_k, int64_t max_q, int64_t max_k) {
  const auto q_at = read_bounds(cu_seqlens_q, q.size(0), max_q, "q");
  const auto k_at = read_bounds(cu_seqlens_k, k.size(0), max_k, "k");
  LLMOPS_CHECK(q_at.size() == k_at.size(), kName, ": cu_seqlens_q and cu_seqlens_k must have one ",
               "length");
  UnequalSequences unequal{};
  unequal.packed = true;
  for (size_t b = 0; b + 1 < q_at.size(); ++b)
    unequal.sequences.push_back(
        {q_at[b], q_at[b + 1] - q_at[b], k_at[b], k_at[b + 1] - k_at[b], nullptr, {}, 0});
  return unequal;
}

std::tuple<Tensor, Tensor> attention_varlen_fwd_cpu(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q,
    const Tensor& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k, bool causal,
    double scale, int64_t window_left, int64_t window_right,
    const std::optional<Tensor>& alibi_slopes, double softcap, const std::optional<Tensor>& sinks,
    double dropout_p, const std::optional<Tensor>& seed) {
  const Tensor q4 = as_heads(q, "q"), k4 = as_heads(k, "k"), v4 = as_heads(v, "v");
  UnequalSequences unequal =
      read_sequences(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k);
  const auto [out, lse] = attention_forward(
      q4, k4, v4, std::nullopt, causal, scale,
      {window_left, window_right, alibi_slopes, softcap, sinks, dropout_p, seed}, &unequal);
  return {as_packed(out), viewed(lse, {lse.size(1), lse.size(2)}, {lse.stride(1), lse.stride(2)})};
}

std::tuple<Tensor, Tensor, Tensor, std::optional<Tensor>> attention_varlen_bwd_cpu(
    const Tensor& grad_out, const std::optional<Tensor>& grad_lse, const Tensor& q, const Tensor& k,
    const Tensor& v, const Tensor& out, const Tensor& lse, const Tensor& cu_seqlens_q,
    const Tensor& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k, bool causal,
    double scale, int64_t window_left, int64_t window_right,
    const std::optional<Tensor>& alibi_slopes, double softcap, const std::optional<Tensor>& sinks,
    double dropout_p, const std::optional<Tensor>& seed) {
  const Tensor q4 = as_heads(q, "q"), k4 = as_heads(k, "k"), v4 = as_heads(v, "v");
  UnequalSequences unequal =
      read_sequences(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k);
  std::optional<Tensor> grad_lse3;
  if (grad_lse.has_value()) grad_lse3 = torch::stable::unsqueeze(*grad_lse, 0);
  const auto [dq, dk, dv, dmask, dsinks] = attention_backward(
      as_heads(grad_out, "grad_out"), grad_lse3, q4, k4, v4, std::nullopt, as_heads(out, "out"),
      torch::stable::unsqueeze(lse, 0), causal, scale, false,
      {window_left, window_right, alibi_slopes, softcap, sinks, dropout_p, seed}, &unequal);
  return {as_packed(dq), as_packed(dk), as_packed(dv), dsinks};
}

}  // namespace

#define LLMOPS_SEQUENCES                                                           \
  "Tensor cu_seqlens_q, Tensor cu_seqlens_k, int max_seqlen_q, int max_seqlen_k, " \
  "bool causal, float scale, int window_left=-1, int window_right=-1, "            \
  "Tensor? alibi_slopes=None, float softcap=0.0, Tensor? sinks=None, "             \
  "float dropout_p=0.0, Tensor? seed=None"

STABLE_TORCH_LIBRARY_FRAGMENT(llmops_cpu, m) {
  m.def("attention_varlen_fwd(Tensor q, Tensor k, Tensor v, " LLMOPS_SEQUENCES
        ") -> (Tensor, Tensor)");
  m.def(
      "attention_varlen_bwd(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, "
      "Tensor out, Tensor lse, " LLMOPS_SEQUENCES ") -> (Tensor, Tensor, Tensor, Tensor?)");
}
STABLE_TORCH_LIBRARY_IMPL(llmops_cpu, CPU, m) {
  m.impl("attention_varlen_fwd", TORCH_BOX(&attention_varlen_fwd_cpu));
  m.impl("attention_varlen_bwd", TORCH_BOX(&attention_varlen_bwd_cpu));
}

}  // namespace llmops
