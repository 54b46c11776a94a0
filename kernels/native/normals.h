// Random words to standard normals: Box and Muller's transform in float32, each step rounded as
// IEEE 754 says, so that every processor gives the same bits. The reference in `reference.py` is
// the same, operation by operation; the constants are explained there.
#pragma once

namespace {

constexpr uint32_t kTailBelow = 1u << 20;  // fewer leading bits than this need more of them
constexpr uint32_t kTailDomain = 1u << 13;
constexpr uint32_t kWideLowDomain = 2u << 13, kWideHighDomain = 3u << 13;
constexpr uint32_t kRoundingDomain = 4u << 13;

// -2 log(1 + f) = -2 f + f^2 + f^3 P(f) for sqrt(1/2) <= 1 + f <= sqrt(2)
constexpr float kLog[8] = {-0x1.555554p-1f, 0x1.000226p-1f, -0x1.99a01cp-2f, 0x1.54728ap-2f,
                           -0x1.22d930p-2f, 0x1.0d8246p-2f, -0x1.055eaep-2f, 0x1.38c974p-3f};
constexpr float kMinusTwoLn2 = -0x1.62e430p+0f;
// sin(pi/4 x) = x (high + S(x^2)), cos(pi/4 x) = 1 + x^2 C(x^2)
constexpr float kSinHigh = 0x1.921fb6p-1f;
constexpr float kSin[4] = {-0x1.a32bdep-26f, -0x1.4abbbap-4f, 0x1.465eeap-9f, -0x1.2da156p-15f};
constexpr float kCos[4] = {-0x1.3bd3ccp-2f, 0x1.03c1b0p-6f, -0x1.55b2b4p-12f, 0x1.d4f632p-19f};

template <int n> inline Floats polynomial(const float (&c)[n], Floats x) {
  Floats total = floats(c[n - 1]);
  for (int i = n - 2; i >= 0; --i) total = fma(total, x, floats(c[i]));
  return total;
}

// The distance of u to 0 where its first 32 bits are nearly used up: 32 more decide.
__attribute__((noinline)) Floats refine(const Key &key, const Words input[4], int rounds, int pair,
                                        unsigned lanes, Words radius, Floats near) {
  uint32_t first[kLanes], extra[kLanes];
  float value[kLanes];
  const Words tail[4] = {bit_or(input[0], words(kTailDomain)), input[1], input[2], input[3]};
  Words block[16];
  chacha(key, tail, rounds, block);
  store(extra, block[2 * pair]);
  store(first, radius);
  store(value, near);
  for (int lane = 0; lane < kLanes; ++lane) {
    if ((lanes >> lane & 1) != 0) {
      const uint64_t k = (static_cast<uint64_t>(first[lane]) << 32 | extra[lane]) | 1;
      // below 2^52, so a double holds it and one rounding is made
      value[lane] = static_cast<float>(static_cast<double>(k) * 0x1p-64);
    }
  }
  return load(value);
}

// The words 2 p and 2 p + 1 of a block become two normals, in their place.
inline void box_muller(const Key &key, const Words input[4], int rounds, int pair, Words radius,
                       Words angle, Floats &first, Floats &second) {
  // u = odd 2^-32 in (0, 1); `near` is its distance to the nearer end, exact in 31 bits
  const Words folded = bit_xor(radius, shift_signed<31>(radius));
  Floats near = mul(to_float(bit_or(folded, words(1))), floats(0x1p-32f));
  const unsigned tail = bits(below(radius, kTailBelow));
  if (__builtin_expect(tail != 0, 0)) {
    near = refine(key, input, rounds, pair, tail, radius, near);
  }
  const Floats u = choose(has_bit(radius, 0x80000000u), sub(floats(1.0f), near), near);
  const Words exponent = shift_signed<23>(sub(as_words(u), words(0x3f3504f3)));  // of sqrt(1/2)
  Floats f = sub(as_float(sub(as_words(u), shift_left<23>(exponent))), floats(1.0f));
  f = choose(is_zero(exponent), sub(floats(0.0f), near), f);  // u itself has lost bits near 1
  const Floats square = mul(f, f);
  Floats log = fma(mul(square, f), polynomial(kLog, f), square);
  log = fma(floats(-2.0f), f, log);
  log = fma(to_float(exponent), floats(kMinusTwoLn2), log);
  const Floats length = square_root(log);

  // 30 bits for x in (-1, 1), a quarter of the circle; one exchanges, one is the sign of both
  const Words quarter = bit_or(shift_left<2>(angle), words(2));
  const Floats x = mul(to_float(quarter), floats(0x1p-31f));
  const Floats y = mul(x, x);
  const Floats sine = fma(x, floats(kSinHigh), mul(x, polynomial(kSin, y)));
  const Floats cosine = fma(y, polynomial(kCos, y), floats(1.0f));
  const Mask exchange = has_bit(angle, 0x40000000u);
  const Floats turned =
      as_float(bit_xor(as_words(length), bit_and(angle, words(0x80000000u))));
  first = mul(turned, choose(exchange, sine, cosine));
  second = mul(turned, choose(exchange, cosine, sine));
}

// z[lane][c] <- column 16 b + c, for the lane's row and column block b.
inline void make_normals(const Key &key, const Words input[4], int rounds, float (*z)[16],
                         const char *const *fetch) {
  Words x[16];
  Floats columns[16];
  chacha(key, input, rounds, x);
#pragma GCC unroll 1
  for (int pair = 0; pair < 8; ++pair) {
    // a few at a time: the processor has room for a dozen lines on their way
    for (int i = 0; i < kLanes / 8; ++i) __builtin_prefetch(fetch[kLanes / 8 * pair + i], 1);
    box_muller(key, input, rounds, pair, x[2 * pair], x[2 * pair + 1], columns[2 * pair],
               columns[2 * pair + 1]);
  }
  transpose(columns, z);
}

}  // namespace
