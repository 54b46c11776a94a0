// The loop over rows with a state: the walk of `rows.h`, with one draw or two a coordinate.
#pragma once

namespace {

// The columns of a lane's block that are ours, moved.
inline void apply_move(const Job &job, const Batch::Run &run, const Move &move, int lane,
                       const float *first, const float *second) {
  const int64_t size = size_of(job.weight_kind);
  const Piece piece = piece_of(job, run, run.block + lane - run.first, size);
  const int64_t column = (piece.place - run.row) / size;
  const Place place = place_of(job, run.row, run.local, column, piece.count);
  alignas(64) float mine[2][16] = {};
  if (piece.count < 16) {
    copy(mine[0], first + piece.skip, piece.count, 4);
    first = mine[0];
    if (second != nullptr) {
      copy(mine[1], second + piece.skip, piece.count, 4);
      second = mine[1];
    }
  }
  SixteenStates s;
  read_states(job.weight_kind, place, s);
  carry_noisily(move, s.weight.value, s.momentum, place.momentum != nullptr, first, second);
  write_states(job.weight_kind, place, s);
}

void settle_states(const Job &job, int64_t first, int64_t last) {
  const State &state = *job.state;
  const Key key = read_key(job.key);
  const Key second = read_key(state.momentum != nullptr ? state.second_key : job.key);
  const Words to = words(static_cast<uint32_t>(job.to_step));
  Walk walk(job, first, last);
  Batch batches[2];
  walk.fill(batches[0]);
  for (int now = 0; batches[now].runs != 0; now = 1 - now) {
    const Batch &batch = batches[now];
    Batch &later = batches[1 - now];
    walk.fill(later);
    for (int i = 0; i < later.runs; ++i) {
      const Batch::Run &run = later.run[i];
      for (int64_t block = run.block; block < run.block + run.end - run.first; ++block) {
        const int64_t column = block * 16 - job.column_offset;
        fetch_beside(state, job.weight_kind, run.local, column < 0 ? 0 : column);
      }
    }
    Move move[kLanes];
    bool two = false;
    for (int i = 0; i < batch.runs; ++i) {
      move[i] = move_of(state, batch.run[i].entry);
      two = two || move[i].c != 0;
    }
    const Words input[4] = {load(batch.high), load(batch.low), load(batch.from), to};
    alignas(64) float z[2][kLanes][16];
    make_normals(key, input, job.rounds, z[0], later.place);
    if (two) make_normals(second, input, job.rounds, z[1], later.place);
    for (int i = 0; i < batch.runs; ++i) {
      const Batch::Run &run = batch.run[i];
      for (int lane = run.first; lane < run.end; ++lane) {
        apply_move(job, run, move[i], lane, z[0][lane], move[i].c != 0 ? z[1][lane] : nullptr);
      }
    }
  }
}

}  // namespace
