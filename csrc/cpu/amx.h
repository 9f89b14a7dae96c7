// AMX's tiles, 16 rows of 64 bytes: C[16][16] += A[16][32] B[32][16] in bf16, B in pairs of rows,
// is one instruction of 16384 flops. What the kernels that use them share.
#pragma once
#include "simd.h"

#if defined(__AMX_BF16__) && defined(LLMOPS_HAS_DOT_PAIRS)
#define LLMOPS_HAS_TILES 1
#endif

namespace llmops::cpu::LLMOPS_ISA {
namespace {

#ifndef LLMOPS_HAS_TILES
constexpr bool kHasTiles = false;
#else
constexpr bool kHasTiles = true;
constexpr int kSide = 16;   // rows of a tile, and its fp32 columns
constexpr int kDepth = 32;  // bf16 values that a step multiplies

// GCC's tile instructions do not say that they read and write memory.
LLMOPS_INLINE void memory_is_used(const void* p) { __asm__ volatile("" : : "r"(p) : "memory"); }

#ifdef __SANITIZE_ADDRESS__
// Nor are they seen by AddressSanitizer, which is asked of each row.
extern "C" void __asan_loadN(const void* p, size_t bytes);
extern "C" void __asan_storeN(void* p, size_t bytes);
#undef _tile_loadd
#define _tile_loadd(tile, base, stride)                                               \
  do {                                                                                \
    for (int side = 0; side < kSide; ++side)                                          \
      __asan_loadN(reinterpret_cast<const char*>(base) + side * (stride), 4 * kSide); \
    _tile_loadd_internal(tile, base, stride);                                         \
  } while (0)
#undef _tile_stored
#define _tile_stored(tile, base, stride)                                         \
  do {                                                                           \
    for (int side = 0; side < kSide; ++side)                                     \
      __asan_storeN(reinterpret_cast<char*>(base) + side * (stride), 4 * kSide); \
    _tile_stored_internal(tile, base, stride);                                   \
  } while (0)
#endif

// All eight registers as whole tiles; until end_tiles, in this thread.
[[maybe_unused]] LLMOPS_NOINLINE void begin_tiles() {
  struct {
    uint8_t palette, start, zeros[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  } config = {};
  config.palette = 1;
  for (int i = 0; i < 8; ++i) config.bytes[i] = 4 * kSide, config.rows[i] = kSide;
  memory_is_used(&config);
  _tile_loadconfig(&config);
}
// Tile state that is not released makes every switch of threads slower.
[[maybe_unused]] LLMOPS_NOINLINE void end_tiles() { _tile_release(); }
#endif

}  // namespace
}  // namespace llmops::cpu::LLMOPS_ISA
