// V:N:M weights: gathers the activations that a block of V columns may keep, so that the rest of the product is N:4.
// Included by products.cc only.
#ifndef HSAI_KERNELS_CHOOSE_H_
#define HSAI_KERNELS_CHOOSE_H_

#include <array>
#include <cstdint>

#include "lanes.h"

namespace hsai {
namespace {

using Bytes8 = std::array<std::uint8_t, 8>;

// For each set of 8 bytes, where its members stand, in order; 0x80, which picks a zero, for the places that are left.
constexpr std::array<Bytes8, 256> list_members() {
  std::array<Bytes8, 256> members{};
  for (int set = 0; set < 256; ++set) {
    int count = 0;
    for (int i = 0; i < 8; ++i) members[set][i] = 0x80;
    for (int i = 0; i < 8; ++i) {
      if (set >> i & 1) members[set][count++] = static_cast<std::uint8_t>(i);
    }
  }
  return members;
}

constexpr std::array<Bytes8, 256> kMembers = list_members();

// Writes the members of `set` of the 8 bytes at `from` to `to`, and zeros up to 8.
HSAI_INLINE void compact_bytes(const std::uint8_t* from, std::uint32_t set, std::uint8_t* to) {
  const std::uint8_t* members = kMembers[set].data();
#if defined(__AVX2__)
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  const __m128i picked = _mm_shuffle_epi8(bytes, _mm_loadl_epi64(reinterpret_cast<const __m128i*>(members)));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), picked);
#else
  for (int i = 0; i < 8; ++i) to[i] = members[i] < 8 ? from[members[i]] : 0;
#endif
}

// Bytes behind the result that gather_chosen may write.
constexpr int kGatherPadding = 8;

// Of `span` digits the 4 of every `pattern` (8, 16 or 32) that are set in `choices`, `stride` apart. A group of fewer
// than 4 ends in zeros; of more, the first 4 are taken.
HSAI_INLINE void gather_chosen(const std::uint8_t* from, const std::uint32_t* choices, std::int64_t stride,
                               std::int64_t span, std::int64_t pattern, std::uint8_t* to) {
  int filled = 0;
  for (std::int64_t first = 0; first < span; first += 8) {
    if (first % pattern == 0) filled = 0;
    const std::uint32_t set = choices[first / 32 * stride] >> (first % 32) & 255u;
    compact_bytes(from + first, set, to + first / pattern * 4 + filled);
    filled += __builtin_popcount(set);
    filled = filled < 4 ? filled : 4;
  }
}

}  // namespace
}  // namespace hsai

#endif  // HSAI_KERNELS_CHOOSE_H_
