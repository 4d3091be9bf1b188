// One product from raw buffers: converts activations, splits columns into tiles, runs them, converts the result.
#ifndef HSAI_KERNELS_MULTIPLY_H_
#define HSAI_KERNELS_MULTIPLY_H_

#include <cstdint>
#include <functional>

#include "products.h"

namespace hsai {

enum class Format { kInt8, kInt4, kSparseFloat32, kSparseBfloat16, kSparseInt4 };

struct Activations {
  const void* x;         // (rows, D)
  void* out;             // (rows, F), of the same type
  bool bfloat16;         // else float
  std::int64_t rows;     // 1 to kMaxRows
};

using Schedule = std::function<void(std::function<void()>)>;

// Throws std::bad_alloc, before any tile has started. The result does not depend on `threads`.
void multiply_packed(Format format, const Weight& weight, const Activations& activations, std::int64_t threads,
                     const Schedule& schedule);

}  // namespace hsai

#endif  // HSAI_KERNELS_MULTIPLY_H_
