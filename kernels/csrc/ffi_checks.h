// What the XLA FFI handlers share: an error status, and a buffer's shape in words.
#ifndef HSAI_KERNELS_FFI_CHECKS_H_
#define HSAI_KERNELS_FFI_CHECKS_H_

#include <cstdint>
#include <exception>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace hsai {

inline xla::ffi::Error invalid(const std::string& message) {
  return xla::ffi::Error::InvalidArgument("hsai_kernels: " + message);
}

inline std::vector<std::int64_t> list_sizes(const xla::ffi::AnyBuffer& buffer) {
  return {buffer.dimensions().begin(), buffer.dimensions().end()};
}

// "(2,3,)"
inline std::string describe(const std::vector<std::int64_t>& sizes) {
  std::string text = "(";
  for (const std::int64_t size : sizes) text += std::to_string(size) + ",";
  return text + ")";
}

inline std::string describe(const xla::ffi::AnyBuffer& buffer) { return describe(list_sizes(buffer)); }

// A handler whose exceptions are errors by their own names, wherever they are thrown: what a handler lists, and the words
// of an error that it found, want memory too. XLA catches what gets past here (jaxlib 0.10.2), and calls it unknown.
template <auto kHandler>
struct Guarded;

template <class... Args, xla::ffi::Error (*kHandler)(Args...)>
struct Guarded<kHandler> {
  xla::ffi::Error operator()(Args... args) const {
    using xla::ffi::Error;
    using xla::ffi::ErrorCode;
    try {
      return kHandler(std::move(args)...);
    } catch (const std::bad_alloc&) {
      return Error(ErrorCode::kResourceExhausted, "out of memory");  // so short that it takes none
    } catch (const std::exception& error) {
      return Error(ErrorCode::kInternal, std::string("hsai_kernels: ") + error.what());
    }
  }
};

}  // namespace hsai

#endif  // HSAI_KERNELS_FFI_CHECKS_H_
