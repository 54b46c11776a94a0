// The ChaCha block function, one block in each lane. RFC 8439, section 2.3.
#pragma once

namespace {

struct Key {
  uint32_t word[8];
};

inline Key read_key(const uint8_t *bytes) {
  Key key;
  for (int i = 0; i < 8; ++i) {
    key.word[i] = static_cast<uint32_t>(bytes[4 * i]) | static_cast<uint32_t>(bytes[4 * i + 1]) << 8 |
                  static_cast<uint32_t>(bytes[4 * i + 2]) << 16 |
                  static_cast<uint32_t>(bytes[4 * i + 3]) << 24;
  }
  return key;
}

constexpr uint32_t kConstants[4] = {0x61707865, 0x3320646e, 0x79622d32, 0x6b206574};

inline void quarter_round(Words &a, Words &b, Words &c, Words &d) {
  a = add(a, b);
  d = rotate<16>(bit_xor(d, a));
  c = add(c, d);
  b = rotate<12>(bit_xor(b, c));
  a = add(a, b);
  d = rotate<8>(bit_xor(d, a));
  c = add(c, d);
  b = rotate<7>(bit_xor(b, c));
}

// x[i] <- word i of every lane's block; input[0..3] are the words 12..15.
inline void chacha(const Key &key, const Words input[4], int rounds, Words x[16]) {
  for (int i = 0; i < 4; ++i) x[i] = words(kConstants[i]);
  for (int i = 0; i < 8; ++i) x[4 + i] = words(key.word[i]);
  for (int i = 0; i < 4; ++i) x[12 + i] = input[i];
  for (int round = 0; round < rounds; round += 2) {
    quarter_round(x[0], x[4], x[8], x[12]);
    quarter_round(x[1], x[5], x[9], x[13]);
    quarter_round(x[2], x[6], x[10], x[14]);
    quarter_round(x[3], x[7], x[11], x[15]);
    quarter_round(x[0], x[5], x[10], x[15]);
    quarter_round(x[1], x[6], x[11], x[12]);
    quarter_round(x[2], x[7], x[8], x[13]);
    quarter_round(x[3], x[4], x[9], x[14]);
  }
  for (int i = 0; i < 4; ++i) x[i] = add(x[i], words(kConstants[i]));
  for (int i = 0; i < 8; ++i) x[4 + i] = add(x[4 + i], words(key.word[i]));
  for (int i = 0; i < 4; ++i) x[12 + i] = add(x[12 + i], input[i]);
}

}  // namespace
