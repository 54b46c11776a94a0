// The loop over rows: fills the lanes with (row, column block) pairs, makes their normals and
// applies them. Included once for each set of instructions.
#pragma once

#include "chacha.h"
#include "normals.h"
#include "wide.h"
#include "store.h"

namespace {

// What each lane works on. Filled two batches ahead, so that the rows are in the cache in time.
struct Batch {
  uint32_t high[kLanes], low[kLanes], from[kLanes];  // words 12, 13, 14
  char *place[kLanes];                               // address of the lane's first column
  float decay[kLanes], scale[kLanes];
  int skip[kLanes], count[kLanes];                   // columns of the block that are ours
  int used;
};

constexpr int kAhead = 2;

// Walks over the (row, column block) pairs of a piece of work.
class Walk {
 public:
  Walk(const Job &job, int64_t first, int64_t last)
      : job_(job), row_(first), last_(last), size_(size_of(job.weight_kind)) {
    first_block_ = job.column_offset / 16;
    end_block_ = (job.column_offset + job.num_columns + 15) / 16;
    block_ = end_block_;
    --row_;  // the first call steps onto the first row
  }

  void fill(Batch &batch) {
    int lane = 0;
    while (lane < kLanes) {
      if (block_ == end_block_ && !next_row()) break;
      const int64_t begin = block_ * 16 < job_.column_offset ? job_.column_offset : block_ * 16;
      const int64_t full = block_ * 16 + 16, limit = job_.column_offset + job_.num_columns;
      const int64_t end = full < limit ? full : limit;
      batch.high[lane] = high_ | static_cast<uint32_t>(block_);
      batch.low[lane] = low_;
      batch.from[lane] = from_;
      batch.decay[lane] = decay_;
      batch.scale[lane] = scale_;
      batch.skip[lane] = static_cast<int>(begin - block_ * 16);
      batch.count[lane] = static_cast<int>(end - begin);
      batch.place[lane] =
          start_ + (begin - job_.column_offset) * job_.column_stride * size_;
      __builtin_prefetch(batch.place[lane], 1);
      ++block_;
      ++lane;
    }
    batch.used = lane;
    for (; lane < kLanes; ++lane) batch.high[lane] = batch.low[lane] = batch.from[lane] = 0;
  }

 private:
  // Goes to the next row that needs noise; the others only decay.
  bool next_row() {
    while (++row_ < last_) {
      const int64_t local =
          job_.rows.data != nullptr ? integer_at(job_.rows, row_) : job_.first_row + row_;
      start_ = static_cast<char *>(job_.weight) +
               (job_.decay.data != nullptr ? local : row_) * job_.row_stride * size_;
      const uint64_t global = static_cast<uint64_t>(local + job_.row_offset);
      high_ = static_cast<uint32_t>(global >> 32) << 16;
      low_ = static_cast<uint32_t>(global);
      from_ = static_cast<uint32_t>(integer_at(job_.from_steps, row_));
      if (job_.decay.data == nullptr) {
        block_ = first_block_;
        return true;
      }
      decay_ = static_cast<float>(number_at(job_.decay, row_));
      scale_ = rounded_up(number_at(job_.scale, row_));
      if (scale_ > 0) {
        block_ = first_block_;
        return true;
      }
      decay_row(job_, start_, decay_);
    }
    return false;
  }

  static float rounded_up(double value) {
    float result = static_cast<float>(value);
    if (static_cast<double>(result) < value) {
      uint32_t bits;
      memcpy(&bits, &result, 4);
      ++bits;  // of a non-negative number: the next larger one
      memcpy(&result, &bits, 4);
    }
    return result;
  }

  const Job &job_;
  int64_t row_, last_, block_, first_block_, end_block_, size_;
  char *start_ = nullptr;
  uint32_t high_ = 0, low_ = 0, from_ = 0;
  float decay_ = 0, scale_ = 1;
};

void settle(const Job &job, int64_t first, int64_t last) {
  const Key key = read_key(job.key);
  Walk walk(job, first, last);
  Batch ring[kAhead + 1];
  for (int i = 0; i < kAhead; ++i) walk.fill(ring[i]);
  alignas(64) float z[kLanes][16];
  for (int now = 0;; now = now == kAhead ? 0 : now + 1) {
    const Batch &batch = ring[now];
    if (batch.used == 0) return;
    walk.fill(ring[now == 0 ? kAhead : now - 1]);
    const Words input[4] = {load(batch.high), load(batch.low), load(batch.from),
                            words(static_cast<uint32_t>(job.to_step))};
    if (job.grid > 0) {
      settle_on_grid(job, key, input, batch.place, batch.decay, batch.scale, batch.skip,
                     batch.count, batch.used);
      continue;
    }
    make_normals(key, input, job.rounds, z);
    if (job.weight_kind == kFloat32 && job.column_stride == 1) {
      for (int lane = 0; lane < batch.used; ++lane) {
        float *w = reinterpret_cast<float *>(batch.place[lane]);
        const float *mine = z[lane] + batch.skip[lane];
        if (job.decay.data != nullptr) {
          update(w, mine, batch.decay[lane], batch.scale[lane], batch.count[lane]);
        } else {
          memcpy(w, mine, 4 * static_cast<size_t>(batch.count[lane]));
        }
      }
      continue;
    }
    uint32_t random[8][kLanes];
    if (job.stochastic != 0) {
      const Words other[4] = {bit_or(input[0], words(kRoundingDomain)), input[1], input[2],
                              input[3]};
      Words x[16];
      chacha(key, other, job.rounds, x);
      for (int i = 0; i < 8; ++i) store(random[i], x[i]);
    }
    for (int lane = 0; lane < batch.used; ++lane) {
      uint32_t mine[8];
      for (int i = 0; i < 8; ++i) mine[i] = job.stochastic != 0 ? random[i][lane] : 0;
      update_any(job, batch.place[lane], z[lane], batch.skip[lane], batch.count[lane],
                 batch.decay[lane], batch.scale[lane], mine);
    }
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
