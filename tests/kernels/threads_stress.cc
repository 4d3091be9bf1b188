// Many callers of run_tiles at once, over a pool of threads, with pauses that let helpers leave: every tile must be
// done once, and before its caller goes on. Built with the thread sanitizer by test_native_builds.py.
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <deque>
#include <mutex>
#include <thread>
#include <vector>

#include "threads.h"

namespace {

constexpr int kThreads = 4;

class Pool {
 public:
  Pool() {
    for (int i = 0; i < kThreads; ++i) threads_.emplace_back([this] { run(); });
  }
  ~Pool() {
    for (int i = 0; i < kThreads; ++i) schedule(nullptr);
    for (std::thread& thread : threads_) thread.join();
  }
  void schedule(std::function<void()> task) {
    const std::lock_guard<std::mutex> lock(mutex_);
    tasks_.push_back(std::move(task));
    more_.notify_one();
  }

 private:
  void run() {
    for (;;) {
      std::unique_lock<std::mutex> lock(mutex_);
      more_.wait(lock, [this] { return !tasks_.empty(); });
      const std::function<void()> task = std::move(tasks_.front());
      tasks_.pop_front();
      lock.unlock();
      if (!task) return;
      task();
    }
  }

  std::mutex mutex_;
  std::condition_variable more_;
  std::deque<std::function<void()>> tasks_;
  std::vector<std::thread> threads_;
};

}  // namespace

int main() {
  Pool pool;
  std::atomic<int> faults{0};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 6; ++caller) {
    callers.emplace_back([&, caller] {
      std::vector<int> done(40);  // not atomic: who finds a race here finds that a caller went on too early
      for (int call = 0; call < 400; ++call) {
        const int tiles = (caller + call) % 41, threads = 1 + call % 4;
        std::atomic<int> running{0};
        hsai::run_tiles(tiles, threads, [&](std::function<void()> task) { pool.schedule(std::move(task)); },
                        [&](std::int64_t tile) {
                          if (++running > threads) ++faults;
                          ++done[static_cast<std::size_t>(tile)];
                          if (call % 3 == 0) std::this_thread::sleep_for(std::chrono::microseconds(5));
                          --running;
                        });
        for (int tile = 0; tile < 40; ++tile) {
          if (done[static_cast<std::size_t>(tile)] != (tile < tiles ? 1 : 0)) ++faults;
          done[static_cast<std::size_t>(tile)] = 0;
        }
        if (call % 50 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
      }
    });
  }
  for (std::thread& thread : callers) thread.join();
  std::printf("%d faults\n", faults.load());
  return faults.load() == 0 ? 0 : 1;
}
