// Lets Python read and choose the instruction set of the CPU kernels; and what follows from it.
#include "cpu/isa.h"

#include <unistd.h>

#include "common.h"

namespace llmops {
namespace {

std::string isa_active() { return cpu::isa_name(cpu::active_isa()); }
std::string isa_best() { return cpu::isa_name(cpu::best_isa()); }

bool isa_select(std::string name) {
  for (int i = 0; i < cpu::kIsaCount; ++i) {
    const auto isa = static_cast<cpu::Isa>(i);
    if (name == cpu::isa_name(isa)) return cpu::select_isa(isa);
  }
  return false;
}

}  // namespace

bool past_caches(int64_t bytes) {
  // One core complex of common servers: what sysconf reports is the whole socket's, which one
  // thread cannot use there. On processors with AMX it can; and a fresh page, which the kernel has
  // just zeroed in that cache, would be written to memory twice.
  constexpr int64_t kComplex = 32 << 20;
  if (bytes <= kComplex) return false;
#ifdef _SC_LEVEL3_CACHE_SIZE
  static const int64_t socket = sysconf(_SC_LEVEL3_CACHE_SIZE);
  if (cpu::active_isa() == cpu::Isa::amx) return bytes > socket;
#endif
  return true;
}

STABLE_TORCH_LIBRARY_FRAGMENT(llmops_cpu, m) {
  m.def("isa_active() -> str");
  m.def("isa_best() -> str");
  m.def("isa_select(str name) -> bool");
}
// No tensor argument names a device, so these serve every dispatch key.
STABLE_TORCH_LIBRARY_IMPL(llmops_cpu, CompositeExplicitAutograd, m) {
  m.impl("isa_active", TORCH_BOX(&isa_active));
  m.impl("isa_best", TORCH_BOX(&isa_best));
  m.impl("isa_select", TORCH_BOX(&isa_select));
}

}  // namespace llmops
