// Memory: the block's shared memory with red zones, what may be touched of global memory, and
// asynchronous copies from one to the other.
#include <algorithm>
#include <cstring>

#include "machine.h"

namespace cuda_sim {

namespace {

constexpr size_t kRedZone = 64;  // around each piece of shared memory
// NaN; and what is NaN in fp16 and -1.7e38 in bf16 and fp32, for whoever reads it.
constexpr unsigned char kPoison = 0xff, kCanary = 0xfe;

void land(const Copy& copy) {
  if (copy.from) {
    std::memcpy(copy.to, copy.from, copy.bytes);
  } else {
    std::memset(copy.to, 0, copy.bytes);
  }
}

}  // namespace

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

void* shared(const void* site, size_t bytes, const char* where) {
  Hidden hidden;
  Machine& m = machine();
  for (const Piece& p : m.pieces)
    if (p.site == site) return p.data;
  m.static_bytes += bytes;
  if (m.static_bytes > kStaticShared || m.static_bytes + m.dynamic_bytes > m.shared_limit)
    fail(where, "%zu bytes of static and %zu of dynamic shared memory", m.static_bytes,
         m.dynamic_bytes);
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

int allow_dynamic(const void* entry, int bytes) {
  Machine& m = machine();
  if (is_refused()) return m.error;
  if (bytes < 0 || static_cast<size_t>(bytes) > kDynamicShared) return m.error = 1;
  m.allowed[entry] = bytes;
  return 0;
}

void allow(const void* data, size_t bytes) {
  const char* begin = static_cast<const char*>(data);
  machine().extents.push_back({begin, begin + bytes});
}

}  // namespace cuda_sim
