// One product from raw buffers: converts activations, splits columns into tiles, runs them, converts the result.
#ifndef HSAI_KERNELS_MULTIPLY_H_
#define HSAI_KERNELS_MULTIPLY_H_

#include <cstdint>
#include <functional>

#include "products.h"

namespace hsai {

enum class Format { kInt8, kInt4, kInt3, kInt2, kSparseFloat32, kSparseBfloat16, kSparseInt4, kSparseInt8 };

struct Activations {
  const void* x;         // (rows, D)
  void* out;             // (rows, F), of the same type
  bool bfloat16;         // else float
  std::int64_t rows;     // 1 to kMaxRows for floating products, any number for integer ones
  bool int8;             // rounds every group of positions that shares a scale of the weight to int8 first
};

// Whether a format's products are made of integers (integer_products.h); the others are made of floats.
bool is_integer(Format format);

using Schedule = std::function<void(std::function<void()>)>;

// Throws std::bad_alloc, before any tile has started. The result does not depend on `threads`.
void multiply_packed(Format format, const Weight& weight, const Activations& activations, std::int64_t threads,
                     const Schedule& schedule);

}  // namespace hsai

#endif  // HSAI_KERNELS_MULTIPLY_H_
