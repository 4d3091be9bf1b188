// Splits independent tiles over the calling thread and the thread pool that XLA lends to an FFI call, so that hsai adds
// no threads of its own and never oversubscribes the machine.
#ifndef HSAI_KERNELS_THREADS_H_
#define HSAI_KERNELS_THREADS_H_

#include <algorithm>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <utility>

namespace hsai {

// Calls work(i) once for every i < tiles, on up to `threads` threads; returns when all calls have returned.
//
// Each thread takes the next tile that nobody has. A helper that the pool starts late finds none left and goes home, so
// the caller waits only for tiles that are running: a full pool costs speed, and cannot deadlock. `schedule(f)` must run
// f later or at once. `work` must not throw.
template <class Schedule>
void run_tiles(std::int64_t tiles, std::int64_t threads, Schedule&& schedule, std::function<void(std::int64_t)> work) {
  struct State {
    std::function<void(std::int64_t)> work;
    std::int64_t tiles;
    std::mutex mutex;
    std::condition_variable done;
    std::int64_t next = 0;
    std::int64_t finished = 0;

    void drain() {
      std::unique_lock<std::mutex> lock(mutex);
      while (next < tiles) {
        const std::int64_t mine = next++;
        lock.unlock();
        work(mine);
        lock.lock();
        ++finished;
      }
      if (finished == tiles) done.notify_all();
    }
  };
  // Shared, because a late helper looks at it after the caller has gone on.
  auto state = std::make_shared<State>();
  state->work = std::move(work);
  state->tiles = tiles;
  for (std::int64_t helper = 1; helper < std::min(threads, tiles); ++helper) {
    try {
      schedule([state] { state->drain(); });
    } catch (...) {  // no memory for a helper, which may be running what an earlier call asked for: go on without
      break;
    }
  }
  state->drain();
  std::unique_lock<std::mutex> lock(state->mutex);
  state->done.wait(lock, [&] { return state->finished == state->tiles; });
}

}  // namespace hsai

#endif  // HSAI_KERNELS_THREADS_H_
