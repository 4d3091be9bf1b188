// Products from raw buffers: converts activations, splits columns into tiles, runs them, converts the results.
#ifndef HSAI_KERNELS_MULTIPLY_H_
#define HSAI_KERNELS_MULTIPLY_H_

#include <cstdint>
#include <vector>

#include "products.h"
#include "threads.h"

namespace hsai {

enum class Format { kInt8, kInt4, kInt3, kInt2, kSparseFloat32, kSparseBfloat16, kSparseInt4, kSparseInt8 };

struct Activations {
  const void* x;         // (rows, D)
  bool bfloat16;         // else float
  std::int64_t rows;     // 1 to kMaxRows for floating products, any number for integer ones
  bool int8;             // rounds every group of positions that shares a scale of the weight to int8 first
};

struct Product {
  Weight weight;
  void* out;  // (rows, F), of the activations' type
};

// Whether a format's products are made of integers (integer_products.h); the others are made of floats.
bool is_integer(Format format);

// Whether weights can be multiplied by in one call: only arrays, columns and V may differ.
bool are_alike(const Weight& one, const Weight& other);

// The products of the same activations with one weight or more, all alike: what is done before and between the tiles of
// a product is done once for all. Throws std::bad_alloc, before any tile has started. The results depend neither on
// `threads` nor on how many products there are.
void multiply_packed(Format format, const std::vector<Product>& products, const Activations& activations,
                     std::int64_t threads, const Schedule& schedule);

}  // namespace hsai

#endif  // HSAI_KERNELS_MULTIPLY_H_
