// What the Python face asks for, as plain memory. `native.py` declares the same fields.
#pragma once

#include <stdint.h>

enum Fault : int32_t {
  kFine = 0,
  kRowOutside = 1,
  kRowRepeated = 2,
  kStepOutside = 3,
  kNoiseWithoutStep = 4,
  kFactorInvalid = 5,
  kOutOfMemory = 6,
};

enum Kind : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3, kInt32 = 4, kInt64 = 5 };

// A column of numbers: `stride` 0 repeats the first one.
struct Column {
  const void *data;
  int64_t stride;
  int32_t kind;
};

// What rows have beside a float32 weight, and the moves they owe; `native_states.py` declares the
// same fields. Columns are neighbours in memory, strides in elements from row to row.
struct State {
  float *momentum;           // null: none
  int64_t momentum_stride;
  void *low;                 // null: float32 weights; else int16 beside bfloat16 (what the weight
  int64_t low_stride;        // lacks of its value), float32 beside float16 (the value itself)
  const uint8_t *second_key;  // of z_2, where there is a momentum
  const double *transition;  // a row for each row to settle: with momentum (ww, wm, mw, mm),
  int64_t transition_stride;  // else (decay)
  const double *noise;       // with momentum (a, b, c), else (deviation)
  int64_t noise_stride;
};

struct Job {
  void *weight;            // or the output, where normals are asked for
  int64_t num_rows;        // of the shard
  int64_t num_columns;
  int64_t row_stride;      // in elements
  int64_t column_stride;
  Column rows;             // local row numbers; data null: first_row, first_row + 1, ...
  Column from_steps;
  Column decay;            // data null: store the normals and read nothing
  Column scale;
  int64_t first_row;
  int64_t count;
  int64_t to_step;
  int64_t row_offset;
  int64_t column_offset;
  double grid;             // 0: none; else a power of two
  const uint8_t *key;      // 32 bytes
  int32_t weight_kind;
  int32_t stochastic;      // half precision: round by random bits
  int32_t rounds;
  const State *state;      // null: the weight is all; else `decay` and `scale` are not used
};

// A shard that lookups read, described once; `native.py` declares the same fields.
struct Table {
  void *weight;
  int64_t num_rows;
  int64_t num_columns;
  int64_t row_stride;
  int64_t column_stride;
  int32_t *history;        // the step each row is settled to
  const uint8_t *key;
  int64_t row_offset;
  int64_t column_offset;
  int32_t weight_kind;
};

// One piece of work of one thread: the rows [first, last) of the job's list.
typedef void (*Worker)(const Job &job, int64_t first, int64_t last);

// Raw blocks: words 12..15 of block i are inputs[4 i ..], its output goes to output[16 i ..].
typedef void (*BlockMaker)(const uint8_t *key, const uint32_t *inputs, int64_t count, int rounds,
                           uint32_t *output);

struct Implementation {
  Worker settle;           // jobs without a state
  Worker settle_states;    // jobs with one
  BlockMaker blocks;
};

extern const Implementation kPortable;
#if defined(__x86_64__)
extern const Implementation kAvx2;
extern const Implementation kAvx512;
#endif

inline int64_t integer_at(const Column &c, int64_t i) {
  const int64_t at = i * c.stride;
  return c.kind == kInt32 ? static_cast<const int32_t *>(c.data)[at]
                          : static_cast<const int64_t *>(c.data)[at];
}

inline double number_at(const Column &c, int64_t i) {
  const int64_t at = i * c.stride;
  return c.kind == kFloat32 ? static_cast<const float *>(c.data)[at]
                            : static_cast<const double *>(c.data)[at];
}
