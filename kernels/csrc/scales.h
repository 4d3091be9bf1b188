// The scales of a weight, read as floats. Included by products.cc only.
#ifndef HSAI_KERNELS_SCALES_H_
#define HSAI_KERNELS_SCALES_H_

#include "lanes.h"
#include "products.h"

namespace hsai {
namespace {

// The scales of L columns; `at` counts from the first scale of all.
template <int L>
HSAI_INLINE typename Lanes<L>::Float load_scale(const Weight& w, std::int64_t at) {
  if (w.scale_type == ScaleType::kBfloat16) return load_bfloat16<L>(static_cast<const std::uint16_t*>(w.scale) + at);
  return load<typename Lanes<L>::Float>(static_cast<const float*>(w.scale) + at);
}

}  // namespace
}  // namespace hsai

#endif  // HSAI_KERNELS_SCALES_H_
