// What a lookup's row numbers are asked before its rows are read: which are stale, and how often
// each occurs in its bag. One pass over the numbers, nothing sorted.
#include <stdint.h>

#include <algorithm>
#include <vector>

#include "job.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr int64_t kAhead = 16;       // how far in front the history is fetched from memory
constexpr int64_t kPairwise = 48;    // bags up to this length compare every pair of entries

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

// The sum over distinct rows r of (sum of the weights of r's entries)^2, for one bag.
template <typename Id>
double repeats(const Id *ids, const float *weights, int64_t count,
               std::vector<std::pair<Id, float>> &buffer) {
  double total = 0;
  if (count <= kPairwise) {
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
  buffer.clear();
  for (int64_t i = 0; i < count; ++i) {
    buffer.emplace_back(ids[i], weights == nullptr ? 1.0f : weights[i]);
  }
  std::sort(buffer.begin(), buffer.end(),
            [](const auto &a, const auto &b) { return a.first < b.first; });
  for (int64_t i = 0; i < count;) {
    const Id row = buffer[static_cast<size_t>(i)].first;
    double sum = 0;
    for (; i < count && buffer[static_cast<size_t>(i)].first == row; ++i) {
      sum += buffer[static_cast<size_t>(i)].second;
    }
    total += sum * sum;
  }
  return total;
}

template <typename Id>
int64_t bag_repeats(const Id *ids, int64_t num_ids, const int64_t *lengths, int64_t bags,
                    const float *weights, float *squares) {
  std::vector<std::pair<Id, float>> buffer;
  int64_t start = 0;
  for (int64_t b = 0; b < bags; ++b) {
    if (lengths[b] < 0 || lengths[b] > num_ids - start) return b + 1;
    const float *w = weights == nullptr ? nullptr : weights + start;
    squares[b] = static_cast<float>(repeats(ids + start, w, lengths[b], buffer));
    start += lengths[b];
  }
  return start == num_ids ? 0 : bags + 1;
}

}  // namespace

// Rows last settled before older_than (at most to_step), each once, and the steps they were settled
// to; marks them as settled to to_step. Table t reads counts[t] ids at ids[t]; its rows follow those of the tables
// before it, and taken[t] says how many they are. Returns 0, or 1 + t if an id of table t is no
// row of it, which is then in *where; nothing is written in that case.
EXPORT int64_t dist_dp_take_stale(const Table *tables, int64_t num_tables, const void *const *ids,
                                  const int64_t *counts, int32_t kind, int32_t older_than,
                                  int32_t to_step, int64_t *rows, int32_t *from_steps,
                                  int64_t *taken, int64_t *where) {
  for (int64_t t = 0; t < num_tables; ++t) {
    const int64_t outside =
        kind == kInt32
            ? first_outside(static_cast<const int32_t *>(ids[t]), counts[t], tables[t].num_rows)
            : first_outside(static_cast<const int64_t *>(ids[t]), counts[t], tables[t].num_rows);
    if (outside >= 0) {
      *where = kind == kInt32 ? static_cast<const int32_t *>(ids[t])[outside]
                              : static_cast<const int64_t *>(ids[t])[outside];
      return 1 + t;
    }
  }
  for (int64_t t = 0; t < num_tables; ++t) {
    taken[t] = kind == kInt32 ? take_stale(static_cast<const int32_t *>(ids[t]), counts[t],
                                           tables[t].history, older_than, to_step, rows, from_steps)
                              : take_stale(static_cast<const int64_t *>(ids[t]), counts[t],
                                           tables[t].history, older_than, to_step, rows, from_steps);
    rows += taken[t];
    from_steps += taken[t];
  }
  return 0;
}

// For each bag of ids the sum over its distinct rows of the squared sum of their weights (1 where
// `weights` is null). Returns 0, or the number (from 1) of a bag that does not fit the ids.
EXPORT int64_t dist_dp_bag_repeats(const void *ids, int32_t kind, int64_t num_ids,
                                   const int64_t *lengths, int64_t bags, const float *weights,
                                   float *squares) {
  return kind == kInt32 ? bag_repeats(static_cast<const int32_t *>(ids), num_ids, lengths, bags,
                                      weights, squares)
                        : bag_repeats(static_cast<const int64_t *>(ids), num_ids, lengths, bags,
                                      weights, squares);
}
