// Detection and selection of the instruction set. Compiled once, with baseline flags.
#include "isa.h"

namespace llmops::cpu {

Isa best_isa() {
#if defined(__x86_64__) && !defined(LLMOPS_SCALAR_ONLY)
  // These builtins read cpuid and, through xgetbv, whether the operating system saves the wide
  // registers: a processor with AVX-512 under a kernel without it answers no.
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
#ifdef LLMOPS_EMULATED  // the AVX-512 kernels of this build run on AVX2 (setup.py)
  if (avx2) return Isa::avx512_bf16;
#endif
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return Isa::avx512_bf16;
  if (avx512) return Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::scalar;
}

namespace {
// Written only by select_isa, which callers do not run while kernels are running.
Isa g_active = best_isa();
}  // namespace

Isa active_isa() { return g_active; }

bool select_isa(Isa isa) {
  if (static_cast<int>(isa) > static_cast<int>(best_isa())) return false;
  g_active = isa;
  return true;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::scalar:
      return "scalar";
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
    case Isa::avx512_bf16:
      return "avx512_bf16";
  }
  return "unknown";
}

}  // namespace llmops::cpu
