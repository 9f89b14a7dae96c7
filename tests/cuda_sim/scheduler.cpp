#include "scheduler.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <memory>
#include <mutex>
#include <random>
#include <string>

#if defined(__SANITIZE_THREAD__)
#define LLMOPS_TSAN(...) __VA_ARGS__
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned);
void __tsan_destroy_fiber(void*);
void __tsan_switch_to_fiber(void*, unsigned);
void __tsan_acquire(void*);
void __tsan_release(void*);
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#else
#define LLMOPS_TSAN(...)
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define LLMOPS_ASAN(...) __VA_ARGS__
#else
#define LLMOPS_ASAN(...)
#endif

#if !defined(__x86_64__)
#error "the CUDA simulator switches stacks in x86-64 assembly"
#endif

namespace cuda_sim {

Thread* current = nullptr;
dim3 block_index, block_size, grid_size;

namespace {

constexpr size_t kStack = 128 << 10, kGuard = 4096;
constexpr size_t kRedZone = 64;  // around each piece of shared memory
constexpr unsigned char kPoison = 0xff, kCanary = 0xa5;
constexpr size_t kStaticShared = 48 << 10, kDynamicShared = 227 << 10;

// A piece of the block's shared memory.
struct Piece {
  const void* site;
  unsigned char* data;
  size_t bytes;
  const char* where;
};

struct Extent {
  const char *begin, *end;
};

struct Machine {
  std::recursive_mutex mutex;
  Schedule schedule;
  std::mt19937 random;
  std::vector<Thread> threads;
  std::vector<uint32_t> ready;  // lanes of each warp
  std::vector<std::unique_ptr<Round>> rounds;
  std::vector<Round*> free_rounds;
  std::vector<Piece> pieces;
  std::unique_ptr<unsigned char[]> memory;  // of all pieces
  size_t used = 0, static_bytes = 0, dynamic_bytes = 0;
  std::vector<Extent> extents;
  Extent recent{};
  const std::function<void()>* run = nullptr;
  const char* kernel = "";
  void* stack_pointer = nullptr;
  void* tsan = nullptr;
  const void* asan_stack = nullptr;
  size_t asan_size = 0;
  void* asan = nullptr;
  int at_barrier = 0, exited = 0;
  std::string fault;
  // What ThreadSanitizer learns of barriers: two each, in turn, so that a thread which is late to
  // leave one does not learn of what others did on their way to the next.
  char block_tags[2], warp_tags[32][2], start_tag, end_tag;
};

Machine& machine() {
  static Machine m;
  return m;
}

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

// From the running thread to the scheduler; comes back when it is run again.
void to_scheduler(bool for_good = false) {
  Machine& m = machine();
  Thread* t = current;
  (void)for_good;
  LLMOPS_ASAN(
      __sanitizer_start_switch_fiber(for_good ? nullptr : &t->asan, m.asan_stack, m.asan_size);)
  LLMOPS_TSAN(__tsan_switch_to_fiber(m.tsan, 1);)
  llmops_cuda_sim_switch(&t->stack_pointer, m.stack_pointer);
  LLMOPS_ASAN(__sanitizer_finish_switch_fiber(t->asan, &m.asan_stack, &m.asan_size);)
}

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

std::string text(const char* format, va_list arguments) {
  char buffer[600];
  vsnprintf(buffer, sizeof buffer, format, arguments);
  return buffer;
}

void note(const Thread* t, const char* where, const std::string& what) {
  Machine& m = machine();
  if (!m.fault.empty()) return;
  m.fault = "cuda_sim: " + what + "; at " + where + ", kernel " + m.kernel + ", block (" +
            std::to_string(block_index.x) + ", " + std::to_string(block_index.y) + ", " +
            std::to_string(block_index.z) + ")";
  if (t) m.fault += ", thread " + std::to_string(t->number);
  m.fault += ", seed " + std::to_string(m.schedule.seed);
}

void wait(State state) {
  Machine& m = machine();
  current->state = state;
  m.ready[current->warp] &= ~(1u << current->lane);
  to_scheduler();
}

void make_ready(Thread& t) {
  t.state = State::ready;
  machine().ready[t.warp] |= 1u << t.lane;
}

Round* new_round() {
  Machine& m = machine();
  if (m.free_rounds.empty()) {
    m.rounds.push_back(std::make_unique<Round>());
    return m.rounds.back().get();
  }
  Round* round = m.free_rounds.back();
  m.free_rounds.pop_back();
  return round;
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

unsigned char* add_piece(const void* site, size_t bytes, const char* where) {
  Machine& m = machine();
  const size_t room = (bytes + 15) / 16 * 16 + kRedZone;
  unsigned char* data = m.memory.get() + m.used;
  data += (128 - reinterpret_cast<uintptr_t>(data) % 128) % 128;
  m.used = data + room - m.memory.get();
  LLMOPS_ASAN(__asan_unpoison_memory_region(data, room);)
  std::memset(data, kPoison, bytes);
  std::memset(data + bytes, kCanary, room - bytes);
  LLMOPS_ASAN(__asan_poison_memory_region(data + (bytes + 7) / 8 * 8, room - (bytes + 7) / 8 * 8);)
  m.pieces.push_back({site, data, bytes, where});
  return data;
}

void check_pieces() {
  for (const Piece& p : machine().pieces) {
    LLMOPS_ASAN(__asan_unpoison_memory_region(p.data, (p.bytes + 15) / 16 * 16 + kRedZone);)
    for (size_t i = p.bytes; i < (p.bytes + 15) / 16 * 16 + kRedZone; ++i)
      if (p.data[i] != kCanary) {
        note(nullptr, p.where,
             "out of range: byte " + std::to_string(i) + " of shared memory of " +
                 std::to_string(p.bytes) + " bytes was written");
        return;
      }
  }
}

// All threads wait, or have exited: lets the barrier open, or says what is wrong.
void open_barrier() {
  Machine& m = machine();
  const Thread* first = nullptr;
  for (const Thread& t : m.threads) {
    if (t.state == State::in_collective) {
      note(&t, t.where,
           std::string("divergent: lanes of its mask never come to ") + t.what + "; " +
               std::to_string(m.at_barrier) + " threads wait at __syncthreads, " +
               std::to_string(m.exited) + " have exited");
      return;
    }
    if (t.state != State::at_barrier) continue;
    if (first && first->where != t.where) {
      note(&t, t.where, std::string("divergent barrier: others wait at ") + first->where);
      return;
    }
    first = &t;
  }
  m.at_barrier = 0;
  for (Thread& t : m.threads)
    if (t.state == State::at_barrier) make_ready(t);
}

// The next warp to run: mostly the last one again, so that some run far ahead.
int draw_warp(int last) {
  Machine& m = machine();
  const int warps = static_cast<int>(m.ready.size());
  const uint32_t draw = m.random();
  if (last >= 0 && m.ready[last] && draw % 8 != 0) return last;
  int w = static_cast<int>(draw / 8 % warps);
  while (!m.ready[w]) w = (w + 1) % warps;
  return w;
}

void run_ready() {
  Machine& m = machine();
  const int warps = static_cast<int>(m.ready.size());
  const auto any = [&] {
    return std::any_of(m.ready.begin(), m.ready.end(), [](uint32_t r) { return r != 0; });
  };
  int warp = -1;
  while (m.fault.empty() && any()) {
    const bool drawn = m.schedule.order == 2;
    const int flip = drawn ? m.random() % 32 : (m.schedule.order == 1 ? 31 : 0);
    if (drawn) warp = draw_warp(warp);
    for (int w = 0; w < (drawn ? 1 : warps) && m.fault.empty(); ++w) {
      const int chosen = drawn ? warp : (flip ? warps - 1 - w : w);
      const uint32_t now = m.ready[chosen];
      for (int i = 0; i < 32 && m.fault.empty(); ++i)
        if (now >> (i ^ flip) & 1) resume(m.threads[chosen * 32 + (i ^ flip)]);
    }
  }
}

void run_block() {
  Machine& m = machine();
  const int count = static_cast<int>(m.threads.size());
  m.ready.assign((count + 31) / 32, 0);
  m.pieces.clear();
  m.used = m.static_bytes = 0;
  m.at_barrier = m.exited = 0;
  m.free_rounds.clear();
  for (auto& round : m.rounds) m.free_rounds.push_back(round.get());
  if (m.dynamic_bytes) add_piece(&m, m.dynamic_bytes, m.kernel);
  for (int i = 0; i < count; ++i) {
    Thread& t = m.threads[i];
    const unsigned x = block_size.x, y = block_size.y, n = i;
    t.index = dim3(n % x, n / x % y, n / (x * y));
    t.number = i;
    t.lane = i % 32;
    t.warp = i / 32;
    t.parity[0] = t.parity[1] = 0;
    t.copies.clear();
    t.groups = 0;
    prepare_stack(t);
    make_ready(t);
  }
  LLMOPS_TSAN(__tsan_release(&m.start_tag);)
  while (m.fault.empty() && m.exited < count) {
    run_ready();
    if (m.fault.empty() && m.exited < count) open_barrier();
  }
  LLMOPS_TSAN(__tsan_acquire(&m.end_tag);)
  if (m.fault.empty())
    for (const Thread& t : m.threads)
      if (!t.copies.empty()) {
        note(&t, m.kernel, "a thread exits with cp.async copies it did not wait for");
        break;
      }
  if (m.fault.empty()) check_pieces();
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

void run_blocks(dim3 grid) {
  Machine& m = machine();
  const uint64_t blocks = static_cast<uint64_t>(grid.x) * grid.y * grid.z;
  std::vector<uint32_t> order(blocks);
  for (uint64_t i = 0; i < blocks; ++i) order[i] = static_cast<uint32_t>(i);
  if (m.schedule.order == 1) std::reverse(order.begin(), order.end());
  if (m.schedule.order == 2) std::shuffle(order.begin(), order.end(), m.random);
  for (uint32_t i : order) {
    block_index = dim3(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y);
    run_block();
    if (!m.fault.empty()) return;
  }
}

}  // namespace

Hidden::Hidden() { LLMOPS_TSAN(AnnotateIgnoreReadsBegin("", 0); AnnotateIgnoreWritesBegin("", 0);) }
Hidden::~Hidden() { LLMOPS_TSAN(AnnotateIgnoreWritesEnd("", 0); AnnotateIgnoreReadsEnd("", 0);) }

void fail(const char* where, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  note(current, where, text(format, arguments));
  va_end(arguments);
  to_scheduler(true);
  __builtin_trap();
}

void sync_threads(const char* where) {
  Hidden hidden;
  Machine& m = machine();
  Thread* t = current;
  t->where = where;
  ++m.at_barrier;
  [[maybe_unused]] char* tag = &m.block_tags[t->parity[0]++ & 1];
  LLMOPS_TSAN(__tsan_release(tag);)
  wait(State::at_barrier);
  LLMOPS_TSAN(__tsan_acquire(tag);)
}

const Round* meet(const char* what, const char* where, uint32_t mask, const void* given,
                  size_t bytes) {
  Hidden hidden;
  Machine& m = machine();
  Thread* t = current;
  if (!(mask >> t->lane & 1))
    fail(where, "bad mask: %s with mask %08x by lane %d", what, mask, t->lane);
  t->what = what;
  t->where = where;
  t->mask = mask;
  std::memcpy(t->given, given, bytes);
  const int first = t->warp * 32, count = static_cast<int>(m.threads.size());
  bool all = true;
  for (int lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1) || lane == t->lane) continue;
    const Thread* o = first + lane < count ? &m.threads[first + lane] : nullptr;
    if (!o || o->state == State::exited)
      fail(where, "bad mask: lane %d of mask %08x %s", lane, mask,
           o ? "has exited" : "does not exist");
    // Elsewhere it may be on its way: who never comes is told when nobody can run.
    all &= o->state == State::in_collective && o->where == where && o->mask == mask;
  }
  if (!all) {
    wait(State::in_collective);
    return current->round;
  }
  Round* round = new_round();
  round->leaving = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    Thread& o = m.threads[first + lane];
    std::memcpy(round->given[lane], o.given, bytes);
    o.round = round;
    ++round->leaving;
    if (&o != t) make_ready(o);
  }
  return round;
}

