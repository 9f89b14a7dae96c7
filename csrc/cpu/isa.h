// Which instruction set the kernels of this process run on, and how a kernel is declared once and
// compiled for each of them.
//
// Every kernel source csrc/cpu/<op>.cpp is compiled four times, with other flags and another value
// of LLMOPS_ISA, into four namespaces. A header declares the kernel with LLMOPS_CPU_KERNEL; a
// binding calls `LLMOPS_CPU_CALL(softmax_fwd)(args...)`, which picks the copy for the active set.
#pragma once
#include <stdint.h>

namespace llmops::cpu {

// amx is no copy of its own: those of avx512_bf16, where they take tiles for their bf16 products.
enum class Isa : int { scalar = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3, amx = 4 };
constexpr int kIsaCount = 5;

// The best set that both the processor and the operating system (saved register state) support.
Isa best_isa();
Isa active_isa();
// False, and nothing changes, when this machine cannot run `isa`.
bool select_isa(Isa isa);
const char* isa_name(Isa isa);

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

}  // namespace llmops::cpu

#ifdef LLMOPS_SCALAR_ONLY  // not x86-64: one copy, plain C++
#define LLMOPS_CPU_KERNEL(ret, name, ...)                                        \
  namespace llmops::cpu::scalar {                                                \
  ret name(__VA_ARGS__);                                                         \
  }                                                                              \
  namespace llmops::cpu {                                                        \
  using name##_fn = ret (*)(__VA_ARGS__);                                        \
  constexpr name##_fn name##_table[] = {                                         \
      &scalar::name, &scalar::name, &scalar::name, &scalar::name, &scalar::name, \
  };                                                                             \
  }
#else
#define LLMOPS_CPU_KERNEL(ret, name, ...)                                                \
  namespace llmops::cpu::scalar {                                                        \
  ret name(__VA_ARGS__);                                                                 \
  }                                                                                      \
  namespace llmops::cpu::avx2 {                                                          \
  ret name(__VA_ARGS__);                                                                 \
  }                                                                                      \
  namespace llmops::cpu::avx512 {                                                        \
  ret name(__VA_ARGS__);                                                                 \
  }                                                                                      \
  namespace llmops::cpu::avx512_bf16 {                                                   \
  ret name(__VA_ARGS__);                                                                 \
  }                                                                                      \
  namespace llmops::cpu {                                                                \
  using name##_fn = ret (*)(__VA_ARGS__);                                                \
  constexpr name##_fn name##_table[] = {                                                 \
      &scalar::name, &avx2::name, &avx512::name, &avx512_bf16::name, &avx512_bf16::name, \
  };                                                                                     \
  }
#endif

#define LLMOPS_CPU_CALL(name) \
  (::llmops::cpu::name##_table[static_cast<int>(::llmops::cpu::active_isa())])
