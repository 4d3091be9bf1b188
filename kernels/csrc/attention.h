// One attention from raw buffers: splits rows and keys into tiles, runs them, joins what they leave.
#ifndef HSAI_KERNELS_ATTENTION_H_
#define HSAI_KERNELS_ATTENTION_H_

#include <cstdint>

#include "attention_tile.h"
#include "multiply.h"

namespace hsai {

// Fills in `group` and `width` itself. B, T, S, N, K and H are at least 1.
// Throws std::bad_alloc, before any tile has started. The result does not depend on `threads`.
void attend(Attention attention, std::int64_t threads, const Schedule& schedule);

}  // namespace hsai

#endif  // HSAI_KERNELS_ATTENTION_H_
