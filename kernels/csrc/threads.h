// Splits independent tiles over the calling thread and the thread pool that XLA lends to an FFI call, so that hsai adds
// no threads of its own and never oversubscribes the machine.
#ifndef HSAI_KERNELS_THREADS_H_
#define HSAI_KERNELS_THREADS_H_

#include <cstdint>
#include <functional>

namespace hsai {

// Runs a task on a thread of a pool, later or at once.
using Schedule = std::function<void(std::function<void()>)>;

// Calls work(i) once for every i < tiles, on up to `threads` threads; returns when all calls have returned.
//
// Waking a thread takes longer than most products of a small model, so those of the pool that came to help stay for a
// moment (kStay in threads.cc) and take tiles of the calls that follow, of whichever caller. The caller works too, and
// waits only for tiles that are running: a full pool costs speed, and cannot deadlock. `work` must not throw.
void run_tiles(std::int64_t tiles, std::int64_t threads, const Schedule& schedule,
               const std::function<void(std::int64_t)>& work);

}  // namespace hsai

#endif  // HSAI_KERNELS_THREADS_H_
