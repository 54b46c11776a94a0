// The library's C interface: checks of values, choice of instructions, threads.
//
// It knows nothing of Python or torch: the caller passes addresses and keeps them alive. Every
// check of a job's values is made by `dist_dp_check` before anything is written.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cfenv>
#include <cmath>
#include <vector>

#include "job.h"
#include "team.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr int32_t kInterface = 4;  // raised when a function or Job changes
constexpr int64_t kChunk = 1 << 15;  // numbers made by a thread before it asks for more

const Implementation *implementation(int32_t isa) {
#if defined(__x86_64__)
  if (isa == 2) return &kAvx512;
  if (isa == 1) return &kAvx2;
#endif
  return &kPortable;
}

// Rounding to nearest and subnormal numbers for as long as it lives, whatever the calling thread
// has set (torch.set_flush_denormal, say): results must not depend on which thread makes them.
class PlainArithmetic {
 public:
  PlainArithmetic() {
    std::fegetenv(&before_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~PlainArithmetic() { std::fesetenv(&before_); }
  PlainArithmetic(const PlainArithmetic &) = delete;
  PlainArithmetic &operator=(const PlainArithmetic &) = delete;

 private:
  std::fenv_t before_;
};

struct Piece {
  const Job *job;
  int64_t first;
  int64_t last;
};

// The rows already seen: a bit for each row of the shard, or a hash table if those are too many.
class Seen {
 public:
  Seen(int64_t count, int64_t num_rows) : dense_(num_rows / 64 <= count) {
    size_t slots = 1;
    if (dense_) {
      slots = static_cast<size_t>(num_rows / 64 + 1);
    } else {
      while (slots < 2 * static_cast<size_t>(count)) slots *= 2;
    }
    mask_ = slots - 1;
    table_ = static_cast<uint64_t *>(calloc(slots, 8));
  }
  ~Seen() { free(table_); }
  Seen(const Seen &) = delete;
  Seen &operator=(const Seen &) = delete;

  bool ready() const { return table_ != nullptr; }

  // Notes a row; false if it was there already.
  bool insert(int64_t row) {
    if (dense_) {
      uint64_t &word = table_[row >> 6];
      const uint64_t bit = uint64_t{1} << (row & 63);
      if ((word & bit) != 0) return false;
      word |= bit;
      return true;
    }
    const uint64_t entry = static_cast<uint64_t>(row) + 1;
    size_t at = static_cast<size_t>((entry * 0x9E3779B97F4A7C15u) >> 20) & mask_;
    while (table_[at] != 0) {
      if (table_[at] == entry) return false;
      at = (at + 1) & mask_;
    }
    table_[at] = entry;
    return true;
  }

 private:
  bool dense_;
  size_t mask_;
  uint64_t *table_;
};

int32_t check_rows(const Job &job, int64_t *where) {
  bool increasing = true;
  int64_t before = -1;
  for (int64_t i = 0; i < job.count; ++i) {
    const int64_t row = integer_at(job.rows, i);
    *where = i;
    if (row < 0 || row >= job.num_rows) return kRowOutside;
    increasing = increasing && row > before;
    before = row;
  }
  if (increasing) return kFine;
  Seen seen(job.count, job.num_rows);
  if (!seen.ready()) return kOutOfMemory;
  for (int64_t i = 0; i < job.count; ++i) {
    *where = i;
    if (!seen.insert(integer_at(job.rows, i))) return kRowRepeated;
  }
  return kFine;
}

// Finite in float32 and at least 0; NaN fails the comparison. (FLT_MAX rounds to itself, and the
// next double above it still does up to half a unit; above that it becomes infinite.)
bool is_factor(double x, bool round_up) {
  constexpr double largest = 3.4028234663852886e38;
  return x >= 0 && (round_up ? x <= largest : std::isfinite(static_cast<float>(x)));
}

// The move of a row with a state: finite in float32, standard deviations at least 0.
bool is_move(const State &state, int64_t i, bool *noisy) {
  const double *t = state.transition + i * state.transition_stride;
  const double *n = state.noise + i * state.noise_stride;
  if (state.momentum == nullptr) {
    *noisy = n[0] > 0;
    return is_factor(t[0], false) && is_factor(n[0], true);
  }
  *noisy = n[0] != 0 || n[1] != 0 || n[2] != 0;
  bool fine = is_factor(n[0], true) && is_factor(std::fabs(n[1]), true) && is_factor(n[2], true);
  for (int k = 0; k < 4; ++k) fine = fine && is_factor(std::fabs(t[k]), false);
  return fine;
}

}  // namespace

EXPORT int32_t dist_dp_interface() { return kInterface; }

// From now on work is shared out among the threads of an OpenMP runtime; `parallel` is its
// GOMP_parallel. Nothing may be running.
EXPORT void dist_dp_use_team(Team parallel) {
  the_team = parallel;
  team_owner = getpid();
}

// 0: portable, 1: AVX2 with fused multiply-add, 2: AVX-512.
EXPORT int32_t dist_dp_best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
    return 2;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
  return 0;
}

