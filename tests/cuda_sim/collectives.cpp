// Where threads wait for each other: __syncthreads, __syncwarp, and the meetings that shuffles and
// ballots are made of.
#include <cstring>

#include "machine.h"

namespace cuda_sim {

static Round* new_round() {
  Machine& m = machine();
  if (m.free_rounds.empty()) {
    m.rounds.push_back(std::make_unique<Round>());
    return m.rounds.back().get();
  }
  Round* round = m.free_rounds.back();
  m.free_rounds.pop_back();
  return round;
}

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

}  // namespace cuda_sim
