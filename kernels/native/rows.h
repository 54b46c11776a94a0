// The loop over rows: fills the lanes with (row, column block) pairs, makes their normals and
// applies them. Included once for each set of instructions.
#pragma once

#include "chacha.h"
#include "normals.h"
#include "store.h"
#include "states.h"
#include "wide.h"

namespace {

// What the lanes work on. Filled a batch ahead, so that the rows are in the cache in time.
struct Batch {
  uint32_t high[2 * kLanes], low[2 * kLanes], from[2 * kLanes];  // words 12, 13, 14; room to spill
  struct Run {  // neighbouring column blocks of one row
    char *row;
    int64_t block;
    int first, end;  // lanes
    float decay, scale;
    int64_t entry, local;  // place in the list, row of the shard
  } run[kLanes];
  int runs;
  const char *place[kLanes];  // where the lanes' weights are, to be fetched
};

constexpr int64_t kTouched = 16;  // rows of a list whose addresses are translated in one go

alignas(64) constexpr uint32_t kCount[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// Walks over the (row, column block) pairs of a piece of work.
class Walk {
 public:
  Walk(const Job &job, int64_t first, int64_t last)
      : job_(job),
        row_(first - 1),  // the first call steps onto the first row
        last_(last),
        first_block_(job.column_offset / 16),
        end_block_((job.column_offset + job.num_columns + 15) / 16),
        size_(size_of(job.weight_kind)),
        block_(end_block_),
        touched_(first),
        next_touch_(job.rows.data != nullptr ? first : -1) {}

  void fill(Batch &batch) {
    int lane = 0;
    batch.runs = 0;
    while (lane < kLanes) {
      if (block_ == end_block_ && !next_row()) break;
      const int room = kLanes - lane;
      const int length = end_block_ - block_ < room ? static_cast<int>(end_block_ - block_) : room;
      batch.run[batch.runs++] = {row_start_, block_, lane, lane + length, decay_, scale_,
                                row_,       local_};
      const uint32_t high = high_ | static_cast<uint32_t>(block_);
      if (length < 4) {
        for (int i = 0; i < length; ++i) {
          batch.high[lane + i] = high + static_cast<uint32_t>(i);
          batch.low[lane + i] = low_;
          batch.from[lane + i] = from_;
        }
      } else {  // what spills over is overwritten by the next run, or belongs to idle lanes
        store(batch.high + lane, add(words(high), load(kCount)));
        store(batch.low + lane, words(low_));
        store(batch.from + lane, words(from_));
      }
      const char *place = row_start_ + (block_ * 16 - job_.column_offset) * step();
      for (int i = 0; i < length; ++i) batch.place[lane + i] = place + i * 16 * step();
      block_ += length;
      lane += length;
    }
    for (; lane < kLanes; ++lane) {
      batch.high[lane] = batch.low[lane] = batch.from[lane] = 0;
      batch.place[lane] = nullptr;  // may be fetched like any address
    }
  }

  // Bytes from one column to the next.
  int64_t step() const { return job_.column_stride * size_; }

 private:
  // Goes to the next row that needs noise; the others only decay.
  bool next_row() {
    while (++row_ < last_) {
      if (row_ == next_touch_) touch();
      local_ = local_row(row_);
      row_start_ = start_of(row_, local_);
      const uint64_t global = static_cast<uint64_t>(local_ + job_.row_offset);
      high_ = static_cast<uint32_t>(global >> 32) << 16;
      low_ = static_cast<uint32_t>(global);
      from_ = static_cast<uint32_t>(integer_at(job_.from_steps, row_));
      if (job_.state != nullptr) {
        if (owes_noise(*job_.state, row_)) break;
        fetch_later();
        // a row that is settled already is left as it is
        if (from_ != static_cast<uint32_t>(job_.to_step)) move_quietly(job_, row_start_, row_, local_);
        continue;
      }
      if (job_.decay.data == nullptr) break;
      decay_ = static_cast<float>(number_at(job_.decay, row_));
      scale_ = rounded_up(number_at(job_.scale, row_));
      if (scale_ > 0) break;
      fetch_later();
      decay_row(job_, row_start_, decay_);
    }
    if (row_ >= last_) return false;
    block_ = first_block_;
    return true;
  }

  int64_t local_row(int64_t row) const {
    return job_.rows.data != nullptr ? integer_at(job_.rows, row) : job_.first_row + row;
  }

  char *start_of(int64_t row, int64_t local) const {
    return static_cast<char *>(job_.weight) +
           (job_.decay.data != nullptr || job_.state != nullptr ? local : row) * job_.row_stride * size_;
  }

  // A prefetch whose address misses the translation buffer holds up what comes after it. One at a
  // time that costs more than the noise; many at once are translated side by side.
  void touch() {
    const int64_t end = next_touch_ + 2 * kTouched < last_ ? next_touch_ + 2 * kTouched : last_;
    for (; touched_ < end; ++touched_) {
      const int64_t local = local_row(touched_);
      __builtin_prefetch(start_of(touched_, local), 1);
      if (job_.state != nullptr) fetch_beside(*job_.state, job_.weight_kind, local, 0);
    }
    next_touch_ += kTouched;
  }

  // Rows without noise follow each other too fast for the batches' own fetching.
  void fetch_later() const {
    const int64_t later = row_ + 8;
    if (job_.rows.data == nullptr || later >= last_) return;
    const char *start = start_of(later, local_row(later));
    const int64_t lines = job_.column_stride == 1 ? (job_.num_columns * size_ + 63) / 64 : 0;
    for (int64_t i = 0; i < lines; ++i) __builtin_prefetch(start + 64 * i, 1);
  }

  static float rounded_up(double value) {
    const float result = static_cast<float>(value);
    // of a non-negative number, the next pattern is the next larger one
    return static_cast<double>(result) < value ? float_of(pattern_of(result) + 1) : result;
  }

  const Job &job_;
  int64_t row_, local_ = 0;
  const int64_t last_, first_block_, end_block_, size_;
  int64_t block_, touched_, next_touch_;
  char *row_start_ = nullptr;
  uint32_t high_ = 0, low_ = 0, from_ = 0;
  float decay_ = 0, scale_ = 1;
};

// The columns of a block that are ours: `skip` before them, `count` of them, from address `place`.
struct Piece {
  char *place;
  int skip, count;
};

inline Piece piece_of(const Job &job, const Batch::Run &run, int64_t block, int64_t step) {
  const int64_t before = block * 16 - job.column_offset;
  const int64_t begin = before < 0 ? 0 : before;
  const int64_t end = before + 16 < job.num_columns ? before + 16 : job.num_columns;
  return {run.row + begin * step, static_cast<int>(begin - before), static_cast<int>(end - begin)};
}

// The usual case: float32, neighbouring columns.
inline void apply_plain(const Job &job, const Batch::Run &run, const float (*z)[16]) {
  for (int lane = run.first; lane < run.end; ++lane) {
    const Piece piece = piece_of(job, run, run.block + lane - run.first, 4);
    float *w = reinterpret_cast<float *>(piece.place);
    if (piece.count == 16) {
      if (job.decay.data != nullptr) {
        update_block(w, z[lane], run.decay, run.scale);
      } else {
        memcpy(w, z[lane], 64);
      }
    } else if (job.decay.data != nullptr) {
      update(w, z[lane] + piece.skip, run.decay, run.scale, piece.count);
    } else {
      memcpy(w, z[lane] + piece.skip, 4 * static_cast<size_t>(piece.count));
    }
  }
}

// Half precision, or columns apart.
inline void apply_any(const Job &job, const Batch::Run &run, const float (*z)[16], int64_t step,
                      const uint32_t (*random)[kLanes]) {
  for (int lane = run.first; lane < run.end; ++lane) {
    const Piece piece = piece_of(job, run, run.block + lane - run.first, step);
    Sixteen s;
    if (job.decay.data != nullptr) {
      read_weights(job, piece.place, step, piece.count, s);
      if (piece.count == 16) {
        update_block(s.value, z[lane], run.decay, run.scale);
      } else {
        update(s.value, z[lane] + piece.skip, run.decay, run.scale, piece.count);
      }
    } else {
      memcpy(s.value, z[lane] + piece.skip, 4 * static_cast<size_t>(piece.count));
    }
    if (job.stochastic == 0) {
      write_weights(job, piece.place, step, piece.count, s, nullptr);
      continue;
    }
    uint32_t mine[32] = {};  // 16 bits a column, from the block's first one
    for (int i = 0; i < 8; ++i) {
      mine[2 * i] = random[i][lane] & 0xffff;
      mine[2 * i + 1] = random[i][lane] >> 16;
    }
    write_weights(job, piece.place, step, piece.count, s, mine + piece.skip);
  }
}

inline void apply_on_grid(const Job &job, const Batch::Run &run, const double (*z)[16]) {
  const double factor = static_cast<double>(run.scale) / job.grid;
  for (int lane = run.first; lane < run.end; ++lane) {
    const Piece piece = piece_of(job, run, run.block + lane - run.first, 4 * job.column_stride);
    float *w = reinterpret_cast<float *>(piece.place);
    for (int i = 0; i < piece.count; ++i) {
      float &value = w[i * job.column_stride];
      value = on_grid(value, run.decay, z[lane][piece.skip + i] * factor, job.grid);
    }
  }
}

void settle(const Job &job, int64_t first, int64_t last) {
  const Key key = read_key(job.key);
  const bool plain = job.weight_kind == kFloat32 && job.column_stride == 1;
  const Words to = words(static_cast<uint32_t>(job.to_step));
  Walk walk(job, first, last);
  Batch batches[2];
  walk.fill(batches[0]);
  for (int now = 0; batches[now].runs != 0; now = 1 - now) {
    const Batch &batch = batches[now];
    Batch &later = batches[1 - now];
    walk.fill(later);
    const Words input[4] = {load(batch.high), load(batch.low), load(batch.from), to};
    if (job.grid > 0) {
      alignas(64) double wide[kLanes][16];
      make_wide_half(key, input, job.rounds, 0, wide);
      make_wide_half(key, input, job.rounds, 1, wide);
      for (int i = 0; i < batch.runs; ++i) apply_on_grid(job, batch.run[i], wide);
      continue;
    }
    alignas(64) float z[kLanes][16];
    make_normals(key, input, job.rounds, z, later.place);
    if (plain) {
      for (int i = 0; i < batch.runs; ++i) apply_plain(job, batch.run[i], z);
      continue;
    }
    uint32_t random[8][kLanes];
    if (job.stochastic != 0) {
      const Words other[4] = {bit_or(input[0], words(kRoundingDomain)), input[1], input[2], to};
      Words x[16];
      chacha(key, other, job.rounds, x);
      for (int i = 0; i < 8; ++i) store(random[i], x[i]);
    }
    for (int i = 0; i < batch.runs; ++i) apply_any(job, batch.run[i], z, walk.step(), random);
  }
}

void make_blocks(const uint8_t *bytes, const uint32_t *inputs, int64_t count, int rounds,
                 uint32_t *output) {
  const Key key = read_key(bytes);
  for (int64_t first = 0; first < count; first += kLanes) {
    const int used = static_cast<int>(count - first < kLanes ? count - first : kLanes);
    uint32_t given[4][kLanes] = {}, made[16][kLanes];
    for (int lane = 0; lane < used; ++lane) {
      for (int i = 0; i < 4; ++i) given[i][lane] = inputs[4 * (first + lane) + i];
    }
    const Words input[4] = {load(given[0]), load(given[1]), load(given[2]), load(given[3])};
    Words x[16];
    chacha(key, input, rounds, x);
    for (int i = 0; i < 16; ++i) store(made[i], x[i]);
    for (int lane = 0; lane < used; ++lane) {
      for (int i = 0; i < 16; ++i) output[16 * (first + lane) + i] = made[i][lane];
    }
  }
}

}  // namespace
