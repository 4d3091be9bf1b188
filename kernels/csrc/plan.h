// What products need beside weights and activations, made before any tile starts.
#ifndef HSAI_KERNELS_PLAN_H_
#define HSAI_KERNELS_PLAN_H_

#include <cstdint>
#include <vector>

#include "multiply.h"
#include "products.h"

namespace hsai {

struct Plan {
  const Products* table;     // whose kernels run
  bool integer;              // whether they are those for integers
  bool many;                 // whether they are those for many rows
  int rows;                  // of activations, and as many of zeros as the kernels want
  std::vector<Product> products;  // weights with all that the kernels want to know
  Planes planes = {};        // for integers; `fill_row` fills them

  // What all the weights share is the first one's.
  const Weight& weight() const { return products.front().weight; }

  std::vector<float> x;      // (rows, D) where kernels want floats that are not there
  std::vector<std::int32_t> quads;
  std::vector<Slot> slots;
  std::vector<std::uint8_t> digits;
  std::vector<float> scale;
  std::vector<std::int32_t> sum;
  std::vector<float> total;
};

// A plan for products that are alike. Throws std::bad_alloc.
Plan plan_products(Format format, const std::vector<Product>& products, const Activations& activations);

// Reads a row of activations.
void fill_row(Plan& plan, const Activations& activations, std::int64_t row);

}  // namespace hsai

#endif  // HSAI_KERNELS_PLAN_H_
