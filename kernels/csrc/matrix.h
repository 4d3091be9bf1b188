// The operands of a product's handler: matrices, each a buffer of its own, or one of those that a buffer stacks.
#ifndef HSAI_KERNELS_MATRIX_H_
#define HSAI_KERNELS_MATRIX_H_

#include <cstdint>
#include <string>

#include "ffi_checks.h"
#include "xla/ffi/api/ffi.h"

namespace hsai {

struct Matrix {
  xla::ffi::DataType type;
  std::int64_t height, width;
  const void* data;
};

inline std::string describe(const Matrix& matrix) { return describe({matrix.height, matrix.width}); }

// Which matrix of a buffer is meant: the only one, or that of a layer.
class Stack {
 public:
  Stack() = default;

  // `layer`: int32 (), the number of the matrix in buffers (L, height, width).
  explicit Stack(const xla::ffi::AnyBuffer& layer) : layer_(&layer) {}

  // Finds the matrix of a buffer. Those of a weight have the same L: `layers`, which the first one fills in (-1 before).
  xla::ffi::Error take(const xla::ffi::AnyBuffer& buffer, Matrix& matrix, std::int64_t& layers) const {
    std::int64_t layer = 0;
    if (layer_ != nullptr) {
      if (layer_->element_type() != xla::ffi::DataType::S32 || layer_->dimensions().size() != 0) {
        return invalid("the layer must be a number, an int32");
      }
      layer = *static_cast<const std::int32_t*>(layer_->untyped_data());
    }
    const std::size_t leading = layer_ == nullptr ? 0 : 1;
    const auto sizes = buffer.dimensions();
    if (sizes.size() != leading + 2) {
      return invalid("operands are " + std::string(leading == 0 ? "matrices" : "stacked matrices") + ", not " +
                     describe(buffer));
    }
    const std::int64_t there = leading == 0 ? 1 : sizes[0];
    if (layers < 0) layers = there;
    if (layer < 0 || layer >= there || there != layers) {
      return invalid("layer " + std::to_string(layer) + " of " + describe(buffer));
    }
    const std::size_t step = buffer.size_bytes() / static_cast<std::size_t>(there);
    const auto* data = static_cast<const char*>(buffer.untyped_data()) + static_cast<std::size_t>(layer) * step;
    matrix = {buffer.element_type(), sizes[leading], sizes[leading + 1], data};
    return xla::ffi::Error::Success();
  }

 private:
  const xla::ffi::AnyBuffer* layer_ = nullptr;
};

}  // namespace hsai

#endif  // HSAI_KERNELS_MATRIX_H_
