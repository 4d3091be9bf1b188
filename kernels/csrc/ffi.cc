// XLA FFI handlers: they check everything that they are given, and return an error status instead of crashing.
//
// Called by hsai_kernels/ops/*/cpu.py, which validates before; but a program that was exported, altered or written by
// hand reaches these handlers too. Dimensions: R rows, D dense contraction, C stored elements a column, F columns.

#include <exception>
#include <string>

#include "ffi_checks.h"
#include "multiply.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using ffi::AnyBuffer;
using ffi::DataType;
using hsai::describe;
using hsai::Format;
using hsai::invalid;
using hsai::ScaleType;

bool is_matrix(const AnyBuffer& buffer) { return buffer.dimensions().size() == 2; }

std::int64_t height(const AnyBuffer& buffer) { return buffer.dimensions()[0]; }

std::int64_t width(const AnyBuffer& buffer) { return buffer.dimensions()[1]; }

// Checks x (R, D) and out (R, F) of one floating type and fills in `activations`; `bits` is 8 for dynamic int8, else 0.
ffi::Error read_activations(const AnyBuffer& x, const AnyBuffer& out, std::int64_t columns, Format format,
                            std::int64_t bits, hsai::Activations& activations) {
  if (x.element_type() != DataType::F32 && x.element_type() != DataType::BF16) {
    return invalid("x must be float32 or bfloat16");
  }
  if (out.element_type() != x.element_type()) return invalid("the result must have x's type");
  const bool integer = hsai::is_integer(format);
  const std::int64_t most = integer ? hsai::kMaxIntegerRows : hsai::kMaxRows;
  if (height(x) < 1 || height(x) > most) {
    return invalid("x has shape " + describe(x) + ", needs 1 to " + std::to_string(most) + " rows");
  }
  if (bits != 0 && (bits != 8 || !integer)) {
    return invalid("activations of " + std::to_string(bits) + " bits are not supported for this weight");
  }
  if (height(out) != height(x) || width(out) != columns) {
    return invalid("the result has shape " + describe(out) + " for x " + describe(x) + " and " +
                   std::to_string(columns) + " columns");
  }
  activations = {x.untyped_data(), out.untyped_data(), x.element_type() == DataType::BF16, height(x), bits == 8};
  return ffi::Error::Success();
}

// Checks scale (groups, F) and fills in the weight's scale and group; `step` must divide the elements of a group.
ffi::Error read_scale(const AnyBuffer& scale, std::int64_t step, hsai::Weight& weight) {
  if (scale.element_type() == DataType::F32) {
    weight.scale_type = ScaleType::kFloat32;
  } else if (scale.element_type() == DataType::BF16) {
    weight.scale_type = ScaleType::kBfloat16;
  } else {
    return invalid("scale must be float32 or bfloat16");
  }
  const std::int64_t groups = height(scale);
  if (groups < 1 || width(scale) != weight.columns || weight.stored % groups != 0 ||
      weight.stored / groups % step != 0) {
    return invalid("scale has shape " + describe(scale) + " for " + std::to_string(weight.stored) +
                   " stored elements and " + std::to_string(weight.columns) + " columns");
  }
  weight.scale = scale.untyped_data();
  weight.group = weight.stored / groups;
  return ffi::Error::Success();
}

ffi::Error run(ffi::ThreadPool& pool, Format format, const hsai::Weight& weight, const hsai::Activations& activations) {
  if (weight.columns == 0) return ffi::Error::Success();
  try {
    hsai::multiply_packed(format, weight, activations, pool.num_threads(),
                          [&](std::function<void()> task) { pool.Schedule(std::move(task)); });
  } catch (const std::exception& error) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, std::string("hsai_kernels: ") + error.what());
  }
  return ffi::Error::Success();
}

// values: int8 (D, F), or words (D * bits / 32, F) of codes of 2, 3 or 4 bits; `centered` puts zero in the middle of the
// codes; scale (D/g, F).
ffi::Error quantized_matmul(ffi::ThreadPool pool, AnyBuffer x, AnyBuffer values, AnyBuffer scale,
                            ffi::Result<AnyBuffer> out, std::int64_t bits, bool centered,
                            std::int64_t activation_bits) {
  if (!is_matrix(x) || !is_matrix(values) || !is_matrix(scale) || !is_matrix(*out)) {
    return invalid("quantized_matmul takes matrices");
  }
  const bool packed = values.element_type() == DataType::U32;
  if (!packed && values.element_type() != DataType::S8) return invalid("values must be int8 or uint32");
  if (packed ? bits < 2 || bits > 4 : bits != 8) {
    return invalid("values of " + std::to_string(bits) + " bits do not stand in such an array");
  }
  if (!packed && centered) return invalid("int8 values have no codes to center");
  constexpr Format kFormats[] = {Format::kInt2, Format::kInt3, Format::kInt4};
  const Format format = packed ? kFormats[bits - 2] : Format::kInt8;
  // As many rows as hold whole elements, and those: three words of 3 bits hold 32.
  const std::int64_t rows = bits == 3 ? 3 : 1, step = packed ? 32 * rows / bits : 1;
  hsai::Weight weight = {};
  weight.values = values.untyped_data();
  weight.columns = width(values);
  if (height(values) % rows != 0) return invalid("words of 3 bits come by threes, got values " + describe(values));
  weight.dense = weight.stored = height(values) / rows * step;
  weight.zero = packed ? (1 << bits) - (centered ? 1 : 0) : 0;
  if (weight.dense < 1 || width(x) != weight.dense) {
    return invalid("x has shape " + describe(x) + ", the weight contracts over " + std::to_string(weight.dense));
  }
  hsai::Activations activations;
  if (auto error = read_activations(x, *out, weight.columns, format, activation_bits, activations); error.failure()) {
    return error;
  }
  if (auto error = read_scale(scale, step, weight); error.failure()) return error;
  return run(pool, format, weight, activations);
}

