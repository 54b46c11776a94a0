// Sixteen lanes in plain arrays, for any processor. Included by rows_portable.cpp alone.
#pragma once

#include <stdint.h>
#include <string.h>

namespace {

constexpr int kLanes = 16;

template <class T> struct Lanes {
  T of[kLanes];
};
using Words = Lanes<uint32_t>;
using Floats = Lanes<float>;
using Mask = unsigned;  // bit i: lane i

template <class R, class Function> inline R each(Function function) {
  R result;
  for (int i = 0; i < kLanes; ++i) result.of[i] = function(i);
  return result;
}

inline Words load(const uint32_t *p) {
  return each<Words>([&](int i) { return p[i]; });
}
inline void store(uint32_t *p, const Words &x) { memcpy(p, x.of, sizeof(x.of)); }
inline Floats load(const float *p) {
  return each<Floats>([&](int i) { return p[i]; });
}
inline void store(float *p, const Floats &x) { memcpy(p, x.of, sizeof(x.of)); }
inline Words words(uint32_t x) {
  return each<Words>([&](int) { return x; });
}
inline Floats floats(float x) {
  return each<Floats>([&](int) { return x; });
}

inline Words add(const Words &a, const Words &b) {
  return each<Words>([&](int i) { return a.of[i] + b.of[i]; });
}
inline Words sub(const Words &a, const Words &b) {
  return each<Words>([&](int i) { return a.of[i] - b.of[i]; });
}
inline Words bit_or(const Words &a, const Words &b) {
  return each<Words>([&](int i) { return a.of[i] | b.of[i]; });
}
inline Words bit_and(const Words &a, const Words &b) {
  return each<Words>([&](int i) { return a.of[i] & b.of[i]; });
}
inline Words bit_xor(const Words &a, const Words &b) {
  return each<Words>([&](int i) { return a.of[i] ^ b.of[i]; });
}
template <int n> inline Words rotate(const Words &x) {
  return each<Words>([&](int i) { return (x.of[i] << n) | (x.of[i] >> (32 - n)); });
}
template <int n> inline Words shift_left(const Words &x) {
  return each<Words>([&](int i) { return x.of[i] << n; });
}
template <int n> inline Words shift_signed(const Words &x) {
  return each<Words>([&](int i) {
    const uint32_t sign = static_cast<uint32_t>(-static_cast<int64_t>(x.of[i] >> 31));
    return (x.of[i] >> n) | (sign << (32 - n));
  });
}

inline Floats add(const Floats &a, const Floats &b) {
  return each<Floats>([&](int i) { return a.of[i] + b.of[i]; });
}
inline Floats sub(const Floats &a, const Floats &b) {
  return each<Floats>([&](int i) { return a.of[i] - b.of[i]; });
}
inline Floats mul(const Floats &a, const Floats &b) {
  return each<Floats>([&](int i) { return a.of[i] * b.of[i]; });
}
inline Floats fma(const Floats &a, const Floats &b, const Floats &c) {
  return each<Floats>([&](int i) { return __builtin_fmaf(a.of[i], b.of[i], c.of[i]); });
}
inline Floats square_root(const Floats &x) {
  return each<Floats>([&](int i) { return __builtin_sqrtf(x.of[i]); });
}
inline Floats to_float(const Words &x) {  // signed, to nearest
  return each<Floats>([&](int i) { return static_cast<float>(static_cast<int32_t>(x.of[i])); });
}
inline Floats as_float(const Words &x) {
  Floats result;
  memcpy(result.of, x.of, sizeof(x.of));
  return result;
}
inline Words as_words(const Floats &x) {
  Words result;
  memcpy(result.of, x.of, sizeof(x.of));
  return result;
}

template <class Test> inline Mask mask(Test test) {
  Mask m = 0;
  for (int i = 0; i < kLanes; ++i) m |= static_cast<Mask>(test(i)) << i;
  return m;
}
inline Mask is_zero(const Words &x) {
  return mask([&](int i) { return x.of[i] == 0; });
}
inline Mask below(const Words &x, uint32_t bound) {
  return mask([&](int i) { return x.of[i] < bound; });
}
inline Mask has_bit(const Words &x, uint32_t bit) {
  return mask([&](int i) { return (x.of[i] & bit) != 0; });
}
inline unsigned bits(Mask m) { return m; }
inline Floats choose(Mask m, const Floats &yes, const Floats &no) {
  return each<Floats>([&](int i) { return (m >> i & 1) != 0 ? yes.of[i] : no.of[i]; });
}

// rows[lane][column] <- columns[column] of that lane.
inline void transpose(const Floats *columns, float (*rows)[16]) {
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int column = 0; column < 16; ++column) rows[lane][column] = columns[column].of[lane];
  }
}

// w <- fl(fl(decay w) + fl(scale z)) on sixteen neighbouring floats.
inline void update_block(float *w, const float *z, float decay, float scale) {
  for (int i = 0; i < 16; ++i) w[i] = decay * w[i] + scale * z[i];
}

// The same on `count` neighbouring floats, count at most 16.
inline void update(float *w, const float *z, float decay, float scale, int count) {
  for (int i = 0; i < count; ++i) w[i] = decay * w[i] + scale * z[i];
}

}  // namespace
