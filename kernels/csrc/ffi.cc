// XLA FFI handlers: they check everything that they are given, and return an error status instead of crashing.
//
// Called by hsai_kernels/ops/*/cpu.py, which validates before; but a program that was exported, altered or written by
// hand reaches these handlers too. Dimensions: R rows, D dense contraction, C stored elements a column, F columns.
//
// A call has as many results as weights, and the arrays of one weight after those of another. What is said here of a
// weight's arrays holds for single weights; those of layers have as many layers in front of them.

#include <algorithm>
#include <array>
#include <string>
#include <vector>

#include "ffi_checks.h"
#include "matrix.h"
#include "multiply.h"
#include "read_weight.h"
#include "stopwatch.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using ffi::AnyBuffer;
using ffi::DataType;
using hsai::describe;
using hsai::Format;
using hsai::invalid;
using hsai::Matrix;
using hsai::Stack;

// A weight as its matrices, and the buffer of its product.
template <std::size_t N>
struct Operands {
  std::array<Matrix, N> weight;
  AnyBuffer out;
};

// Finds the matrices of all weights of a call, each of N arrays.
template <std::size_t N>
ffi::Error take_operands(const Stack& stack, const ffi::RemainingArgs& arrays, const ffi::RemainingRets& results,
                         std::vector<Operands<N>>& operands) {
  if (results.size() < 1 || arrays.size() != N * results.size()) {
    return invalid(std::to_string(arrays.size()) + " arrays for " + std::to_string(results.size()) +
                   " results: a weight has " + std::to_string(N));
  }
  for (std::size_t i = 0; i < results.size(); ++i) {
    auto out = results.get<AnyBuffer>(i);
    if (out.has_error()) return out.error();
    Operands<N> found = {{}, **out};
    std::int64_t layers = -1;
    for (std::size_t j = 0; j < N; ++j) {
      auto array = arrays.get<AnyBuffer>(N * i + j);
      if (array.has_error()) return array.error();
      if (auto error = stack.take(*array, found.weight[j], layers); error.failure()) return error;
    }
    operands.push_back(found);
  }
  return ffi::Error::Success();
}

// Checks x (R, D), and fills in `activations`; `bits` is 8 for dynamic int8, else 0.
ffi::Error read_activations(const Matrix& x, Format format, std::int64_t bits, hsai::Activations& activations) {
  if (x.type != DataType::F32 && x.type != DataType::BF16) return invalid("x must be float32 or bfloat16");
  const bool integer = hsai::is_integer(format);
  const std::int64_t most = integer ? hsai::kMaxIntegerRows : hsai::kMaxRows;
  if (x.height < 1 || x.height > most) {
    return invalid("x has shape " + describe(x) + ", needs 1 to " + std::to_string(most) + " rows");
  }
  if (bits != 0 && (bits != 8 || !integer)) {
    return invalid("activations of " + std::to_string(bits) + " bits are not supported for this weight");
  }
  activations = {x.data, x.type == DataType::BF16, x.height, bits == 8};
  return ffi::Error::Success();
}

// x (R, D) times every weight, which `read` checks and describes; each result is (R, F) in x's type.
template <std::size_t N, class Options, class Read>
ffi::Error multiply(ffi::ThreadPool& pool, const Stack& stack, const AnyBuffer& x, const ffi::RemainingArgs& arrays,
                    const ffi::RemainingRets& results, const Options& options, std::int64_t activation_bits,
                    const Read& read) {
  Matrix rows;
  std::int64_t single = -1;
  if (auto error = Stack().take(x, rows, single); error.failure()) return error;
  std::vector<Operands<N>> operands;
  if (auto error = take_operands(stack, arrays, results, operands); error.failure()) return error;
  hsai::Activations activations;
  std::vector<hsai::Product> products;
  Format first = {};
  for (const Operands<N>& operand : operands) {
    Format format = {};
    hsai::Product product = {};
    if (auto error = read(rows, operand.weight, options, format, product.weight); error.failure()) return error;
    if (products.empty()) {
      first = format;
      if (auto error = read_activations(rows, format, activation_bits, activations); error.failure()) return error;
    } else if (format != first || !hsai::are_alike(product.weight, products.front().weight)) {
      return invalid("weights of one call must be of one format, with groups of one size: not values " +
                     describe(operands.front().weight[0]) + " and " + describe(operand.weight[0]));
    }
    const AnyBuffer& out = operand.out;
    if (out.element_type() != rows.type || out.dimensions().size() != 2) {
      return invalid("the result must be a matrix of x's type");
    }
    if (out.dimensions()[0] != rows.height || out.dimensions()[1] != product.weight.columns) {
      return invalid("the result has shape " + describe(out) + " for x " + describe(rows) + " and " +
                     std::to_string(product.weight.columns) + " columns");
    }
    product.out = out.untyped_data();
    products.push_back(product);
  }
  const auto is_empty = [](const hsai::Product& product) { return product.weight.columns == 0; };
  products.erase(std::remove_if(products.begin(), products.end(), is_empty), products.end());
  if (products.empty()) return ffi::Error::Success();
  const hsai::Stopwatch stopwatch;
  hsai::multiply_packed(first, products, activations, pool.num_threads(),
                        [&](std::function<void()> task) { pool.Schedule(std::move(task)); });
  return ffi::Error::Success();
}

