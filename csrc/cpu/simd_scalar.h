// Vec with one lane: plain C++, the path for any processor. Included by simd.h.
#pragma once

namespace llmops::cpu::LLMOPS_ISA {

constexpr int W = 1;
struct Vec {
  float v;
};
struct Mask {
  bool v;
};

LLMOPS_INLINE Vec set1(float x) { return {x}; }
LLMOPS_INLINE Vec zero() { return {0.0f}; }
template <class T>
LLMOPS_INLINE Vec load(const T* p) {
  return {to_float(*p)};
}
template <class T>
LLMOPS_INLINE void store(T* p, Vec a) {
  from_float(a.v, p);
}
// No cache-bypassing store in plain C++.
template <class T>
LLMOPS_INLINE void stream(T* p, Vec a) {
  store(p, a);
}
LLMOPS_INLINE void stream_fence() {}
// First n lanes of memory, `fill` in the rest; nothing past p[n-1] is read.
template <class T>
LLMOPS_INLINE Vec load_n(const T* p, int n, float fill = 0.0f) {
  return {n > 0 ? to_float(*p) : fill};
}
template <class T>
LLMOPS_INLINE void store_n(T* p, Vec a, int n) {
  if (n > 0) from_float(a.v, p);
}

// a as the second argument's type holds it: rounded, and widened again.
template <class T>
LLMOPS_INLINE Vec round_as(Vec a, T rounded) {
  from_float(a.v, &rounded);
  return {to_float(rounded)};
}

// Stores a; what the memory now holds.
template <class T>
LLMOPS_INLINE Vec store_rounded(T* p, Vec a) {
  from_float(a.v, p);
  return {to_float(*p)};
}

LLMOPS_INLINE Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
LLMOPS_INLINE Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
LLMOPS_INLINE Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
LLMOPS_INLINE Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
LLMOPS_INLINE Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
LLMOPS_INLINE Vec fnma(Vec a, Vec b, Vec c) { return {c.v - a.v * b.v}; }
// As the vector instructions: the second operand where either is NaN.
LLMOPS_INLINE Vec max(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
LLMOPS_INLINE Vec min(Vec a, Vec b) { return {a.v < b.v ? a.v : b.v}; }
LLMOPS_INLINE Vec sqrt(Vec a) { return {__builtin_sqrtf(a.v)}; }
LLMOPS_INLINE Vec abs(Vec a) { return {bits_float(float_bits(a.v) & 0x7fffffffu)}; }
// Nearest integer; |x| < 2^22.
LLMOPS_INLINE Vec round(Vec a) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: the sum has no fraction bits left
  const float shifted = a.v + magic;
  return {shifted - magic};
}
// p * 2^n for integer-valued n in [-252, 254], in two factors: no early overflow or underflow.
LLMOPS_INLINE Vec scale_by_power(Vec p, Vec n) {
  if (n.v != n.v) return n;  // a NaN has no integer value
  const int whole = static_cast<int>(n.v), half = whole >> 1, rest = whole - half;
  return {p.v * bits_float(static_cast<uint32_t>(half + 127) << 23) *
          bits_float(static_cast<uint32_t>(rest + 127) << 23)};
}

// The same for p near 1 and n in [-127, 127], by the exponent bits alone: p = 1, n = -127 is 0.
LLMOPS_INLINE Vec scale_by_small_power(Vec p, Vec n) {
  if (n.v != n.v) return n;
  return {bits_float(float_bits(p.v) + (static_cast<uint32_t>(static_cast<int>(n.v)) << 23))};
}

LLMOPS_INLINE Mask first_n(int n) { return {n > 0}; }
LLMOPS_INLINE Mask lanes_ge(int bound) { return {0 >= bound}; }
LLMOPS_INLINE Mask less(Vec a, Vec b) { return {a.v < b.v}; }
LLMOPS_INLINE Mask equal(Vec a, Vec b) { return {a.v == b.v}; }
LLMOPS_INLINE Vec select(Mask m, Vec a, Vec b) { return m.v ? a : b; }
// One byte per lane, non-zero keeps.
LLMOPS_INLINE Mask load_mask_n(const uint8_t* p, int n) { return {n > 0 && *p != 0}; }

// 32 unsigned bits to a lane, for random numbers.
struct Bits {
  uint32_t v;
};
LLMOPS_INLINE Bits set1_bits(uint32_t x) { return {x}; }
LLMOPS_INLINE Bits load_bits(const uint32_t* p) { return {*p}; }
LLMOPS_INLINE Bits operator^(Bits a, Bits b) { return {a.v ^ b.v}; }
// a * b, 64 bits wide.
LLMOPS_INLINE void mul_wide(Bits a, uint32_t b, Bits* high, Bits* low) {
  const uint64_t product = static_cast<uint64_t>(a.v) * b;
  high->v = static_cast<uint32_t>(product >> 32);
  low->v = static_cast<uint32_t>(product);
}
LLMOPS_INLINE Mask below(Bits a, uint32_t b) { return {a.v < b}; }

// Bit i set where lane i is.
LLMOPS_INLINE uint32_t mask_bits(Mask m) { return m.v; }
LLMOPS_INLINE Mask mask_and(Mask a, Mask b) { return {a.v && b.v}; }

// (low, high) hold x0 y0 x1 y1 ...; x and y get the even and the odd places, and back.
LLMOPS_INLINE void deinterleave(Vec low, Vec high, Vec* x, Vec* y) {
  *x = low;
  *y = high;
}
LLMOPS_INLINE void interleave(Vec x, Vec y, Vec* low, Vec* high) {
  *low = x;
  *high = y;
}

LLMOPS_INLINE float reduce_add(Vec a) { return a.v; }
LLMOPS_INLINE float reduce_max(Vec a) { return a.v; }
LLMOPS_INLINE float first_lane(Vec a) { return a.v; }
// The W x W transpose and the W sums, for one lane.
LLMOPS_INLINE void transpose(Vec*) {}
LLMOPS_INLINE Vec reduce_each(const Vec* r) { return r[0]; }

}  // namespace llmops::cpu::LLMOPS_ISA
