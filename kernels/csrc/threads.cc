// See threads.h.

#include "threads.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>

namespace hsai {
namespace {

// How long a helper looks for more work: longer than what a model does between two products of a token, so that it
// stays for all of it; short enough that whoever else wants the core hardly waits. Of its pool a thread is left to others:
// a call asks for fewer helpers than there are threads.
constexpr std::chrono::microseconds kStay(100);

// Calls that helpers see at a time; what more there are do their own work.
constexpr int kCalls = 4;

// Looks between two readings of the clock, or before the core is offered to others.
constexpr int kLooks = 64;

void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Returns when `ready()` does not return false any more; soon, if another thread is at it.
template <class Ready>
void await(const Ready& ready) {
  for (int looks = 0; !ready();) {
    if (looks < kLooks) {
      ++looks;
    } else {
      std::this_thread::yield();  // it may be waiting for this very core
    }
    pause();
  }
}

// A call's tiles. Its place outlives it: a late helper finds it closed, or of another call.
struct alignas(64) Call {
  std::atomic<bool> taken{false};  // by a caller
  std::atomic<bool> open{false};   // to helpers
  std::atomic<int> inside{0};      // helpers that may read what follows
  const std::function<void(std::int64_t)>* work = nullptr;
  std::int64_t helpers = 0;  // at most
  std::atomic<std::int64_t> tiles{0};
  alignas(64) std::atomic<std::int64_t> next{0};

  void drain() {
    const std::int64_t all = tiles.load(std::memory_order_relaxed);
    for (std::int64_t mine; (mine = next.fetch_add(1, std::memory_order_relaxed)) < all;) (*work)(mine);
  }

  // Returns whether there was work.
  bool help() {
    if (!open.load(std::memory_order_relaxed)) return false;
    if (next.load(std::memory_order_relaxed) >= tiles.load(std::memory_order_relaxed)) return false;
    // `inside` is raised before `open` is read, and the caller does it in the other order: one of them sees the other.
    const std::int64_t before = inside.fetch_add(1);
    const bool welcome = open.load() && before < helpers;
    if (welcome) drain();
    inside.fetch_sub(1, std::memory_order_release);
    return welcome;
  }
};

class Team {
 public:
  // A place for a call, or null.
  Call* take() {
    for (Call& call : calls_) {
      if (!call.taken.load(std::memory_order_relaxed) && !call.taken.exchange(true)) return &call;
    }
    return nullptr;
  }

  // Sees to it that there are `wanted` helpers, from now or from soon on.
  void gather(std::int64_t wanted, const Schedule& schedule) {
    for (std::int64_t there = helpers_.load(); there < wanted;) {
      if (!helpers_.compare_exchange_weak(there, there + 1)) continue;
      try {
        schedule([this] { help(); });
      } catch (...) {  // no memory for a helper: go on without
        helpers_.fetch_sub(1);
        return;
      }
      ++there;
    }
  }

 private:
  void help() {
    using Clock = std::chrono::steady_clock;
    for (Clock::time_point end = Clock::now() + kStay; Clock::now() < end;) {
      for (int look = 0; look < kLooks; ++look) {
        bool helped = false;
        for (Call& call : calls_) helped |= call.help();
        if (helped) {
          end = Clock::now() + kStay;
          break;
        }
        pause();
      }
    }
    helpers_.fetch_sub(1);
  }

  Call calls_[kCalls];
  std::atomic<std::int64_t> helpers_{0};
};

// Never destroyed: a helper may look at it while the process ends.
Team& team() {
  static Team* const only = new Team;
  return *only;
}

}  // namespace

void run_tiles(std::int64_t tiles, std::int64_t threads, const Schedule& schedule,
               const std::function<void(std::int64_t)>& work) {
  const std::int64_t helpers = std::min(threads, tiles) - 1;
  Call* const call = helpers > 0 ? team().take() : nullptr;
  if (call == nullptr) {
    for (std::int64_t i = 0; i < tiles; ++i) work(i);
    return;
  }
  call->work = &work;
  call->helpers = helpers;
  call->tiles.store(tiles);
  call->next.store(0);
  call->open.store(true);
  team().gather(helpers, schedule);
  call->drain();
  call->open.store(false);
  await([&] { return call->inside.load() == 0; });  // all tiles are taken, and who took one has left
  call->taken.store(false);
}

}  // namespace hsai
