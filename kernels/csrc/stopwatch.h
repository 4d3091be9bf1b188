// How long the library's kernels have run in this process: the rest of a program's time is spent between them.
#ifndef HSAI_KERNELS_STOPWATCH_H_
#define HSAI_KERNELS_STOPWATCH_H_

#include <chrono>
#include <cstdint>
#include <mutex>

namespace hsai {

// Measures the time in which any kernel runs: calls side by side count once.
class KernelClock {
 public:
  std::int64_t nanoseconds() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return std::chrono::duration_cast<std::chrono::nanoseconds>(taken_).count();
  }

  void begin() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (running_++ == 0) begun_ = Clock::now();
  }

  void end() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (--running_ == 0) taken_ += Clock::now() - begun_;
  }

 private:
  using Clock = std::chrono::steady_clock;

  std::mutex mutex_;
  int running_ = 0;
  Clock::time_point begun_;
  Clock::duration taken_{0};
};

inline KernelClock kernel_clock;

// Counts the time from its making to its end.
class Stopwatch {
 public:
  Stopwatch() { kernel_clock.begin(); }
  Stopwatch(const Stopwatch&) = delete;
  Stopwatch& operator=(const Stopwatch&) = delete;
  ~Stopwatch() { kernel_clock.end(); }
};

}  // namespace hsai

#endif  // HSAI_KERNELS_STOPWATCH_H_
