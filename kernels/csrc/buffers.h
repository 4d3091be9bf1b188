// Scratch memory that as many tiles as run at a time take in turn, all of it allocated before any of them starts.
#ifndef HSAI_KERNELS_BUFFERS_H_
#define HSAI_KERNELS_BUFFERS_H_

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

namespace hsai {

class Buffers {
 public:
  // `count` buffers of `size` floats, each on a cache line's begin; what is in them is not said.
  Buffers(std::int64_t count, std::int64_t size) {
    const std::int64_t step = (size + kLine - 1) / kLine * kLine;
    all_.reset(new float[static_cast<std::size_t>(count * step + kLine)]);
    const auto at = reinterpret_cast<std::uintptr_t>(all_.get()) / sizeof(float) % kLine;
    float* const first = all_.get() + (kLine - static_cast<std::int64_t>(at)) % kLine;
    for (std::int64_t i = 0; i < count; ++i) free_.push_back(first + i * step);
  }

  float* take() {
    const std::lock_guard<std::mutex> lock(mutex_);
    float* buffer = free_.back();
    free_.pop_back();
    return buffer;
  }

  void give(float* buffer) {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(buffer);  // never more than there were: it does not allocate
  }

 private:
  static constexpr std::int64_t kLine = 16;

  std::mutex mutex_;
  std::unique_ptr<float[]> all_;
  std::vector<float*> free_;
};

}  // namespace hsai

#endif  // HSAI_KERNELS_BUFFERS_H_
