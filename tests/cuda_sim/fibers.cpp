// The threads of a block as fibers: their stacks, and the way from one to another.
#include <sys/mman.h>

#include <cstring>
#include <utility>

#include "machine.h"

#if !defined(__x86_64__)
#error "the CUDA simulator switches stacks in x86-64 assembly"
#endif

namespace cuda_sim {

namespace {

constexpr size_t kStack = 128 << 10, kGuard = 4096;

extern "C" void llmops_cuda_sim_switch(void** save, void* to);
asm(R"(
.text
.globl llmops_cuda_sim_switch
.hidden llmops_cuda_sim_switch
.type llmops_cuda_sim_switch,@function
llmops_cuda_sim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size llmops_cuda_sim_switch, .-llmops_cuda_sim_switch
)");

void enter() {
  Machine& m = machine();
  LLMOPS_ASAN(__sanitizer_finish_switch_fiber(nullptr, &m.asan_stack, &m.asan_size);)
  LLMOPS_TSAN(__tsan_acquire(&m.start_tag);)
  (*m.run)();
  {
    Hidden hidden;
    LLMOPS_TSAN(__tsan_release(&m.end_tag);)
    current->state = State::exited;
  }
  to_scheduler(true);
  __builtin_trap();
}

}  // namespace

void to_scheduler(bool for_good) {
  Machine& m = machine();
  Thread* t = current;
  (void)for_good;
  LLMOPS_ASAN(
      __sanitizer_start_switch_fiber(for_good ? nullptr : &t->asan, m.asan_stack, m.asan_size);)
  LLMOPS_TSAN(__tsan_switch_to_fiber(m.tsan, 1);)
  llmops_cuda_sim_switch(&t->stack_pointer, m.stack_pointer);
  LLMOPS_ASAN(__sanitizer_finish_switch_fiber(t->asan, &m.asan_stack, &m.asan_size);)
}

void resume(Thread& t) {
  Machine& m = machine();
  current = &t;
  LLMOPS_ASAN(__sanitizer_start_switch_fiber(&m.asan, t.stack, kStack);)
  LLMOPS_TSAN(__tsan_switch_to_fiber(t.tsan, 1);)
  llmops_cuda_sim_switch(&m.stack_pointer, t.stack_pointer);
  LLMOPS_ASAN(__sanitizer_finish_switch_fiber(m.asan, nullptr, nullptr);)
  current = nullptr;
  if (t.state == State::exited) {
    m.ready[t.warp] &= ~(1u << t.lane);
    ++m.exited;
  }
}

void prepare_stack(Thread& t) {
  LLMOPS_ASAN(__asan_unpoison_memory_region(t.stack, kStack);)
  void** top = reinterpret_cast<void**>(t.stack + kStack - 64);
  *--top = nullptr;  // no return address
  *--top = reinterpret_cast<void*>(&enter);
  top -= 6;
  std::memset(top, 0, 6 * sizeof(void*));
  t.stack_pointer = top;
}

void set_threads(size_t count) {
  Machine& m = machine();
  while (m.threads.size() > count) {
    munmap(m.threads.back().stack - kGuard, kStack + kGuard);
    m.threads.pop_back();
  }
  while (m.threads.size() < count) {
    Thread t{};
    void* memory = mmap(nullptr, kStack + kGuard, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw Fault("cuda_sim: no memory for the threads' stacks");
    mprotect(memory, kGuard, PROT_NONE);
    t.stack = static_cast<char*>(memory) + kGuard;
    m.threads.push_back(std::move(t));
  }
}

Hidden::Hidden() { LLMOPS_TSAN(AnnotateIgnoreReadsBegin("", 0); AnnotateIgnoreWritesBegin("", 0);) }
Hidden::~Hidden() { LLMOPS_TSAN(AnnotateIgnoreWritesEnd("", 0); AnnotateIgnoreReadsEnd("", 0);) }

}  // namespace cuda_sim