void leave(const Round* round) {
  Hidden hidden;
  Round* own = const_cast<Round*>(round);
  if (--own->leaving == 0) machine().free_rounds.push_back(own);
}

void sync_warp(const char* where, uint32_t mask) {
  Hidden hidden;
  [[maybe_unused]] char* tag = &machine().warp_tags[current->warp][current->parity[1]++ & 1];
  LLMOPS_TSAN(__tsan_release(tag);)
  leave(meet("__syncwarp", where, mask, nullptr, 0));
  LLMOPS_TSAN(__tsan_acquire(tag);)
}

void* shared(const void* site, size_t bytes, const char* where) {
  Hidden hidden;
  Machine& m = machine();
  for (const Piece& p : m.pieces)
    if (p.site == site) return p.data;
  m.static_bytes += bytes;
  if (m.static_bytes > kStaticShared)
    fail(where, "%zu bytes of static shared memory", m.static_bytes);
  return add_piece(site, bytes, where);
}

void* dynamic_shared(const char* where) {
  Machine& m = machine();
  if (!m.dynamic_bytes) fail(where, "launched without dynamic shared memory");
  return m.pieces.front().data;
}

void check_global(const void* address, size_t bytes, const char* what) {
  Hidden hidden;
  Machine& m = machine();
  const char* at = static_cast<const char*>(address);
  if (reinterpret_cast<uintptr_t>(at) % bytes != 0)
    fail(what, "misaligned: %zu bytes at an address that is %zu past a multiple of them", bytes,
         static_cast<size_t>(reinterpret_cast<uintptr_t>(at) % bytes));
  if (m.extents.empty() || (at >= m.recent.begin && at + bytes <= m.recent.end)) return;
  const Extent* nearest = nullptr;
  ptrdiff_t least = PTRDIFF_MAX;
  for (const Extent& e : m.extents) {
    if (at >= e.begin && at + bytes <= e.end) {
      m.recent = e;
      return;
    }
    const ptrdiff_t gap = at < e.begin ? e.begin - at : at - e.end;
    if (gap < least) nearest = &e, least = gap;
  }
  fail(what, "out of range: %zu bytes at byte %td of a tensor of %td", bytes, at - nearest->begin,
       nearest->end - nearest->begin);
}

