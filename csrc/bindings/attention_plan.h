// How attention's work is cut into tasks: by shape alone, so that results do not depend on the
// number of threads.
#pragma once
#include <algorithm>

#include "attention.h"

namespace llmops {
namespace {

using cpu::AttentionParams;

int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t kSplitTasks = 64;  // tasks worth having when the queries alone give fewer
constexpr int64_t kSplitKeys = 512;  // and the fewest keys of one
constexpr int64_t kGradTasks = 8;
constexpr int64_t kGradBlocks = 4;  // query blocks that share one pair of dk, dv sums, at least

// The whole of the work, which the parts of one sequence are a share of.
struct Totals {
  int64_t keys, cells;  // summed over sequences: Tk, Tq * Tk
};

// Depends on shapes only, never on the number of threads.
cpu::AttentionPlan make_plan(const AttentionParams& p, int64_t queries, int64_t keys,
                             const Totals& all) {
  cpu::AttentionPlan plan{};
  plan.splits = plan.parts = 1;
  plan.split_keys = keys;
  if (queries == 0 || p.heads == 0) return plan;  // no blocks: dk and dv are zeros
  const int64_t heads = p.heads / p.kv_heads, rows = heads * queries;
  // Few rows with dropout are a test or a short training sequence: the tiles serve them, and decode
  // need not know of it.
  plan.decode = rows <= cpu::kAttentionDecodeRows && !p.dropout.active;
  plan.packed = heads > 1 && queries < cpu::kAttentionLanes;
  plan.blocks = plan.packed ? div_up(rows, cpu::kAttentionLanes)
                            : heads * div_up(queries, cpu::kAttentionLanes);
  if (keys == 0 || all.keys == 0) return plan;  // an empty sequence, an empty batch
  if (p.left >= 0) plan.first_key = std::clamp<int64_t>(keys - queries - p.left, 0, keys);
  const int64_t seen = keys - plan.first_key;
  if (plan.blocks == 1) {
    const int64_t wanted = div_up(kSplitTasks * keys, all.keys * p.kv_heads);
    plan.splits = std::max<int64_t>(std::min(wanted, seen / kSplitKeys), 1);
  }
  plan.split_keys = div_up(div_up(seen, plan.splits), 96) * 96;
  if (plan.split_keys > 0) plan.splits = std::max<int64_t>(div_up(seen, plan.split_keys), 1);
  const int64_t wanted = div_up(kGradTasks * queries * keys, all.cells * p.kv_heads);
  plan.parts = std::max<int64_t>(std::min(wanted, plan.blocks / kGradBlocks), 1);
  return plan;
}

// `rows_of`: rows that a group's partial results take. Their sum over all groups.
template <class RowsOf>
int64_t plan_partial(AttentionParams& p, UnequalSequences* unequal, const RowsOf& rows_of) {
  if (!unequal) {
    return p.batch * p.kv_heads * rows_of({0, p.queries, 0, p.keys, nullptr, p.plan, 0});
  }
  int64_t total = 0;
  for (auto& sequence : unequal->sequences) {
    sequence.partial = total;
    total += p.kv_heads * rows_of(sequence);
  }
  return total;
}

// `pieces_of`: how many tasks a group is cut into, and what each is. The longest sequences come
// first, so that the last task to start is a short one.
template <class Pieces>
int64_t plan_tasks(AttentionParams& p, UnequalSequences* unequal, const Pieces& pieces) {
  if (!unequal) {
    return p.batch * p.kv_heads * pieces(p.plan, 0, nullptr);
  }
  std::vector<int64_t> order(unequal->sequences.size());
  for (size_t b = 0; b < order.size(); ++b) order[b] = static_cast<int64_t>(b);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return unequal->sequences[a].keys > unequal->sequences[b].keys;
  });
  for (const int64_t b : order) {
    for (int64_t head = 0; head < p.kv_heads; ++head)
      pieces(unequal->sequences[b].plan, b * p.kv_heads + head, &unequal->tasks);
  }
  p.tasks = unequal->tasks.data();
  return static_cast<int64_t>(unequal->tasks.size());
}

// Plans, of all sequences alike or of each; the batch of unequal ones. What all of them sum up to.
Totals make_plans(AttentionParams& p, UnequalSequences* unequal) {
  if (!unequal) {
    const Totals all{p.batch * p.keys, p.batch * p.queries * p.keys};
    p.plan = make_plan(p, p.queries, p.keys, all);
    return all;
  }
  Totals all{0, 0};
  for (const auto& sequence : unequal->sequences) {
    all.keys += sequence.keys;
    all.cells += sequence.queries * sequence.keys;
  }
  for (auto& sequence : unequal->sequences)
    sequence.plan = make_plan(p, sequence.queries, sequence.keys, all);
  return all;
}

// From so many multiply-adds, or bytes of keys and values, on. A worker that waits for work, as one
// still does a millisecond after the last, costs about 5 us; one asleep 25 to 50, which the first
// op of a model pays (benchmarks/NOTES.md).
bool worth_threads(const AttentionParams& p, Totals all) {
  const auto reach = [](int64_t keys, int64_t of) { return std::min(keys, of); };
  if (p.left >= 0) {  // by one query, and by all of a short batch
    const int64_t seen = p.left + 1 + std::max<int64_t>(p.right, 0) + cpu::kAttentionLanes;
    if (p.right >= 0) all.cells = reach(all.cells, all.cells / std::max<int64_t>(p.keys, 1) * seen);
    all.keys = reach(all.keys, p.batch * (p.left + p.queries));
  }
  const int64_t work = p.heads * all.cells * (p.dim + p.dim_v);
  const int64_t bytes =
      p.kv_heads * all.keys * (p.dim + p.dim_v) * (p.type == cpu::DType::f32 ? 4 : 2);
  return work > 500000 || bytes > 200000;
}

}  // namespace
}  // namespace llmops
