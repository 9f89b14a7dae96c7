// Dropout of attention weights: random bits that depend on (seed, batch, head, query, key) alone,
// so that every tiling, thread count, instruction set and device drops the same weights, and the
// backward finds again what the forward dropped without storing it.
//
// Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) with the seed
// as key and the counter (key / 4, query, batch * Hq + head, 0); its word key % 4 belongs to the
// key. Queries run along the lanes, so that one evaluation serves four keys.
#pragma once
#include "attention_score.h"

namespace llmops::cpu::LLMOPS_ISA {
namespace {

LLMOPS_INLINE void philox(Bits (&c)[4], uint64_t seed) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    Bits high0, low0, high1, low1;
    mul_wide(c[0], 0xd2511f53u, &high0, &low0);
    mul_wide(c[2], 0xcd9e8d57u, &high1, &low1);
    c[0] = high1 ^ c[1] ^ set1_bits(k0);
    c[1] = low1;
    c[2] = high0 ^ c[3] ^ set1_bits(k1);
    c[3] = low0;
    k0 += 0x9e3779b9u;
    k1 += 0xbb67ae85u;
  }
}

// keep [keys][64]: 0 for a dropped weight, 1 / (1 - p) for a kept one, for the visible keys.
LLMOPS_OUTLINE void dropout_weights(const AttentionParams& p, const QueryBlock& block, int64_t key,
                                    const int* visible, float* keep) {
  const Vec scale = set1(p.dropout.scale);
  for (int j = 0; j < block.vecs; ++j) {
    if (visible[j] == 0) continue;
    uint32_t query[W] = {}, head[W] = {};
    for (int i = 0; i < W && j * W + i < block.count; ++i) {
      query[i] = static_cast<uint32_t>(block.token[j * W + i]);
      head[i] = static_cast<uint32_t>(block.batch * p.heads + block.head[j * W + i]);
    }
    for (int64_t group = key / 4; group * 4 < key + visible[j]; ++group) {
      Bits c[4] = {set1_bits(static_cast<uint32_t>(group)), load_bits(query), load_bits(head),
                   set1_bits(0)};
      philox(c, p.dropout.seed);
      for (int i = 0; i < 4; ++i) {
        const int64_t k = group * 4 + i - key;
        if (k < 0 || k >= visible[j]) continue;
        store(keep + k * kLanes + j * W, select(below(c[i], p.dropout.below), zero(), scale));
      }
    }
  }
}

}  // namespace
}  // namespace llmops::cpu::LLMOPS_ISA
