// See read_weight.h.

#include "read_weight.h"

#include <string>

namespace hsai {
namespace {

namespace ffi = xla::ffi;
using ffi::DataType;

// Checks scale (groups, F) and fills in the weight's scale and group; `step` must divide the elements of a group.
ffi::Error read_scale(const Matrix& scale, std::int64_t step, Weight& weight) {
  if (scale.type == DataType::F32) {
    weight.scale_type = ScaleType::kFloat32;
  } else if (scale.type == DataType::BF16) {
    weight.scale_type = ScaleType::kBfloat16;
  } else if (scale.type == DataType::F16) {
    weight.scale_type = ScaleType::kFloat16;
  } else {
    return invalid("scale must be float32, bfloat16 or float16");
  }
  const std::int64_t groups = scale.height;
  if (groups < 1 || scale.width != weight.columns || weight.stored % groups != 0 ||
      weight.stored / groups % step != 0) {
    return invalid("scale has shape " + describe(scale) + " for " + std::to_string(weight.stored) +
                   " stored elements and " + std::to_string(weight.columns) + " columns");
  }
  weight.scale = scale.data;
  weight.group = weight.stored / groups;
  return ffi::Error::Success();
}

// Checks minimum (D/g, F), or (0, F) for none, and fills in the weight's.
ffi::Error read_minimum(const Matrix& minimum, const Matrix& scale, bool allowed, Weight& weight) {
  if (minimum.height == 0) return ffi::Error::Success();
  if (!allowed) return invalid("minima are for codes of 4 bits that are not centered");
  if (minimum.type != scale.type || minimum.height != scale.height || minimum.width != scale.width) {
    return invalid("minimum has shape " + describe(minimum) + ", scale " + describe(scale) + ", or another type");
  }
  weight.minimum = minimum.data;
  weight.zero = 0;
  return ffi::Error::Success();
}

// Checks choices (D/32, F/V) and fills in the weight's; (0, F) for an N:4 or N:8 weight.
ffi::Error read_choices(const Matrix& choices, std::int64_t m, bool integer, Weight& weight) {
  if (choices.type != DataType::U32) return invalid("choices must be uint32");
  weight.pattern = m;
  if (choices.height == 0) {
    if (m != 4 && m != 8) return invalid("m=" + std::to_string(m) + " needs choices");
    if (m == 8 && !integer) return invalid("m=8 without choices is for integers only");
    return ffi::Error::Success();
  }
  if (m != 8 && m != 16 && m != 32) return invalid("m=" + std::to_string(m) + " takes no choices");
  if (!integer) return invalid("choices are for integers only");
  const std::int64_t blocks = choices.width;
  if (choices.height * 32 != weight.dense || blocks < 1 || weight.columns % blocks != 0 ||
      weight.columns / blocks % kBlockColumns != 0) {
    return invalid("choices have shape " + describe(choices) + " for " + std::to_string(weight.dense) +
                   " positions and " + std::to_string(weight.columns) + " columns");
  }
  weight.choices = static_cast<const std::uint32_t*>(choices.data);
  weight.width = weight.columns / blocks;
  return ffi::Error::Success();
}

}  // namespace

ffi::Error read_quantized(const Matrix& x, const std::array<Matrix, 3>& arrays, const QuantizedOptions& options,
                          Format& format, Weight& weight) {
  const auto& [values, scale, minimum] = arrays;
  const auto [bits, centered] = options;
  const bool packed = values.type == DataType::U32;
  if (!packed && values.type != DataType::S8) return invalid("values must be int8 or uint32");
  if (packed ? bits < 2 || bits > 4 : bits != 8) {
    return invalid("values of " + std::to_string(bits) + " bits do not stand in such an array");
  }
  if (!packed && centered) return invalid("int8 values have no codes to center");
  constexpr Format kFormats[] = {Format::kInt2, Format::kInt3, Format::kInt4};
  format = packed ? kFormats[bits - 2] : Format::kInt8;
  // As many rows as hold whole elements, and those: three words of 3 bits hold 32.
  const std::int64_t rows = bits == 3 ? 3 : 1, step = packed ? 32 * rows / bits : 1;
  weight.values = values.data;
  weight.columns = values.width;
  if (values.height % rows != 0) return invalid("words of 3 bits come by threes, got values " + describe(values));
  weight.dense = weight.stored = values.height / rows * step;
  weight.zero = packed ? (1 << bits) - (centered ? 1 : 0) : 0;
  if (weight.dense < 1 || x.width != weight.dense) {
    return invalid("x has shape " + describe(x) + ", the weight contracts over " + std::to_string(weight.dense));
  }
  if (auto error = read_scale(scale, step, weight); error.failure()) return error;
  return read_minimum(minimum, scale, format == Format::kInt4 && !centered, weight);
}

ffi::Error read_sparse(const Matrix& x, const std::array<Matrix, 4>& arrays, const SparseOptions& options,
                       Format& format, Weight& weight) {
  const auto& [values, indices, scale, choices] = arrays;
  const auto [n, m] = options;
  const bool eighths = m == 8 && choices.height == 0;
  if (n < 1 || n > 4 || n == (eighths ? 3 : 4)) {
    return invalid("n=" + std::to_string(n) + (eighths ? " of 8 is not 1, 2 or 4" : " of 4 is not 1, 2 or 3"));
  }
  switch (values.type) {
    case DataType::U32:
      format = Format::kSparseInt4;
      break;
    case DataType::S8:
      format = Format::kSparseInt8;
      break;
    case DataType::F32:
      format = Format::kSparseFloat32;
      break;
    case DataType::BF16:
      format = Format::kSparseBfloat16;
      break;
    default:
      return invalid("values must be uint32, int8, float32 or bfloat16");
  }
  const bool packed = format == Format::kSparseInt4, integer = is_integer(format);
  weight.values = values.data;
  weight.columns = values.width;
  weight.stored = values.height * (packed ? 8 : 1);
  weight.dense = x.width;
  if (weight.stored < 1 || weight.stored % 16 != 0 || m < 4 || weight.dense % m != 0 ||
      weight.dense / m * n != weight.stored) {
    return invalid("x has shape " + describe(x) + ", values " + describe(values) + " keep " + std::to_string(n) +
                   " of " + std::to_string(m));
  }
  if (auto error = read_choices(choices, m, integer, weight); error.failure()) return error;
  if (indices.type != DataType::U32 || indices.height * 32 != weight.stored * (eighths ? 3 : 2) ||
      weight.stored % (eighths ? 32 : 16) != 0 || indices.width != weight.columns) {
    return invalid("indices have shape " + describe(indices) + " for values " + describe(values));
  }
  weight.indices = static_cast<const std::uint32_t*>(indices.data);
  if (integer) {
    // What the kernels take at once: 8 values, and whole groups of 4 where they do not divide those.
    return read_scale(scale, n == 3 ? 24 : 8, weight);
  }
  if (scale.height != 0) return invalid("floating values take no scale, got " + describe(scale));
  weight.scale_type = ScaleType::kNone;
  weight.group = weight.stored;
  return ffi::Error::Success();
}

}  // namespace hsai
