// Rows with more than a float32 weight: a momentum, or a half-precision weight beside the rest of
// its float32 value. Moves are made in float64, each operation rounded by itself, and what is
// stored is rounded to float32 once.
#pragma once

namespace {

// (weight, momentum) <- [ww wm; mw mm] (weight, momentum) + (b z_1 + c z_2, a z_1); without a
// momentum, weight <- ww weight + b z_1.
struct Move {
  double ww, wm, mw, mm, a, b, c;
};

inline Move move_of(const State &state, int64_t entry) {
  const double *t = state.transition + entry * state.transition_stride;
  const double *n = state.noise + entry * state.noise_stride;
  if (state.momentum == nullptr) return {t[0], 0, 0, 0, 0, n[0], 0};
  return {t[0], t[1], t[2], t[3], n[0], n[1], n[2]};
}

inline bool owes_noise(const State &state, int64_t entry) {
  const Move move = move_of(state, entry);
  return move.a != 0 || move.b != 0 || move.c != 0;
}

// Sixteen columns of a row on their way between memory and float32. Loops have a fixed length and
// no branches, so that compilers turn them into vector instructions.
struct SixteenStates {
  Sixteen weight;
  alignas(32) int16_t low[16] = {};
  alignas(64) float momentum[16] = {};
};

inline void join_bfloat16(SixteenStates &s) {
  for (int i = 0; i < 16; ++i) {
    const uint32_t high = static_cast<uint32_t>(s.weight.half[i]) << 16;
    s.weight.value[i] = float_of(high + static_cast<uint32_t>(static_cast<int32_t>(s.low[i])));
  }
}

// The weight nearest to the value (ties away from 0), and the difference of their patterns.
inline void split_bfloat16(SixteenStates &s) {
  for (int i = 0; i < 16; ++i) {
    const uint32_t given = pattern_of(s.weight.value[i]);
    const uint32_t bits = (given & 0x7fffffff) > 0x7f800000 ? 0x7fc00000 : given;
    const uint32_t high = (bits + 0x8000) >> 16;
    s.weight.half[i] = static_cast<uint16_t>(high);
    s.low[i] = static_cast<int16_t>(static_cast<uint16_t>(bits - (high << 16)));
  }
}

// Where `count` columns (at most 16) of one row are.
struct Place {
  char *weight, *low;
  float *momentum;
  int count;
};

// Of 16 columns the copies have a length that the compiler knows.
inline void copy(void *to, const void *from, int count, size_t size) {
  if (count == 16) {
    if (size == 2) {
      memcpy(to, from, 32);
    } else {
      memcpy(to, from, 64);
    }
  } else {
    memcpy(to, from, static_cast<size_t>(count) * size);
  }
}

inline void read_states(int32_t kind, const Place &p, SixteenStates &s) {
  if (kind == kBFloat16) {
    copy(s.weight.half, p.weight, p.count, 2);
    copy(s.low, p.low, p.count, 2);
    join_bfloat16(s);
  } else {
    copy(s.weight.value, kind == kFloat16 ? p.low : p.weight, p.count, 4);
  }
  if (p.momentum != nullptr) copy(s.momentum, p.momentum, p.count, 4);
}

inline void write_states(int32_t kind, const Place &p, SixteenStates &s) {
  if (kind == kBFloat16) {
    split_bfloat16(s);
    copy(p.low, s.low, p.count, 2);
  } else {
    copy(kind == kFloat16 ? p.low : p.weight, s.weight.value, p.count, 4);
    if (kind == kFloat16) narrow_float16<false>(s.weight, nullptr);
  }
  if (kind != kFloat32) copy(p.weight, s.weight.half, p.count, 2);
  if (p.momentum != nullptr) copy(p.momentum, s.momentum, p.count, 4);
}

// The move without its noise.
inline void carry(const Move &move, float *weight, float *momentum, bool moving) {
  if (!moving) {
    for (int i = 0; i < 16; ++i) weight[i] = static_cast<float>(move.ww * weight[i]);
    return;
  }
  for (int i = 0; i < 16; ++i) {
    const double w = weight[i], m = momentum[i];
    weight[i] = static_cast<float>(move.ww * w + move.wm * m);
    momentum[i] = static_cast<float>(move.mw * w + move.mm * m);
  }
}

// The move with its noise; `second` is null where c is 0.
inline void carry_noisily(const Move &move, float *weight, float *momentum, bool moving,
                          const float *first, const float *second) {
  if (!moving) {
    for (int i = 0; i < 16; ++i) {
      weight[i] = static_cast<float>(move.ww * weight[i] + move.b * first[i]);
    }
    return;
  }
  if (second == nullptr) {
    for (int i = 0; i < 16; ++i) {
      const double w = weight[i], m = momentum[i], z = first[i];
      weight[i] = static_cast<float>((move.ww * w + move.wm * m) + move.b * z);
      momentum[i] = static_cast<float>((move.mw * w + move.mm * m) + move.a * z);
    }
    return;
  }
  for (int i = 0; i < 16; ++i) {
    const double w = weight[i], m = momentum[i], z = first[i], own = second[i];
    weight[i] = static_cast<float>(((move.ww * w + move.wm * m) + move.b * z) + move.c * own);
    momentum[i] = static_cast<float>((move.mw * w + move.mm * m) + move.a * z);
  }
}

inline int64_t low_size(int32_t kind) { return kind == kFloat16 ? 4 : 2; }

// The columns [column, column + count) of a row that begins at `row`.
inline Place place_of(const Job &job, char *row, int64_t local, int64_t column, int count) {
  const State &s = *job.state;
  Place place = {row + column * size_of(job.weight_kind), nullptr, nullptr, count};
  if (s.low != nullptr) {
    place.low = static_cast<char *>(s.low) +
                (local * s.low_stride + column) * low_size(job.weight_kind);
  }
  if (s.momentum != nullptr) place.momentum = s.momentum + local * s.momentum_stride + column;
  return place;
}

// Asks for what lies beside a column of a row's weight, ahead of its use.
inline void fetch_beside(const State &s, int32_t kind, int64_t local, int64_t column) {
  if (s.low != nullptr) {
    __builtin_prefetch(
        static_cast<char *>(s.low) + (local * s.low_stride + column) * low_size(kind), 1);
  }
  if (s.momentum != nullptr) {
    __builtin_prefetch(s.momentum + local * s.momentum_stride + column, 1);
  }
}

// A row that owes no noise.
inline void move_quietly(const Job &job, char *row, int64_t entry, int64_t local) {
  const Move move = move_of(*job.state, entry);
  for (int64_t column = 0; column < job.num_columns; column += 16) {
    const int64_t left = job.num_columns - column;
    const Place place = place_of(job, row, local, column, left < 16 ? static_cast<int>(left) : 16);
    SixteenStates s;
    read_states(job.weight_kind, place, s);
    carry(move, s.weight.value, s.momentum, place.momentum != nullptr);
    write_states(job.weight_kind, place, s);
  }
}

}  // namespace
