// A weight from its matrices: the handlers' half that knows formats. Everything is checked.
//
// Dimensions: D dense contraction, C stored elements a column, F columns.
#ifndef HSAI_KERNELS_READ_WEIGHT_H_
#define HSAI_KERNELS_READ_WEIGHT_H_

#include <array>
#include <cstdint>

#include "matrix.h"
#include "multiply.h"
#include "xla/ffi/api/ffi.h"

namespace hsai {

struct QuantizedOptions {
  std::int64_t bits;
  bool centered;
};

// values: int8 (D, F), or words (D * bits / 32, F) of codes of 2, 3 or 4 bits; `centered` puts zero in the middle of the
// codes; scale (D/g, F); minimum the same, of codes of 4 bits that count from it, or (0, F).
xla::ffi::Error read_quantized(const Matrix& x, const std::array<Matrix, 3>& arrays, const QuantizedOptions& options,
                               Format& format, Weight& weight);

struct SparseOptions {
  std::int64_t n, m;
};

// values: float32, bfloat16 or int8 (C, F), or int4 words (C/8, F); indices (C/16, F), or (3*C/32, F) for N:8;
// scale (D/g, F), or (0, F) for none; choices (D/32, F/V), or (0, F) for N:4 and N:8.
xla::ffi::Error read_sparse(const Matrix& x, const std::array<Matrix, 4>& arrays, const SparseOptions& options,
                            Format& format, Weight& weight);

}  // namespace hsai

#endif  // HSAI_KERNELS_READ_WEIGHT_H_
