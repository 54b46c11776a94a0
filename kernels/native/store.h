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

inline float from_half(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, rest = h & 0x7fff;
  if (rest >= 0x7c00) return float_of(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  if (rest >= 0x400) return float_of(sign | ((rest << 13) + 0x38000000));
  return float_of(sign | pattern_of(static_cast<float>(rest) * 0x1p-24f));
}

// To nearest, ties to even, or up with the probability of the part cut off (16 random bits).
inline uint16_t to_half(float x, bool stochastic, uint32_t random) {
  const uint32_t bits = pattern_of(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (rest == 0x7f800000) return static_cast<uint16_t>(sign | 0x7c00);
  int exponent = static_cast<int>(rest >> 23) - 127;
  if (exponent > 15) return static_cast<uint16_t>(sign | 0x7c00);
  if (exponent < -14) exponent = -14;
  // in units of the last place of a half; both steps are exact
  const float scaled = float_of(rest) * float_of(static_cast<uint32_t>(127 - exponent + 10) << 23);
  uint32_t whole = static_cast<uint32_t>(scaled);
  const float part = scaled - static_cast<float>(whole);
  if (stochastic) {
    whole += (static_cast<uint32_t>(part * 65536.0f) + random) >> 16;
  } else {
    whole += part > 0.5f || (part == 0.5f && (whole & 1) != 0);
  }
  // a carry out of the mantissa raises the exponent, up to infinity
  const uint32_t base = static_cast<uint32_t>(exponent + 14) << 10;
  return static_cast<uint16_t>(sign | (base + whole));
}

inline float from_brain(uint16_t b) { return float_of(static_cast<uint32_t>(b) << 16); }

inline uint16_t to_brain(float x, bool stochastic, uint32_t random) {
  const uint32_t bits = pattern_of(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 0x40);
  if ((bits & 0x7fffffff) == 0x7f800000) return static_cast<uint16_t>(bits >> 16);
  return static_cast<uint16_t>(
      (bits + (stochastic ? random : 0x7fff + (bits >> 16 & 1))) >> 16);
}

inline float read_weight(const Job &job, const char *p) {
  if (job.weight_kind == kFloat32) return *reinterpret_cast<const float *>(p);
  const uint16_t bits = *reinterpret_cast<const uint16_t *>(p);
  return job.weight_kind == kBFloat16 ? from_brain(bits) : from_half(bits);
}

inline void write_weight(const Job &job, char *p, float value, uint32_t random) {
  if (job.weight_kind == kFloat32) {
    *reinterpret_cast<float *>(p) = value;
  } else if (job.weight_kind == kBFloat16) {
    *reinterpret_cast<uint16_t *>(p) = to_brain(value, job.stochastic != 0, random);
  } else {
    *reinterpret_cast<uint16_t *>(p) = to_half(value, job.stochastic != 0, random);
  }
}

// Any kind and stride, by way of sixteen floats.
inline void update_any(const Job &job, char *place, const float *z, int skip, int count,
                       float decay, float scale, const uint32_t *random) {
  const int64_t step = job.column_stride * size_of(job.weight_kind);
  alignas(64) float values[16] = {};
  if (job.decay.data != nullptr) {
    for (int i = 0; i < count; ++i) values[i] = read_weight(job, place + i * step);
    update(values, z + skip, decay, scale, count);
  } else {
    for (int i = 0; i < count; ++i) values[i] = z[skip + i];
  }
  for (int i = 0; i < count; ++i) {
    const int column = skip + i;
    write_weight(job, place + i * step, values[i], random[column / 2] >> 16 * (column & 1) & 0xffff);
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
  return static_cast<float>(steps * grid);
}

// A row without noise: no random bits, rounded to nearest.
inline void decay_row(const Job &job, char *start, float decay) {
  const int64_t size = size_of(job.weight_kind);
  if (decay == 1.0f && !(job.grid > 0)) return;
  if (job.weight_kind == kFloat32 && job.column_stride == 1 && !(job.grid > 0)) {
    float *w = reinterpret_cast<float *>(start);
    for (int64_t column = 0; column < job.num_columns; ++column) w[column] *= decay;
    return;
  }
  for (int64_t column = 0; column < job.num_columns; ++column) {
    char *p = start + column * job.column_stride * size;
    const float w = read_weight(job, p);
    if (job.grid > 0) {
      write_weight(job, p, on_grid(w, decay, 0.0, job.grid), 0);
    } else if (job.weight_kind == kFloat32) {
      write_weight(job, p, w * decay, 0);
    } else {
      *reinterpret_cast<uint16_t *>(p) = job.weight_kind == kBFloat16
                                             ? to_brain(decay * w, false, 0)
                                             : to_half(decay * w, false, 0);
    }
  }
}

}  // namespace