static void land(const Copy& copy) {
  if (copy.from) {
    std::memcpy(copy.to, copy.from, copy.bytes);
  } else {
    std::memset(copy.to, 0, copy.bytes);
  }
}

void copy_async(void* to, const void* from, size_t bytes, const char* where) {
  Hidden hidden;
  Machine& m = machine();
  if (reinterpret_cast<uintptr_t>(to) % bytes != 0)
    fail(where, "misaligned: cp.async of %zu bytes", bytes);
  if (from) check_global(from, bytes, where);
  const Copy copy{to, from, bytes, -1};
  current->copies.push_back(copy);
  if (m.schedule.order != 2 || m.random() % 2) return;
  // This one lands at once; it stays on the list, for it must be waited for all the same.
  LLMOPS_TSAN(return;)
  land(copy);
}

void copy_commit() {
  Hidden hidden;
  Thread* t = current;
  for (Copy& c : t->copies)
    if (c.group < 0) c.group = t->groups;
  ++t->groups;
}

void copy_wait(int groups_left) {
  // The copy itself is seen by ThreadSanitizer: others may read it behind a barrier only.
  std::vector<Copy> landing;
  {
    Hidden hidden;
    Thread* t = current;
    const int until = t->groups - groups_left;
    auto kept = std::stable_partition(t->copies.begin(), t->copies.end(), [&](const Copy& c) {
      return c.group < 0 || c.group >= until;
    });
    landing.assign(kept, t->copies.end());
    t->copies.erase(kept, t->copies.end());
  }
  for (const Copy& c : landing) land(c);
  Hidden hidden;
  std::vector<Copy>().swap(landing);
}

