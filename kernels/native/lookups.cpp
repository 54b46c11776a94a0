// What a lookup's row numbers are asked before its rows are read: which are stale, and how often
// each occurs in its bag. One pass over the numbers, nothing sorted.
#include <stdint.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "job.h"
#include "team.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr int64_t kAhead = 16;       // how far in front the history is fetched from memory
constexpr int64_t kPairwise = 16;    // bags up to this length compare every pair of entries
constexpr int64_t kFewIds = 4096;    // so few are not worth waking threads for
constexpr int64_t kBagsAPiece = 64;  // bags that a thread counts before it asks for more

template <typename Id>
int64_t first_outside(const Id *ids, int64_t count, int64_t num_rows) {
  for (int64_t i = 0; i < count; ++i) {
    if (ids[i] < 0 || static_cast<int64_t>(ids[i]) >= num_rows) return i;
  }
  return -1;
}

template <typename Id>
int64_t take_stale(const Id *ids, int64_t count, int32_t *history, int32_t older_than,
                   int32_t to_step, int64_t *rows, int32_t *from_steps) {
  int64_t taken = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (i + kAhead < count) __builtin_prefetch(history + ids[i + kAhead], 1, 1);
    const int64_t row = ids[i];
    const int32_t step = history[row];
    if (step >= older_than) continue;
    // Marked at once, so that the row's next occurrence is not stale any more.
    history[row] = to_step;
    rows[taken] = row;
    from_steps[taken] = step;
    ++taken;
  }
  return taken;
}

// The rows of one bag with the sum of their entries' weights, in the order they came.
template <typename Id>
class Sums {
 public:
  void clear(int64_t count) {
    size_t slots = 64;
    while (slots < 4 * static_cast<size_t>(count)) slots *= 2;
    if (slots > slots_.size()) slots_.assign(slots, 0);
    mask_ = slots - 1;
    // Entries left by earlier bags are told by their numbers, which are below `base_`.
    if (base_ > kLastBase) {
      std::fill(slots_.begin(), slots_.end(), 0);
      base_ = 0;
    }
    base_ += rows_.size();
    rows_.clear();
    sums_.clear();
  }

  void add(Id row, double weight) {
    size_t at = static_cast<size_t>((static_cast<uint64_t>(row) * 0x9E3779B97F4A7C15u) >> 40) & mask_;
    for (; slots_[at] > base_; at = (at + 1) & mask_) {
      const size_t entry = slots_[at] - base_ - 1;
      if (rows_[entry] == row) {
        sums_[entry] += weight;
        return;
      }
    }
    rows_.push_back(row);
    sums_.push_back(weight);
    slots_[at] = static_cast<uint32_t>(base_ + rows_.size());
  }

  double squares() const {
    double total = 0;
    for (const double sum : sums_) total += sum * sum;
    return total;
  }

 private:
  static constexpr uint64_t kLastBase = 1u << 31;
  std::vector<uint32_t> slots_;  // base_ + 1 + the entry's number; anything up to base_ is free
  std::vector<Id> rows_;
  std::vector<double> sums_;
  uint64_t base_ = 0;
  size_t mask_ = 0;
};

// The sum over distinct rows r of (sum of the weights of r's entries)^2, for one bag.
template <typename Id>
double repeats(const Id *ids, const float *weights, int64_t count, Sums<Id> &sums) {
  if (count > kPairwise) {
    sums.clear(count);
    for (int64_t i = 0; i < count; ++i) sums.add(ids[i], weights == nullptr ? 1.0 : weights[i]);
    return sums.squares();
  }
  double total = 0;
  for (int64_t i = 0; i < count; ++i) {
    bool counted = false;
    for (int64_t j = 0; j < i; ++j) counted = counted || ids[j] == ids[i];
    if (counted) continue;
    double sum = 0;
    for (int64_t j = i; j < count; ++j) {
      if (ids[j] == ids[i]) sum += weights == nullptr ? 1.0 : weights[j];
    }
    total += sum * sum;
  }
  return total;
}

