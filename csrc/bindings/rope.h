// What the bindings of rope share between CPU and CUDA: checks, outputs, and whether q and k may be
// turned in place.
#pragma once
#include "common.h"

namespace llmops {

constexpr const char* kRopeName = "llmops.rope";

inline void check_heads(const Tensor& x) {
  LLMOPS_CHECK(x.dim() == 4, kRopeName, ": x must be [B, H, T, D], got ", x.dim(), " dimensions");
}

// [B, H, T, D], in memory as such or, token_major, as [B, T, H, D].
inline Tensor output_like(const Tensor& x, bool token_major) {
  const auto size = x.sizes();
  const int64_t sizes[4] = {size[0], size[1], size[2], size[3]};
  auto at_least_1 = [](int64_t n) { return n > 0 ? n : 1; };
  const int64_t heads = at_least_1(size[1]), tokens = at_least_1(size[2]),
                dim = at_least_1(size[3]);
  const int64_t strides[4] = {heads * tokens * dim, token_major ? dim : tokens * dim,
                              token_major ? heads * dim : dim, 1};
  return new_output_strided(x, sizes, strides, 4, x.scalar_type());
}

inline void check_pair(const Tensor& q, const Tensor& k) {
  check_heads(q);
  check_heads(k);
  LLMOPS_CHECK(q.size(0) == k.size(0) && q.size(2) == k.size(2) && q.size(3) == k.size(3),
               kRopeName, "_qk: q and k must agree in batch, tokens and head dim");
  LLMOPS_CHECK(q.scalar_type() == k.scalar_type(), kRopeName, "_qk: q is ",
               dtype_name(q.scalar_type()), ", k is ", dtype_name(k.scalar_type()),
               "; they must have one dtype");
}

// The memory of a tensor as nested runs, largest stride first; sizes of 1 do not count.
struct Extent {
  int64_t strides[4], sizes[4];
  int count = 0;
  explicit Extent(const Tensor& t) {
    for (int64_t d = 0; d < 4; ++d) {
      if (t.size(d) == 1) continue;
      int at = count++;
      for (; at > 0 && strides[at - 1] < t.stride(d); --at) {
        strides[at] = strides[at - 1];
        sizes[at] = sizes[at - 1];
      }
      strides[at] = t.stride(d);
      sizes[at] = t.size(d);
    }
  }
  // Elements from the first to one past the last, over the runs from `from` on.
  int64_t span(int from) const {
    int64_t result = 1;
    for (int i = from; i < count; ++i) result += (sizes[i] - 1) * strides[i];
    return result;
  }
  bool overlaps_itself() const {
    for (int i = 0; i < count; ++i)
      if (strides[i] < span(i + 1)) return true;
    return false;
  }
};

// True when q and k, `offset` >= 0 elements behind q, provably share no element: their outer
// strides agree, and within one such stride the two lie side by side (a fused projection's layout).
inline bool disjoint(const Extent& q, const Extent& k, int64_t offset) {
  for (int i = 0;; ++i) {
    if (offset >= q.span(i)) return true;
    if (i >= q.count || i >= k.count || q.strides[i] != k.strides[i]) return false;
    offset %= q.strides[i];
    // k's run must not reach into q's next one.
    if (offset + k.span(i + 1) > q.strides[i]) return false;
  }
}

// Refuses what turning in place would turn twice.
inline void check_in_place(const Tensor& q, const Tensor& k) {
  if (q.numel() > 0 && k.numel() > 0) {
    const Extent q_extent(q), k_extent(k);
    const char* remedy = "; use llmops.rope_qk, which writes new tensors";
    LLMOPS_CHECK(!q_extent.overlaps_itself(), kRopeName,
                 "_qk_: q's elements share memory (expanded or overlapping strides)", remedy);
    LLMOPS_CHECK(!k_extent.overlaps_itself(), kRopeName,
                 "_qk_: k's elements share memory (expanded or overlapping strides)", remedy);
    const int64_t offset =
        (static_cast<const char*>(k.data_ptr()) - static_cast<const char*>(q.data_ptr())) /
        element_size(q.scalar_type());
    LLMOPS_CHECK(
        offset >= 0 ? disjoint(q_extent, k_extent, offset) : disjoint(k_extent, q_extent, -offset),
        kRopeName, "_qk_: q and k share memory", remedy);
  }
  LLMOPS_CHECK((q.size(3) <= 1 || q.stride(3) == 1) && (k.size(3) <= 1 || k.stride(3) == 1),
               kRopeName, "_qk_: the head dim must have stride 1; use llmops.rope_qk");
}

}  // namespace llmops
