// What the XLA FFI handlers share: an error status, and a buffer's shape in words.
#ifndef HSAI_KERNELS_FFI_CHECKS_H_
#define HSAI_KERNELS_FFI_CHECKS_H_

#include <cstdint>
#include <string>
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

}  // namespace hsai

#endif  // HSAI_KERNELS_FFI_CHECKS_H_