template <typename Id>
int64_t bag_repeats(const Id *ids, int64_t num_ids, const int64_t *lengths, int64_t bags,
                    const float *weights, float *squares, int64_t threads) {
  std::vector<int64_t> starts;  // of every kBagsAPiece-th bag
  int64_t total = 0;
  for (int64_t b = 0; b < bags; ++b) {
    if (lengths[b] < 0 || lengths[b] > num_ids - total) return b + 1;
    if (b % kBagsAPiece == 0) starts.push_back(total);
    total += lengths[b];
  }
  if (total != num_ids) return bags + 1;
  share_out(num_ids < kFewIds ? 1 : threads, static_cast<int64_t>(starts.size()), [&] {
    return [&, sums = Sums<Id>()](int64_t piece) mutable {
      int64_t start = starts[static_cast<size_t>(piece)];
      const int64_t first = piece * kBagsAPiece;
      for (int64_t b = first; b < std::min(bags, first + kBagsAPiece); ++b) {
        const float *w = weights == nullptr ? nullptr : weights + start;
        squares[b] = static_cast<float>(repeats(ids + start, w, lengths[b], sums));
        start += lengths[b];
      }
    };
  });
  return 0;
}

template <typename Id>
int64_t take_all_stale(const Table *tables, int64_t num_tables, const void *const *ids,
                       const int64_t *counts, int32_t older_than, int32_t to_step, int64_t *rows,
                       int32_t *from_steps, int64_t *taken, int64_t *where, int64_t threads) {
  const auto ids_of = [&](int64_t t) { return static_cast<const Id *>(ids[t]); };
  std::vector<int64_t> starts(static_cast<size_t>(num_tables) + 1, 0);
  for (int64_t t = 0; t < num_tables; ++t) {
    const int64_t outside = first_outside(ids_of(t), counts[t], tables[t].num_rows);
    if (outside >= 0) {
      *where = ids_of(t)[outside];
      return 1 + t;
    }
    starts[static_cast<size_t>(t) + 1] = starts[static_cast<size_t>(t)] + counts[t];
  }
  // Each table writes where its rows would lie if all were stale; then they are moved together.
  share_out(starts.back() < kFewIds ? 1 : threads, num_tables, [&] {
    return [&](int64_t t) {
      const int64_t start = starts[static_cast<size_t>(t)];
      taken[t] = take_stale(ids_of(t), counts[t], tables[t].history, older_than, to_step,
                            rows + start, from_steps + start);
    };
  });
  int64_t end = 0;
  for (int64_t t = 0; t < num_tables; ++t) {
    const int64_t start = starts[static_cast<size_t>(t)];
    std::copy(rows + start, rows + start + taken[t], rows + end);
    std::copy(from_steps + start, from_steps + start + taken[t], from_steps + end);
    end += taken[t];
  }
  return 0;
}

}  // namespace

// Rows last settled before older_than (at most to_step), each once, and the steps they were settled
// to; marks them as settled to to_step. Table t reads counts[t] ids at ids[t]; its rows follow those
// of the tables before it, and taken[t] says how many they are. No two tables share a history.
// Returns 0, or 1 + t if an id of table t is no row of it, which is then in *where; nothing is
// written in that case.
EXPORT int64_t dist_dp_take_stale(const Table *tables, int64_t num_tables, const void *const *ids,
                                  const int64_t *counts, int32_t kind, int32_t older_than,
                                  int32_t to_step, int64_t *rows, int32_t *from_steps,
                                  int64_t *taken, int64_t *where, int32_t threads) {
  const auto take = kind == kInt32 ? &take_all_stale<int32_t> : &take_all_stale<int64_t>;
  return take(tables, num_tables, ids, counts, older_than, to_step, rows, from_steps, taken, where,
              threads);
}

// For each bag of ids the sum over its distinct rows of the squared sum of their weights (1 where
// `weights` is null). Returns 0, or the number (from 1) of a bag that does not fit the ids.
EXPORT int64_t dist_dp_bag_repeats(const void *ids, int32_t kind, int64_t num_ids,
                                   const int64_t *lengths, int64_t bags, const float *weights,
                                   float *squares, int32_t threads) {
  return kind == kInt32 ? bag_repeats(static_cast<const int32_t *>(ids), num_ids, lengths, bags,
                                      weights, squares, threads)
                        : bag_repeats(static_cast<const int64_t *>(ids), num_ids, lengths, bags,
                                      weights, squares, threads);
}