// Checks choices (D/32, F/V) and fills in the weight's; (0, F) for an N:4 or N:8 weight.
ffi::Error read_choices(const AnyBuffer& choices, std::int64_t m, bool integer, hsai::Weight& weight) {
  if (choices.element_type() != DataType::U32) return invalid("choices must be uint32");
  weight.pattern = m;
  if (height(choices) == 0) {
    if (m != 4 && m != 8) return invalid("m=" + std::to_string(m) + " needs choices");
    if (m == 8 && !integer) return invalid("m=8 without choices is for integers only");
    return ffi::Error::Success();
  }
  if (m != 8 && m != 16 && m != 32) return invalid("m=" + std::to_string(m) + " takes no choices");
  if (!integer) return invalid("choices are for integers only");
  const std::int64_t blocks = width(choices);
  if (height(choices) * 32 != weight.dense || blocks < 1 || weight.columns % blocks != 0 ||
      weight.columns / blocks % hsai::kBlockColumns != 0) {
    return invalid("choices have shape " + describe(choices) + " for " + std::to_string(weight.dense) +
                   " positions and " + std::to_string(weight.columns) + " columns");
  }
  weight.choices = static_cast<const std::uint32_t*>(choices.untyped_data());
  weight.width = weight.columns / blocks;
  return ffi::Error::Success();
}

// values: float32, bfloat16 or int8 (C, F), or int4 words (C/8, F); indices (C/16, F), or (3*C/32, F) for N:8; scale (D/g, F),
// or (0, F) for none; choices (D/32, F/V), or (0, F) for N:4 and N:8.
ffi::Error sparse_matmul(ffi::ThreadPool pool, AnyBuffer x, AnyBuffer values, AnyBuffer indices, AnyBuffer scale,
                         AnyBuffer choices, ffi::Result<AnyBuffer> out, std::int64_t n, std::int64_t m,
                         std::int64_t activation_bits) {
  if (!is_matrix(x) || !is_matrix(values) || !is_matrix(indices) || !is_matrix(scale) || !is_matrix(choices) ||
      !is_matrix(*out)) {
    return invalid("sparse_matmul takes matrices");
  }
  const bool eighths = m == 8 && height(choices) == 0;
  if (n < 1 || n > 4 || n == (eighths ? 3 : 4)) {
    return invalid("n=" + std::to_string(n) + (eighths ? " of 8 is not 1, 2 or 4" : " of 4 is not 1, 2 or 3"));
  }
  Format format;
  switch (values.element_type()) {
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
  const bool packed = format == Format::kSparseInt4, integer = hsai::is_integer(format);
  hsai::Weight weight = {};
  weight.values = values.untyped_data();
  weight.columns = width(values);
  weight.stored = height(values) * (packed ? 8 : 1);
  weight.dense = width(x);
  if (weight.stored < 1 || weight.stored % 16 != 0 || m < 4 || weight.dense % m != 0 ||
      weight.dense / m * n != weight.stored) {
    return invalid("x has shape " + describe(x) + ", values " + describe(values) + " keep " + std::to_string(n) +
                   " of " + std::to_string(m));
  }
  if (auto error = read_choices(choices, m, integer, weight); error.failure()) return error;
  if (indices.element_type() != DataType::U32 || height(indices) * 32 != weight.stored * (eighths ? 3 : 2) ||
      weight.stored % (eighths ? 32 : 16) != 0 || width(indices) != weight.columns) {
    return invalid("indices have shape " + describe(indices) + " for values " + describe(values));
  }
  weight.indices = static_cast<const std::uint32_t*>(indices.untyped_data());
  hsai::Activations activations;
  if (auto error = read_activations(x, *out, weight.columns, format, activation_bits, activations); error.failure()) {
    return error;
  }
  if (integer) {
    // What the kernels take at once: 8 values, and whole groups of 4 where they do not divide those.
    if (auto error = read_scale(scale, n == 3 ? 24 : 8, weight); error.failure()) return error;
  } else {
    if (height(scale) != 0) return invalid("floating values take no scale, got " + describe(scale));
    weight.scale_type = ScaleType::kNone;
    weight.group = weight.stored;
  }
  return run(pool, format, weight, activations);
}

}  // namespace

// The library's exports; everything else in it is hidden.
#define HSAI_EXPORT extern "C" __attribute__((visibility("default")))

HSAI_EXPORT XLA_FFI_Error* HsaiQuantizedMatmul(XLA_FFI_CallFrame* call_frame);
HSAI_EXPORT XLA_FFI_Error* HsaiSparseMatmul(XLA_FFI_CallFrame* call_frame);

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    HsaiQuantizedMatmul, quantized_matmul,
    ffi::Ffi::Bind()
        .Ctx<ffi::ThreadPool>()
        .Arg<AnyBuffer>()
        .Arg<AnyBuffer>()
        .Arg<AnyBuffer>()
        .Ret<AnyBuffer>()
        .Attr<std::int64_t>("bits")
        .Attr<bool>("centered")
        .Attr<std::int64_t>("activation_bits"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(HsaiSparseMatmul, sparse_matmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Ret<AnyBuffer>()
                                  .Attr<std::int64_t>("n")
                                  .Attr<std::int64_t>("m")
                                  .Attr<std::int64_t>("activation_bits"));

// The name of the instruction set that the kernels use (select.cc), and the choice of another; 0 if it has none.
HSAI_EXPORT const char* HsaiInstructionSet() { return hsai::current_products().name; }
HSAI_EXPORT int HsaiUseInstructionSet(const char* name) { return hsai::use_products(name); }
