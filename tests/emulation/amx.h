// AMX by plain loops, for avx512.h, which includes it: whole tiles, as csrc/cpu/amx.h configures
// them.
#pragma once

namespace llmops_emulation {
struct Tile {
  uint32_t cell[16][16];
};
static thread_local Tile tile[8] __attribute__((unused));

LLMOPS_EMULATED float bf16_at(uint32_t cell, int half) {
  const uint32_t bits = half ? cell & 0xffff0000u : cell << 16;
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}
// Sums of the even and of the odd products, added to c at the end.
static __attribute__((noinline, unused)) void multiply_tiles(Tile& c, const Tile& a,
                                                             const Tile& b) {
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 16; ++n) {
      float sum[2] = {0.0f, 0.0f}, old;
      for (int k = 0; k < 16; ++k) {
        for (int half = 0; half < 2; ++half)
          sum[half] += bf16_at(a.cell[m][k], half) * bf16_at(b.cell[k][n], half);
      }
      __builtin_memcpy(&old, &c.cell[m][n], 4);
      old += sum[0] + sum[1];
      __builtin_memcpy(&c.cell[m][n], &old, 4);
    }
  }
}
}  // namespace llmops_emulation

LLMOPS_EMULATED void _tile_loadconfig(const void*) {}
LLMOPS_EMULATED void _tile_release() {}
LLMOPS_EMULATED void _tile_zero(int t) { llmops_emulation::tile[t] = {}; }
LLMOPS_EMULATED void _tile_loadd(int t, const void* from, int64_t stride) {
  for (int i = 0; i < 16; ++i)
    __builtin_memcpy(llmops_emulation::tile[t].cell[i], static_cast<const char*>(from) + i * stride,
                     64);
}
LLMOPS_EMULATED void _tile_stored(int t, void* to, int64_t stride) {
  for (int i = 0; i < 16; ++i)
    __builtin_memcpy(static_cast<char*>(to) + i * stride, llmops_emulation::tile[t].cell[i], 64);
}
LLMOPS_EMULATED void _tile_dpbf16ps(int c, int a, int b) {
  using namespace llmops_emulation;
  multiply_tiles(tile[c], tile[a], tile[b]);
}
