// A launch: its blocks one after the other, their warps and lanes in the order of the schedule, and
// what went wrong in it.
#include "scheduler.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <utility>

#include "machine.h"

namespace cuda_sim {

Thread* current = nullptr;
dim3 block_index, block_size, grid_size;

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

namespace {

std::string text(const char* format, va_list arguments) {
  char buffer[600];
  vsnprintf(buffer, sizeof buffer, format, arguments);
  return buffer;
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

void fail(const char* where, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  note(current, where, text(format, arguments));
  va_end(arguments);
  to_scheduler(true);
  __builtin_trap();
}

bool is_refused() {
  Machine& m = machine();
  if (m.until_refused < 0 || m.until_refused-- > 0) return false;
  m.error = 701;  // cudaErrorLaunchOutOfResources
  return m.refused = true;
}

bool refuse(int others) {
  Machine& m = machine();
  m.until_refused = others;
  return std::exchange(m.refused, false);
}

int exchange_error(int next) { return std::exchange(machine().error, next); }

void launch(const char* kernel, const void* entry, dim3 grid, dim3 block, size_t dynamic_bytes,
            const std::function<void()>& run) {
  Hidden hidden;
  Machine& m = machine();
  const std::lock_guard<std::recursive_mutex> lock(m.mutex);
  if (is_refused()) return;
  const size_t threads = static_cast<size_t>(block.x) * block.y * block.z;
  if (threads == 0 || threads > 1024)
    throw Fault("cuda_sim: kernel " + std::string(kernel) + " with " + std::to_string(threads) +
                " threads in a block");
  const auto allowed = m.allowed.find(entry);
  m.shared_limit = allowed == m.allowed.end() ? kStaticShared : kStaticShared + allowed->second;
  if (dynamic_bytes > (allowed == m.allowed.end() ? kStaticShared : allowed->second))
    throw Fault("cuda_sim: kernel " + std::string(kernel) + " with " +
                std::to_string(dynamic_bytes) +
                " bytes of dynamic shared memory, which cudaFuncSetAttribute did not allow");
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

}  // namespace cuda_sim
