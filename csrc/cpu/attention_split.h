// The products of attention in fp32 by AMX: split_amx.h, whose strips are 32 keys or dimensions
// (operand a: K, V, V^T, K^T, and P and dS by key), 32 lanes of queries (operand b: Q, dO, P, dS)
// or 32 dimensions (operand b: the rows of Q and dO).
#pragma once
#include "attention_amx.h"
#include "split_amx.h"

#ifdef LLMOPS_HAS_TILES

namespace llmops::cpu::LLMOPS_ISA {
namespace {

// From where splitting keys and values is paid for (benchmarks/NOTES.md).
constexpr int64_t kSplitRows = 128, kSplitFrom = 256;
LLMOPS_INLINE bool takes_split(const AttentionParams& p, const AttentionSequence& sequence) {
  return p.type == DType::f32 && active_isa() == Isa::amx && sequence.keys >= kSplitFrom &&
         p.heads / p.kv_heads * sequence.queries >= kSplitRows;
}

// Floats of the strips of `outer` elements by `depth` steps.
LLMOPS_INLINE int64_t strips_size(int64_t outer, int64_t depth) {
  return round_up(outer, kPair) / kPair * tiled_steps(depth) * Fp32Parts::kStepFloats;
}

}  // namespace
}  // namespace llmops::cpu::LLMOPS_ISA
#endif
