// Sixteen lanes in AVX-512 registers. Included by rows_avx512.cpp alone.
#pragma once

#include <immintrin.h>
#include <stdint.h>

namespace {

using Words = __m512i;   // one 32-bit word of each lane
using Floats = __m512;   // one float of each lane
using Mask = __mmask16;  // one truth value of each lane

constexpr int kLanes = 16;

inline Words load(const uint32_t *p) { return _mm512_loadu_si512(p); }
inline void store(uint32_t *p, Words x) { _mm512_storeu_si512(p, x); }
inline Floats load(const float *p) { return _mm512_loadu_ps(p); }
inline void store(float *p, Floats x) { _mm512_storeu_ps(p, x); }
inline Words words(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
inline Floats floats(float x) { return _mm512_set1_ps(x); }

inline Words add(Words a, Words b) { return _mm512_add_epi32(a, b); }
inline Words sub(Words a, Words b) { return _mm512_sub_epi32(a, b); }
inline Words bit_or(Words a, Words b) { return _mm512_or_si512(a, b); }
inline Words bit_and(Words a, Words b) { return _mm512_and_si512(a, b); }
inline Words bit_xor(Words a, Words b) { return _mm512_xor_si512(a, b); }
template <int n> inline Words rotate(Words x) { return _mm512_rol_epi32(x, n); }
template <int n> inline Words shift_left(Words x) { return _mm512_slli_epi32(x, n); }
template <int n> inline Words shift_signed(Words x) { return _mm512_srai_epi32(x, n); }

inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
inline Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats square_root(Floats x) { return _mm512_sqrt_ps(x); }
inline Floats to_float(Words x) { return _mm512_cvtepi32_ps(x); }  // signed, to nearest
inline Floats as_float(Words x) { return _mm512_castsi512_ps(x); }
inline Words as_words(Floats x) { return _mm512_castps_si512(x); }

inline Mask is_zero(Words x) { return _mm512_testn_epi32_mask(x, x); }
inline Mask below(Words x, uint32_t bound) {
  return _mm512_cmplt_epu32_mask(x, words(bound));
}
inline Mask has_bit(Words x, uint32_t bit) { return _mm512_test_epi32_mask(x, words(bit)); }
inline unsigned bits(Mask m) { return m; }
inline Floats choose(Mask m, Floats yes, Floats no) { return _mm512_mask_blend_ps(m, no, yes); }

// rows[lane][column] <- columns[column] of that lane.
inline void transpose(const Floats *columns, float (*rows)[16]) {
  __m512 a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_ps(columns[i], columns[i + 1]);
    a[i + 1] = _mm512_unpackhi_ps(columns[i], columns[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int k = 0; k < 2; ++k) {
      const __m512d low = _mm512_castps_pd(a[i + k]), high = _mm512_castps_pd(a[i + k + 2]);
      b[i + 2 * k] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      b[i + 2 * k + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  }
  // b[4 g + j] holds columns 4 g .. 4 g + 3 of the lanes j, 4 + j, 8 + j, 12 + j
  for (int j = 0; j < 4; ++j) {
    const __m512 low = _mm512_shuffle_f32x4(b[j], b[4 + j], 0x88);
    const __m512 low2 = _mm512_shuffle_f32x4(b[8 + j], b[12 + j], 0x88);
    const __m512 high = _mm512_shuffle_f32x4(b[j], b[4 + j], 0xdd);
    const __m512 high2 = _mm512_shuffle_f32x4(b[8 + j], b[12 + j], 0xdd);
    store(rows[j], _mm512_shuffle_f32x4(low, low2, 0x88));
    store(rows[4 + j], _mm512_shuffle_f32x4(high, high2, 0x88));
    store(rows[8 + j], _mm512_shuffle_f32x4(low, low2, 0xdd));
    store(rows[12 + j], _mm512_shuffle_f32x4(high, high2, 0xdd));
  }
}

// w <- fl(fl(decay w) + fl(scale z)) on sixteen neighbouring floats.
inline void update_block(float *w, const float *z, float decay, float scale) {
  store(w, add(mul(floats(decay), load(w)), mul(floats(scale), load(z))));
}

// The same on `count` neighbouring floats, count at most 16.
inline void update(float *w, const float *z, float decay, float scale, int count) {
  const Mask m = static_cast<Mask>((1u << count) - 1);
  const Floats kept = mul(floats(decay), _mm512_maskz_loadu_ps(m, w));
  _mm512_mask_storeu_ps(w, m, add(kept, mul(floats(scale), _mm512_maskz_loadu_ps(m, z))));
}

}  // namespace
