// Weights that are not plain float32 rows: half precision, strided columns, and the grid.
#pragma once

namespace {

inline int64_t size_of(int32_t kind) { return kind == kFloat32 ? 4 : 2; }

inline uint32_t pattern_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

// Sixteen weights on their way between memory and float32. The loops have no branches and a fixed
// length, so that compilers turn them into vector instructions.
struct Sixteen {
  alignas(64) float value[16] = {};
  alignas(32) uint16_t half[16] = {};
};

inline void widen_float16(Sixteen &s) {
  for (int i = 0; i < 16; ++i) {
    const uint32_t h = s.half[i], sign = (h & 0x8000) << 16, rest = h & 0x7fff;
    // the exponent of float32 is biased by 112 more; exact for subnormal halves too
    const uint32_t finite = pattern_of(float_of(rest << 13) * 0x1p112f);
    s.value[i] = float_of(sign | (rest >= 0x7c00 ? 0x7f800000 | rest << 13 : finite));
  }
}

inline void widen_bfloat16(Sixteen &s) {
  for (int i = 0; i < 16; ++i) s.value[i] = float_of(static_cast<uint32_t>(s.half[i]) << 16);
}

// To nearest, ties to even; or up with the probability of the part cut off, by 16 random bits.
template <bool stochastic> inline void narrow_float16(Sixteen &s, const uint32_t *random) {
  for (int i = 0; i < 16; ++i) {
    const uint32_t bits = pattern_of(s.value[i]), sign = bits >> 16 & 0x8000;
    const uint32_t all = bits & 0x7fffffff;
    const uint32_t rest = all < 0x47800000 ? all : 0x47800000;  // 65536 is infinite in float16
    const uint32_t biased = rest >> 23 > 113 ? rest >> 23 : 113;
    // in units of the last place of a half; both steps are exact
    const float scaled = float_of(rest) * float_of((264 - biased) << 23);
    const int32_t whole = static_cast<int32_t>(scaled);
    const float part = scaled - static_cast<float>(whole);
    const int32_t up =
        stochastic ? (static_cast<int32_t>(part * 65536.0f) + static_cast<int32_t>(random[i])) >> 16
                   : static_cast<int32_t>(part > 0.5f) |
                         (static_cast<int32_t>(part == 0.5f) & whole & 1);
    // a carry out of the mantissa raises the exponent, up to infinity
    const uint32_t finite = ((biased - 113) << 10) + static_cast<uint32_t>(whole + up);
    s.half[i] = static_cast<uint16_t>(sign | (all > 0x7f800000 ? 0x7e00 : finite));
  }
}

template <bool stochastic> inline void narrow_bfloat16(Sixteen &s, const uint32_t *random) {
  for (int i = 0; i < 16; ++i) {
    const uint32_t bits = pattern_of(s.value[i]), rest = bits & 0x7fffffff;
    const uint32_t finite = bits + (stochastic ? random[i] : 0x7fff + (bits >> 16 & 1));
    const uint32_t special = bits | (rest > 0x7f800000 ? 0x400000 : 0);
    s.half[i] = static_cast<uint16_t>((rest < 0x7f800000 ? finite : special) >> 16);
  }
}

// Reads `count` weights, `step` bytes apart.
inline void read_weights(const Job &job, const char *p, int64_t step, int count, Sixteen &s) {
  if (job.weight_kind == kFloat32) {
    for (int i = 0; i < count; ++i) memcpy(&s.value[i], p + i * step, 4);
    return;
  }
  if (step == 2 && count == 16) {
    memcpy(s.half, p, 32);
  } else {
    for (int i = 0; i < count; ++i) memcpy(&s.half[i], p + i * step, 2);
  }
  if (job.weight_kind == kBFloat16) {
    widen_bfloat16(s);
  } else {
    widen_float16(s);
  }
}

// Writes them back; half precision is rounded at random where `random` is given.
inline void write_weights(const Job &job, char *p, int64_t step, int count, Sixteen &s,
                          const uint32_t *random) {
  if (job.weight_kind == kFloat32) {
    for (int i = 0; i < count; ++i) memcpy(p + i * step, &s.value[i], 4);
    return;
  }
  if (job.weight_kind == kBFloat16) {
    random != nullptr ? narrow_bfloat16<true>(s, random) : narrow_bfloat16<false>(s, random);
  } else {
    random != nullptr ? narrow_float16<true>(s, random) : narrow_float16<false>(s, random);
  }
  if (step == 2 && count == 16) {
    memcpy(p, s.half, 32);
  } else {
    for (int i = 0; i < count; ++i) memcpy(p + i * step, &s.half[i], 2);
  }
}

// w <- g (n + rint(r + scale z / g)), where decay w / g = n + r with n whole: one rounding.
inline float on_grid(float w, float decay, double noise, double grid) {
  constexpr double limit = 16777216.0;
  const double exact = static_cast<double>(decay) * static_cast<double>(w) / grid;
  const double whole = __builtin_rint(exact);
  double steps = whole + __builtin_rint((exact - whole) + noise);
  if (steps > limit) steps = limit;
  if (steps < -limit) steps = -limit;
  return static_cast<float>(steps * grid + 0.0);  // one zero: its sign would tell of w's
}

// A row without noise: no random bits, rounded to nearest.
inline void decay_row(const Job &job, char *start, float decay) {
  if (decay == 1.0f && !(job.grid > 0)) return;
  if (job.weight_kind == kFloat32 && job.column_stride == 1 && !(job.grid > 0)) {
    float *w = reinterpret_cast<float *>(start);
    for (int64_t column = 0; column < job.num_columns; ++column) w[column] *= decay;
    return;
  }
  const int64_t step = job.column_stride * size_of(job.weight_kind);
  for (int64_t column = 0; column < job.num_columns; column += 16) {
    const int64_t left = job.num_columns - column;
    const int count = left < 16 ? static_cast<int>(left) : 16;
    Sixteen s;
    read_weights(job, start + column * step, step, count, s);
    for (float &w : s.value) w = job.grid > 0 ? on_grid(w, decay, 0.0, job.grid) : w * decay;
    write_weights(job, start + column * step, step, count, s, nullptr);
  }
}

}  // namespace