// The handlers of single weights, and those of layers, whose `layer` is the number of one.
ffi::Error quantized_matmul(ffi::ThreadPool pool, AnyBuffer x, ffi::RemainingArgs arrays, ffi::RemainingRets results,
                            std::int64_t bits, bool centered, std::int64_t activation_bits) {
  return multiply<3>(pool, Stack(), x, arrays, results, hsai::QuantizedOptions{bits, centered}, activation_bits,
                     hsai::read_quantized);
}

ffi::Error quantized_matmul_of_layer(ffi::ThreadPool pool, AnyBuffer layer, AnyBuffer x, ffi::RemainingArgs arrays,
                                     ffi::RemainingRets results, std::int64_t bits, bool centered,
                                     std::int64_t activation_bits) {
  return multiply<3>(pool, Stack(layer), x, arrays, results, hsai::QuantizedOptions{bits, centered}, activation_bits,
                     hsai::read_quantized);
}

ffi::Error sparse_matmul(ffi::ThreadPool pool, AnyBuffer x, ffi::RemainingArgs arrays, ffi::RemainingRets results,
                         std::int64_t n, std::int64_t m, std::int64_t activation_bits) {
  return multiply<4>(pool, Stack(), x, arrays, results, hsai::SparseOptions{n, m}, activation_bits, hsai::read_sparse);
}

ffi::Error sparse_matmul_of_layer(ffi::ThreadPool pool, AnyBuffer layer, AnyBuffer x, ffi::RemainingArgs arrays,
                                  ffi::RemainingRets results, std::int64_t n, std::int64_t m,
                                  std::int64_t activation_bits) {
  return multiply<4>(pool, Stack(layer), x, arrays, results, hsai::SparseOptions{n, m}, activation_bits, hsai::read_sparse);
}

}  // namespace

// The library's exports; everything else in it is hidden.
#define HSAI_EXPORT extern "C" __attribute__((visibility("default")))

HSAI_EXPORT XLA_FFI_Error* HsaiQuantizedMatmul(XLA_FFI_CallFrame* call_frame);
HSAI_EXPORT XLA_FFI_Error* HsaiQuantizedMatmulOfLayer(XLA_FFI_CallFrame* call_frame);
HSAI_EXPORT XLA_FFI_Error* HsaiSparseMatmul(XLA_FFI_CallFrame* call_frame);
HSAI_EXPORT XLA_FFI_Error* HsaiSparseMatmulOfLayer(XLA_FFI_CallFrame* call_frame);

// What x is followed by.
#define HSAI_WEIGHTS RemainingArgs().RemainingRets()
#define HSAI_QUANTIZED Attr<std::int64_t>("bits").Attr<bool>("centered").Attr<std::int64_t>("activation_bits")
#define HSAI_SPARSE Attr<std::int64_t>("n").Attr<std::int64_t>("m").Attr<std::int64_t>("activation_bits")

XLA_FFI_DEFINE_HANDLER_SYMBOL(HsaiQuantizedMatmul, hsai::Guarded<quantized_matmul>(),
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<AnyBuffer>().HSAI_WEIGHTS.HSAI_QUANTIZED);
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    HsaiQuantizedMatmulOfLayer, hsai::Guarded<quantized_matmul_of_layer>(),
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<AnyBuffer>().Arg<AnyBuffer>().HSAI_WEIGHTS.HSAI_QUANTIZED);
XLA_FFI_DEFINE_HANDLER_SYMBOL(HsaiSparseMatmul, hsai::Guarded<sparse_matmul>(),
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<AnyBuffer>().HSAI_WEIGHTS.HSAI_SPARSE);
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    HsaiSparseMatmulOfLayer, hsai::Guarded<sparse_matmul_of_layer>(),
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<AnyBuffer>().Arg<AnyBuffer>().HSAI_WEIGHTS.HSAI_SPARSE);

// Nanoseconds in which kernels have run.
HSAI_EXPORT std::int64_t HsaiKernelNanoseconds() { return hsai::kernel_clock.nanoseconds(); }

// The name of the instruction set that the kernels use (select.cc), and the choice of another; 0 if it has none.
HSAI_EXPORT const char* HsaiInstructionSet() { return hsai::current_products().name; }
HSAI_EXPORT int HsaiUseInstructionSet(const char* name) { return hsai::use_products(name); }
