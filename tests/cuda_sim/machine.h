// What scheduler.h's machine is made of, for the sources that have it: scheduler.cpp (launches, the
// order of blocks, warps and lanes, faults), fibers.cpp (stacks and the way from one to another),
// collectives.cpp (barriers and meetings of a warp), memory.cpp (shared memory, what may be touched
// of global memory, asynchronous copies). Nobody else includes it.
#pragma once

#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <unordered_map>

#include "scheduler.h"

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

namespace cuda_sim {

constexpr size_t kStaticShared = 48 << 10;
// What a block of the least GPU from sm_80 on may have, where it was asked for.
constexpr size_t kDynamicShared = 99 << 10;

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
  size_t used = 0, static_bytes = 0, dynamic_bytes = 0, shared_limit = 0;
  std::unordered_map<const void*, size_t> allowed;  // dynamic shared memory, by kernel
  int error = 0;                                    // cudaGetLastError
  int until_refused = -1;                           // see refuse
  bool refused = false;
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

inline Machine& machine() {
  static Machine m;
  return m;
}

// ---- fibers.cpp

// As many threads as a block has, with a stack each.
void set_threads(size_t count);
// The thread begins anew when it is next resumed.
void prepare_stack(Thread& t);
// From the scheduler to a thread; comes back when that waits or has exited.
void resume(Thread& t);
// From the running thread to the scheduler; comes back when it is run again.
void to_scheduler(bool for_good = false);

// ---- scheduler.cpp

// The fault of this launch, if it is the first.
void note(const Thread* t, const char* where, const std::string& what);
// Whether this request is the one that refuse() meant; then its error is set.
bool is_refused();
// The running thread, until somebody makes it ready.
void wait(State state);
void make_ready(Thread& t);

// ---- collectives.cpp

// All threads wait, or have exited: lets the barrier open, or says what is wrong.
void open_barrier();

// ---- memory.cpp

unsigned char* add_piece(const void* site, size_t bytes, const char* where);
// Notes what was written beyond the end of a piece.
void check_pieces();

}  // namespace cuda_sim
