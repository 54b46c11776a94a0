// Normals in float64 from 128 random bits a pair, for weights on a grid: the reference's
// `portable` functions, operation by operation. No fused multiply-add here.
#pragma once

namespace {

constexpr double kLn2High = 0x1.62e42fefa3800p-1, kLn2Low = 0x1.ef35793c76730p-45;
constexpr double kPi = 3.14159265358979323846;

inline double log_of(double x) {
  int64_t pattern, power;
  memcpy(&pattern, &x, 8);
  power = (pattern - 0x3FE6A09E00000000) >> 52;
  pattern -= static_cast<int64_t>(static_cast<uint64_t>(power) << 52);
  double mantissa;
  memcpy(&mantissa, &pattern, 8);
  const double f = mantissa - 1.0;
  const double s = f / (mantissa + 1.0), square = s * s;
  double p = square * (1.0 / 23.0);
  for (int n = 21; n >= 3; n -= 2) p = (p + 1.0 / n) * square;
  double correction = p * 2.0;
  correction = (correction - f) * s;
  const double e = static_cast<double>(power);
  correction = correction + e * kLn2Low;
  return e * kLn2High + (f + correction);
}

inline double sine_of(double t) {
  const double y = t * t;
  double p = y * (1.0 / 355687428096000.0);
  constexpr double c[7] = {-1.0 / 1307674368000.0, 1.0 / 6227020800.0, -1.0 / 39916800.0,
                           1.0 / 362880.0,         -1.0 / 5040.0,      1.0 / 120.0,
                           -1.0 / 6.0};
  for (int i = 0; i < 7; ++i) p = (p + c[i]) * y;
  return p * t + t;
}

inline double cosine_of(double t) {
  const double y = t * t;
  double p = y * (-1.0 / 6402373705728000.0);
  constexpr double c[8] = {1.0 / 20922789888000.0, -1.0 / 87178291200.0, 1.0 / 479001600.0,
                           -1.0 / 3628800.0,       1.0 / 40320.0,        -1.0 / 720.0,
                           1.0 / 24.0,             -1.0 / 2.0};
  for (int i = 0; i < 8; ++i) p = (p + c[i]) * y;
  return p + 1.0;
}

// z[lane][8 half + c] <- the eight normals of one block.
inline void make_wide_half(const Key &key, const Words input[4], int rounds, int half,
                           double (*z)[16]) {
  const Words mine[4] = {bit_or(input[0], words(half == 0 ? kWideLowDomain : kWideHighDomain)),
                         input[1], input[2], input[3]};
  Words x[16];
  uint32_t word[16][kLanes];
  chacha(key, mine, rounds, x);
  for (int i = 0; i < 16; ++i) store(word[i], x[i]);
  for (int pair = 0; pair < 4; ++pair) {
    double first[kLanes], second[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      const uint32_t *w = &word[4 * pair][lane];
      double u = static_cast<double>(w[kLanes]) * 4294967296.0 + static_cast<double>(w[0]);
      u = (u + 0.5) * 0x1p-64;
      const double length = __builtin_sqrt(log_of(u) * -2.0);
      const uint32_t upper = w[3 * kLanes];
      double t = static_cast<double>(static_cast<int32_t>(upper << 2)) * 4294967296.0;
      t = t + (static_cast<double>(w[2 * kLanes]) * 4.0 + 2.0);
      t = t * (kPi / 2.0 * 0x1p-64);
      const double sine = sine_of(t), cosine = cosine_of(t);
      const bool exchange = (upper & 0x40000000u) != 0;
      const double turned = (upper >> 31) != 0 ? -length : length;
      first[lane] = turned * (exchange ? sine : cosine);
      second[lane] = turned * (exchange ? cosine : sine);
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      z[lane][8 * half + 2 * pair] = first[lane];
      z[lane][8 * half + 2 * pair + 1] = second[lane];
    }
  }
}

}  // namespace
