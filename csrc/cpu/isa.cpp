// Detection and selection of the instruction set. Compiled once, with baseline flags.
#include "isa.h"

#if defined(__x86_64__) && defined(__linux__) && !defined(LLMOPS_SCALAR_ONLY)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#define LLMOPS_MAY_HAVE_AMX 1
#endif

namespace llmops::cpu {

namespace {

// Whether the processor has AMX with bf16 and the operating system lets this process, and all
// threads that it begins from here on, use its tile registers (8 KiB of state).
bool amx_allowed() {
#ifdef LLMOPS_MAY_HAVE_AMX
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return (d & kBf16) && (d & kTile) && syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace

Isa best_isa() {
#if defined(__x86_64__) && !defined(LLMOPS_SCALAR_ONLY)
  // These builtins read cpuid and, through xgetbv, whether the operating system saves the wide
  // registers: a processor with AVX-512 under a kernel without it answers no.
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
#ifdef LLMOPS_EMULATED  // the AVX-512 kernels of this build run on AVX2 (setup.py)
  if (avx2) return Isa::amx;
#endif
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) {
    static const bool amx = amx_allowed();
    return amx ? Isa::amx : Isa::avx512_bf16;
  }
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
    case Isa::amx:
      return "amx";
  }
  return "unknown";
}

}  // namespace llmops::cpu
