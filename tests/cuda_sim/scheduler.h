// The machine of the simulator: a block's threads as fibers, its barriers, warp collectives, shared
// memory and asynchronous copies. cuda_sim.h dresses it as CUDA; machine.h says which
// sources have it.
//
// Blocks run one after the other, in an order drawn from the seed. Within a block a warp is drawn,
// and its lanes run, in an order drawn as well, each until it waits for others: between two points
// where threads wait for each other, any order is one a GPU may take. What it cannot show: races
// between blocks, memory ordering without barriers, bank conflicts, speed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <vector>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};

namespace cuda_sim {

// What a kernel did that a GPU would punish, or not notice: with the place, the block, the thread.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

constexpr int kSlot = 64;  // bytes a lane may give to a collective

// One meeting of the lanes of a mask: what each of them gave.
struct Round {
  alignas(16) unsigned char given[32][kSlot];
  int leaving;  // lanes that still read it
};

struct Copy {
  void* to;
  const void* from;  // null: zeros
  size_t bytes;
  int group;  // -1 until committed
};

enum class State : unsigned char { ready, at_barrier, in_collective, exited };

struct Thread {
  void* stack_pointer;
  char* stack;
  dim3 index;
  int number, lane, warp;
  State state;
  const char* where;  // it waits
  const char* what;   // the collective
  uint32_t mask;
  int parity[2];  // of its barriers and of its warp's: see tags in machine.h
  unsigned char given[kSlot];
  Round* round;
  std::vector<Copy> copies;
  int groups;  // committed so far
  void* tsan;
  void* asan;
};

extern Thread* current;
extern dim3 block_index, block_size, grid_size;

// ---- for kernels

void sync_threads(const char* where);
void sync_warp(const char* where, uint32_t mask);
// Waits for the lanes of `mask` at the same collective; then what they gave is in the result, until
// leave().
const Round* meet(const char* what, const char* where, uint32_t mask, const void* given,
                  size_t bytes);
void leave(const Round* round);
// Shared memory of this block: the first thread that comes to `site` makes it, filled with NaN.
void* shared(const void* site, size_t bytes, const char* where);
void* dynamic_shared(const char* where);
// Every access to global memory through csrc/cuda/device.h comes by here.
void check_global(const void* address, size_t bytes, const char* what);
void copy_async(void* to, const void* from, size_t bytes, const char* where);
void copy_commit();
void copy_wait(int groups_left);
[[noreturn]] void fail(const char* where, const char* format, ...)
    __attribute__((format(printf, 2, 3)));

// ---- for launchers and tests

// `entry`: what tells the kernel from others.
void launch(const char* kernel, const void* entry, dim3 grid, dim3 block, size_t dynamic_bytes,
            const std::function<void()>& run);
// Lets a kernel be launched with more than 48 KiB of dynamic shared memory; CUDA's error code.
int allow_dynamic(const void* entry, int bytes);
// The last error, which becomes `next`.
int exchange_error(int next);
// The launch or allow_dynamic that comes after `others` more is refused, as by a GPU that cannot:
// nothing is done, and the error code tells. Whether one has been since the last time; -1: none is.
bool refuse(int others);

// Order 0: threads as numbered; 1: from the last to the first; 2: drawn from the seed.
struct Schedule {
  int order = 2;
  uint32_t seed = 1;
};
Schedule& schedule();

// One user of the simulator at a time: as long as it lives, kernels may touch what was allow()ed to
// it and nothing else of global memory (anything, where nothing was).
class Session {
 public:
  Session();
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;
};
void allow(const void* data, size_t bytes);

// The bookkeeping of the simulator itself is hidden from ThreadSanitizer.
struct Hidden {
  Hidden();
  ~Hidden();
};

}  // namespace cuda_sim
