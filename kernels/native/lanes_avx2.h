// Eight lanes in AVX2 registers, with fused multiply-add. Included by rows_avx2.cpp alone.
#pragma once

#include <immintrin.h>
#include <stdint.h>

namespace {

using Words = __m256i;  // one 32-bit word of each lane
using Floats = __m256;  // one float of each lane
using Mask = __m256i;   // all bits of a lane set, or none

constexpr int kLanes = 8;

inline Words load(const uint32_t *p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
}
inline void store(uint32_t *p, Words x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), x);
}
inline Floats load(const float *p) { return _mm256_loadu_ps(p); }
inline void store(float *p, Floats x) { _mm256_storeu_ps(p, x); }
inline Words words(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
inline Floats floats(float x) { return _mm256_set1_ps(x); }

inline Words add(Words a, Words b) { return _mm256_add_epi32(a, b); }
inline Words sub(Words a, Words b) { return _mm256_sub_epi32(a, b); }
inline Words bit_or(Words a, Words b) { return _mm256_or_si256(a, b); }
inline Words bit_and(Words a, Words b) { return _mm256_and_si256(a, b); }
inline Words bit_xor(Words a, Words b) { return _mm256_xor_si256(a, b); }
template <int n> inline Words shift_left(Words x) { return _mm256_slli_epi32(x, n); }
template <int n> inline Words shift_signed(Words x) { return _mm256_srai_epi32(x, n); }
template <int n> inline Words rotate(Words x) {
  return bit_or(_mm256_slli_epi32(x, n), _mm256_srli_epi32(x, 32 - n));
}
template <> inline Words rotate<16>(Words x) {  // whole bytes move in one shuffle
  const __m256i order = _mm256_setr_epi8(2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13, 2,
                                         3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
  return _mm256_shuffle_epi8(x, order);
}
template <> inline Words rotate<8>(Words x) {
  const __m256i order = _mm256_setr_epi8(3, 0, 1, 2, 7, 4, 5, 6, 11, 8, 9, 10, 15, 12, 13, 14, 3,
                                         0, 1, 2, 7, 4, 5, 6, 11, 8, 9, 10, 15, 12, 13, 14);
  return _mm256_shuffle_epi8(x, order);
}

inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
inline Floats sub(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
inline Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats square_root(Floats x) { return _mm256_sqrt_ps(x); }
inline Floats to_float(Words x) { return _mm256_cvtepi32_ps(x); }  // signed, to nearest
inline Floats as_float(Words x) { return _mm256_castsi256_ps(x); }
inline Words as_words(Floats x) { return _mm256_castps_si256(x); }

inline Mask is_zero(Words x) { return _mm256_cmpeq_epi32(x, _mm256_setzero_si256()); }
inline Mask below(Words x, uint32_t bound) {  // unsigned
  return _mm256_cmpeq_epi32(_mm256_min_epu32(x, words(bound - 1)), x);
}
inline Mask has_bit(Words x, uint32_t bit) {
  return _mm256_cmpeq_epi32(bit_and(x, words(bit)), words(bit));
}
inline unsigned bits(Mask m) {
  return static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(m)));
}
inline Floats choose(Mask m, Floats yes, Floats no) {
  return _mm256_blendv_ps(no, yes, _mm256_castsi256_ps(m));
}

// rows[lane][column] <- columns[column] of that lane.
inline void transpose(const Floats *columns, float (*rows)[16]) {
  for (int half = 0; half < 16; half += 8) {
    const Floats *x = columns + half;
    __m256 a[8], b[8];
    for (int i = 0; i < 8; i += 2) {
      a[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
      a[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
      for (int k = 0; k < 2; ++k) {
        b[i + 2 * k] = _mm256_shuffle_ps(a[i + k], a[i + k + 2], 0x44);
        b[i + 2 * k + 1] = _mm256_shuffle_ps(a[i + k], a[i + k + 2], 0xee);
      }
    }
    for (int j = 0; j < 4; ++j) {
      store(rows[j] + half, _mm256_permute2f128_ps(b[j], b[4 + j], 0x20));
      store(rows[4 + j] + half, _mm256_permute2f128_ps(b[j], b[4 + j], 0x31));
    }
  }
}

// w <- fl(fl(decay w) + fl(scale z)) on sixteen neighbouring floats.
inline void update_block(float *w, const float *z, float decay, float scale) {
  const Floats a = floats(decay), s = floats(scale);
  store(w, add(mul(a, load(w)), mul(s, load(z))));
  store(w + 8, add(mul(a, load(w + 8)), mul(s, load(z + 8))));
}

// The same on `count` neighbouring floats, count at most 16.
inline void update(float *w, const float *z, float decay, float scale, int count) {
  const Floats a = floats(decay), s = floats(scale);
  int i = 0;
  for (; i + 8 <= count; i += 8) {
    store(w + i, add(mul(a, load(w + i)), mul(s, load(z + i))));
  }
  for (; i < count; ++i) w[i] = decay * w[i] + scale * z[i];
}

}  // namespace
