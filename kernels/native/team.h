// Threads for a piece of work that shares itself out.
//
// Where torch is loaded its OpenMP runtime is too, and its threads go on spinning for milliseconds
// after each of torch's own loops, in wait of the next. Threads of ours would fight them for the
// cores; so the work is given to those same threads (`dist_dp_use_team` says how). Without them,
// or in a process forked since, it gets threads of its own.
#pragma once

#include <stdint.h>
#include <unistd.h>

#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

// As OpenMP runtimes export it for compiled code: calls work(data) in each of so many threads.
using Team = void (*)(void (*work)(void *), void *data, unsigned threads, unsigned flags);

inline Team the_team = nullptr;
inline pid_t team_owner = 0;

// Calls loop() in up to `threads` threads, this one among them, and waits for all of them.
template <typename Loop>
void in_threads(int64_t threads, const Loop &loop) {
  if (threads < 2) return loop();
  if (the_team != nullptr && team_owner == getpid()) {  // a forked child has none of the threads
    // The number torch has, even if fewer would do: another one would make the runtime end
    // threads, and start them again for torch.
    const auto call = [](void *data) { (*static_cast<const Loop *>(data))(); };
    the_team(call, const_cast<Loop *>(&loop), static_cast<unsigned>(threads), 0);
    return;
  }
  std::vector<std::thread> helpers;
  helpers.reserve(static_cast<size_t>(threads - 1));
  for (int64_t i = 1; i < threads; ++i) {
    try {
      helpers.emplace_back(loop);
    } catch (const std::system_error &) {
      break;  // no more threads to be had: those there are do the work
    }
  }
  loop();
  for (std::thread &helper : helpers) helper.join();
}

// Calls work(0) ... work(pieces - 1), each once, by up to `threads` threads; each of them has its
// own work = make_work(), which ends with it.
template <typename MakeWork>
void share_out(int64_t threads, int64_t pieces, const MakeWork &make_work) {
  std::atomic<int64_t> next{0};
  in_threads(pieces < 2 ? 1 : threads, [&] {
    auto work = make_work();
    for (int64_t i; (i = next.fetch_add(1)) < pieces;) work(i);
  });
}
