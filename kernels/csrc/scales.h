// The scales of a weight, read as floats. Included by products.cc only.
#ifndef HSAI_KERNELS_SCALES_H_
#define HSAI_KERNELS_SCALES_H_

#include "lanes.h"
#include "products.h"

namespace hsai {
namespace {

// The numbers `at` to at + L - 1 of an array of that type.
template <int L>
HSAI_INLINE typename Lanes<L>::Float load_numbers(const void* from, ScaleType type, std::int64_t at) {
  if (type == ScaleType::kBfloat16) return load_bfloat16<L>(static_cast<const std::uint16_t*>(from) + at);
  if (type == ScaleType::kFloat16) return load_float16<L>(static_cast<const std::uint16_t*>(from) + at);
  return load<typename Lanes<L>::Float>(static_cast<const float*>(from) + at);
}

// The scales of L columns; `at` counts from the first scale of all.
template <int L>
HSAI_INLINE typename Lanes<L>::Float load_scale(const Weight& w, std::int64_t at) {
  return load_numbers<L>(w.scale, w.scale_type, at);
}

// The same of a weight with minima.
template <int L>
HSAI_INLINE typename Lanes<L>::Float load_minimum(const Weight& w, std::int64_t at) {
  return load_numbers<L>(w.minimum, w.scale_type, at);
}

// Asks for those of columns that are soon read.
HSAI_INLINE void fetch_scales(const Weight& w, std::int64_t at) {
  const std::int64_t from = at * (w.scale_type == ScaleType::kFloat32 ? 4 : 2);
  __builtin_prefetch(static_cast<const char*>(w.scale) + from, 0, 2);
  if (w.minimum != nullptr) __builtin_prefetch(static_cast<const char*>(w.minimum) + from, 0, 2);
}

}  // namespace
}  // namespace hsai

#endif  // HSAI_KERNELS_SCALES_H_
