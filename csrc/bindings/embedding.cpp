// embedding: lookup and backward as raw operators. llmops.ops.embedding owns the public schema, the
// checks and autograd; what is checked here keeps memory safe whoever calls.
#include "cpu/embedding.h"

#include "elementwise.h"
#include "ids.h"

namespace llmops {
namespace {

constexpr const char* kName = "llmops.embedding";

[[noreturn]] void fail(const cpu::EmbeddingTable& token, const cpu::EmbeddingTable& position,
                       int64_t at) {
  const bool bad_token = token.ids[at] < 0 || token.ids[at] >= token.rows;
  const cpu::EmbeddingTable& table = bad_token ? token : position;
  throw_out_of_range(table.ids[at], table.rows, kName, bad_token ? "tokens" : "positions",
                     bad_token ? "weight has" : "position_weight has", "");
}

// tokens of any shape, weight [V, D]; positions of the same shape, or 0 to T - 1 along the last
// dimension where only a position_weight [P, D] comes.
Tensor embedding_cpu(const Tensor& tokens, const Tensor& weight_in,
                     const std::optional<Tensor>& positions,
                     const std::optional<Tensor>& position_weight_in) {
  LLMOPS_CHECK(weight_in.dim() == 2, kName, ": weight must be [V, D]");
  LLMOPS_CHECK(!positions.has_value() || position_weight_in.has_value(), kName,
               ": positions need a position_weight");
  const Tensor weight = last_dim_dense(weight_in);
  const cpu::DType type = kernel_dtype(weight.scalar_type(), kName);
  const int64_t dim = weight.size(1), count = tokens.numel();
  const DenseIds ids(tokens, kName, "tokens");
  const cpu::EmbeddingTable token{ids.data(), weight.data_ptr(), weight.stride(0), weight.size(0)};
  cpu::EmbeddingTable position{};
  std::optional<DenseIds> position_ids;
  std::optional<Tensor> position_weight;
  if (position_weight_in.has_value()) {
    position_weight.emplace(last_dim_dense(*position_weight_in));
    LLMOPS_CHECK(position_weight->dim() == 2 && position_weight->size(1) == dim &&
                     position_weight->scalar_type() == weight.scalar_type(),
                 kName, ": position_weight must be [P, D] with weight's D and dtype");
    LLMOPS_CHECK(!positions.has_value() || same_shape(*positions, tokens), kName,
                 ": positions must have the shape of tokens");
    position_ids.emplace(positions.has_value() ? DenseIds(*positions, kName, "positions")
                                               : DenseIds::places(tokens, kName));
    position = {position_ids->data(), position_weight->data_ptr(), position_weight->stride(0),
                position_weight->size(0)};
  }
  std::vector<int64_t> sizes = shape_of(tokens);
  sizes.push_back(dim);
  Tensor out = new_output(weight, sizes);
  if (count == 0) return out;
  void* out_data = out.data_ptr();
  const bool stream = past_caches(count * dim * element_size(weight.scalar_type()));
  const auto kernel = LLMOPS_CPU_CALL(embedding_rows);
  std::atomic<int64_t> bad{-1};
  parallel_rows(count, dim, [&](int64_t begin, int64_t end) {
    const int64_t at = kernel(type, dim, token, position, out_data, begin, end, stream);
    if (at >= 0) bad.store(at, std::memory_order_relaxed);
  });
  if (bad.load() >= 0) fail(token, position, bad.load());
  return out;
}

// grad [..., D], ids of grad's leading shape; returns [rows, D].
Tensor embedding_bwd_cpu(const Tensor& grad_in, const Tensor& ids_in, int64_t rows,
                         int64_t padding_idx) {
  const char* name = "llmops.embedding_bwd";
  LLMOPS_CHECK(grad_in.dim() >= 1 && rows >= 0, name, ": grad must be [..., D]");
  const int64_t dim = grad_in.size(-1);
  std::vector<int64_t> leading = shape_of(grad_in);
  leading.pop_back();
  LLMOPS_CHECK(leading == shape_of(ids_in), name, ": ids must have the leading shape of grad");
  const Tensor grad = torch::stable::contiguous(grad_in);
  const cpu::DType type = kernel_dtype(grad.scalar_type(), name);
  const CheckedIds ids(ids_in, rows, name, "ids", "the table has");
  Tensor out = new_output(grad, {rows, dim});
  if (rows == 0 || dim == 0) return out;

  // Stable counting sort: order[first[v] .. first[v + 1]) are the places of id v, ascending.
  const int64_t count = ids.count();
  const std::unique_ptr<int64_t[]> first(new int64_t[rows + 1]()), order(new int64_t[count]);
  for (int64_t i = 0; i < count; ++i) ++first[ids.data()[i]];
  int64_t total = 0;
  for (int64_t v = 0; v < rows; ++v) {
    const int64_t own = first[v];
    first[v] = total;
    total += own;
  }
  first[rows] = total;
  // Placing moves each start to its end, which is the next one's start.
  for (int64_t i = 0; i < count; ++i) order[first[ids.data()[i]]++] = i;
  for (int64_t v = rows; v > 0; --v) first[v] = first[v - 1];
  first[0] = 0;

  const void* grad_data = grad.data_ptr();
  void* out_data = out.data_ptr();
  const auto kernel = LLMOPS_CPU_CALL(embedding_bwd_rows);
  parallel_rows(rows, dim, [&](int64_t begin, int64_t end) {
    kernel(type, dim, grad_data, dim, order.get(), first.get(), padding_idx, out_data, begin, end);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(llmops_cpu, m) {
  m.def(
      "embedding(Tensor tokens, Tensor weight, Tensor? positions=None, "
      "Tensor? position_weight=None) -> Tensor");
  m.def("embedding_bwd(Tensor grad, Tensor ids, int rows, int padding_idx) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(llmops_cpu, CPU, m) {
  m.impl("embedding", TORCH_BOX(&embedding_cpu));
  m.impl("embedding_bwd", TORCH_BOX(&embedding_bwd_cpu));
}

}  // namespace llmops