void launch(const char* kernel, dim3 grid, dim3 block, size_t dynamic_bytes,
            const std::function<void()>& run) {
  Hidden hidden;
  Machine& m = machine();
  const std::lock_guard<std::recursive_mutex> lock(m.mutex);
  const size_t threads = static_cast<size_t>(block.x) * block.y * block.z;
  if (threads == 0 || threads > 1024)
    throw Fault("cuda_sim: kernel " + std::string(kernel) + " with " + std::to_string(threads) +
                " threads in a block");
  if (dynamic_bytes > kDynamicShared)
    throw Fault("cuda_sim: kernel " + std::string(kernel) + " with " +
                std::to_string(dynamic_bytes) + " bytes of dynamic shared memory");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535 ||
      static_cast<uint64_t>(grid.x) * grid.y * grid.z > 1u << 24)
    throw Fault("cuda_sim: kernel " + std::string(kernel) +
                " with a grid of no or too many blocks");
  if (!m.memory) {
    m.memory.reset(new unsigned char[kStaticShared + kDynamicShared + (64 << 10)]);
  }
  set_threads(threads);
  m.random.seed(m.schedule.seed);
  m.kernel = kernel;
  m.dynamic_bytes = dynamic_bytes;
  m.run = &run;
  m.fault.clear();
  block_size = block;
  grid_size = grid;
  LLMOPS_TSAN(m.tsan = __tsan_get_current_fiber();)
  LLMOPS_TSAN(for (Thread& t : m.threads) t.tsan = __tsan_create_fiber(0);)
  run_blocks(grid);
  LLMOPS_TSAN(for (Thread& t : m.threads) __tsan_destroy_fiber(t.tsan);)
  if (!m.fault.empty()) throw Fault(m.fault);
}

Schedule& schedule() { return machine().schedule; }

// Whether each session draws from another seed than the last: set by module.cpp.
bool another_seed_each_time = false;

Session::Session() {
  machine().mutex.lock();
  if (another_seed_each_time) ++machine().schedule.seed;
}
Session::~Session() {
  Machine& m = machine();
  m.extents.clear();
  m.recent = {};
  m.mutex.unlock();
}

void allow(const void* data, size_t bytes) {
  const char* begin = static_cast<const char*>(data);
  machine().extents.push_back({begin, begin + bytes});
}

}  // namespace cuda_sim