// The first fault among a job's values and where it is, or kFine. Writes nothing.
EXPORT int32_t dist_dp_check(const Job *job, int64_t *where) {
  *where = 0;
  const PlainArithmetic plain;  // a subnormal scale is noise, too
  if (job->rows.data != nullptr) {
    const int32_t fault = check_rows(*job, where);
    if (fault != kFine) return fault;
  }
  if (job->state != nullptr) {
    for (int64_t i = 0; i < job->count; ++i) {
      *where = i;
      const int64_t step = integer_at(job->from_steps, i);
      if (step < 0 || step > job->to_step) return kStepOutside;
      bool noisy;
      if (!is_move(*job->state, i, &noisy)) return kFactorInvalid;
      if (noisy && step == job->to_step) return kNoiseWithoutStep;
    }
    return kFine;
  }
  const bool update = job->decay.data != nullptr;
  const bool same = job->from_steps.stride == 0 &&
                    (!update || (job->decay.stride == 0 && job->scale.stride == 0));
  const int64_t last = same && job->count > 1 ? 1 : job->count;
  for (int64_t i = 0; i < last; ++i) {
    *where = i;
    const int64_t step = integer_at(job->from_steps, i);
    if (step < 0 || step > job->to_step) return kStepOutside;
    bool noisy = true;
    if (update) {
      const double scale = number_at(job->scale, i);
      if (!is_factor(number_at(job->decay, i), false) || !is_factor(scale, true)) {
        return kFactorInvalid;
      }
      noisy = scale > 0;
    }
    if (noisy && step == job->to_step) return kNoiseWithoutStep;
  }
  return kFine;
}

// Does checked jobs, one set of threads for all; the caller holds the memory until it returns.
EXPORT void dist_dp_settle(const Job *jobs, int64_t num_jobs, int32_t threads, int32_t isa) {
  const Implementation &chosen = *implementation(isa);
  std::vector<Piece> pieces;
  for (const Job *job = jobs; job != jobs + num_jobs; ++job) {
    if (job->num_columns <= 0) continue;
    const int64_t rows = job->num_columns < kChunk ? kChunk / job->num_columns : 1;
    for (int64_t first = 0; first < job->count; first += rows) {
      pieces.push_back({job, first, first + rows < job->count ? first + rows : job->count});
    }
  }
  share_out(threads, static_cast<int64_t>(pieces.size()), [&] {
    return [&, plain = PlainArithmetic()](int64_t i) {
      const Piece &piece = pieces[static_cast<size_t>(i)];
      const Worker work = piece.job->state != nullptr ? chosen.settle_states : chosen.settle;
      work(*piece.job, piece.first, piece.last);
    };
  });
}

// Settles the rows that dist_dp_take_stale found. Where some tables have a state, `states` has an
// entry for each of them, with what its rows owe in place of `decay` and `scale`. Returns 0, or the
// fault among the steps and factors of table *where; nothing is written in that case.
EXPORT int32_t dist_dp_settle_tables(const Table *tables, int64_t num_tables, const int64_t *rows,
                                     const int32_t *from_steps, const int64_t *taken,
                                     int64_t to_step, const double *decay, const double *scale,
                                     const State *states, double grid,
                                     int32_t rounds, int32_t threads, int32_t isa,
                                     int64_t *where) {
  std::vector<Job> jobs(static_cast<size_t>(num_tables));
  int64_t first = 0;
  for (int64_t t = 0; t < num_tables; ++t) {
    const Table &table = tables[t];
    Job &job = jobs[static_cast<size_t>(t)];
    job = Job{};
    job.weight = table.weight;
    job.num_rows = table.num_rows;
    job.num_columns = table.num_columns;
    job.row_stride = table.row_stride;
    job.column_stride = table.column_stride;
    job.from_steps = {from_steps + first, 1, kInt32};
    if (states == nullptr) {
      job.decay = {decay + first, 1, kFloat64};
      job.scale = {scale + first, 1, kFloat64};
    } else if (states[t].momentum != nullptr || states[t].low != nullptr) {
      job.state = &states[t];
    } else {
      job.decay = {states[t].transition, states[t].transition_stride, kFloat64};
      job.scale = {states[t].noise, states[t].noise_stride, kFloat64};
    }
    job.count = taken[t];
    job.to_step = to_step;
    job.row_offset = table.row_offset;
    job.column_offset = table.column_offset;
    job.grid = grid;
    job.key = table.key;
    job.weight_kind = table.weight_kind;
    job.stochastic = table.weight_kind != kFloat32;
    job.rounds = rounds;
    int64_t entry;
    const int32_t fault = dist_dp_check(&job, &entry);
    if (fault != kFine) {
      *where = t;
      return fault;
    }
    job.rows = {rows + first, 1, kInt64};
    first += taken[t];
  }
  dist_dp_settle(jobs.data(), num_tables, threads, isa);
  return kFine;
}

EXPORT void dist_dp_blocks(const uint8_t *key, const uint32_t *inputs, int64_t count,
                           int32_t rounds, uint32_t *output, int32_t isa) {
  implementation(isa)->blocks(key, inputs, count, rounds, output);
}
