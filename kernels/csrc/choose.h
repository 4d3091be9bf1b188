// V:N:M weights: gathers the activations that a block of V columns may keep, so that the rest of the product is N:4.
// Included by products.cc only.
#ifndef HSAI_KERNELS_CHOOSE_H_
#define HSAI_KERNELS_CHOOSE_H_

#include <array>
#include <cstdint>
#include <cstring>

#include "lanes.h"
#include "planes.h"

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

// Bytes behind a row of the result that gather_chosen may write.
constexpr int kGatherPadding = 8;

// Writes the members of a set (a row of kMembers) of the 8 bytes at `from` to `to`, and zeros up to 8.
HSAI_INLINE void compact_bytes(const std::uint8_t* from, const Bytes8& members, std::uint8_t* to) {
#if defined(__AVX2__)
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  const __m128i places = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(members.data()));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_shuffle_epi8(bytes, places));
#elif defined(__aarch64__)
  vst1_u8(to, vtbl1_u8(vld1_u8(from), vld1_u8(members.data())));
#else
  for (int i = 0; i < 8; ++i) to[i] = members[i] < 8 ? from[members[i]] : 0;
#endif
}

#if defined(__AVX512BW__)
// The same for 64 positions of every row at a time, from `at` on while there are so many and each 8 of them have 4
// members; returns where that ends. Compressing bytes is an instruction that not all of these machines have.
__attribute__((noinline, target("avx512f,avx512bw,avx512vl,avx512vbmi2,avx512bitalg"))) std::int64_t compress_chosen(
    const std::uint8_t* from, std::int64_t row, std::int64_t plane, int rows, int planes, std::int64_t span,
    const std::uint32_t* choices, std::int64_t stride, std::uint8_t* to, std::int64_t row_stride,
    std::int64_t plane_stride) {
  std::int64_t at = 0;
  for (; at + 64 <= span; at += 64, to += 32) {
    const std::uint64_t low = choices[at / 32 * stride], high = choices[(at / 32 + 1) * stride];
    const auto set = static_cast<long long>(high << 32 | low);
    const __m128i counts = _mm_popcnt_epi8(_mm_cvtsi64_si128(set));
    if ((_mm_cmpeq_epi8_mask(counts, _mm_set1_epi8(4)) & 0xff) != 0xff) return at;
    for (int p = 0; p < planes; ++p) {
      for (int r = 0; r < rows; ++r) {
        const __m512i digits = _mm512_loadu_si512(from + p * plane + r * row + at);
        const __m512i chosen = _mm512_maskz_compress_epi8(static_cast<__mmask64>(set), digits);
        // Not a cast to 256 bits: GCC 12 warns of it where the function has a target of its own.
        std::memcpy(to + p * plane_stride + r * row_stride, &chosen, 32);
      }
    }
  }
  return at;
}
#endif

// Of R rows of P planes, and of `span` digits each from `first` on, the 4 of every `pattern` (8, 16 or 32) that are set
// in `choices`, whose words are `stride` apart. The result's rows are `row_stride` apart, its planes `plane_stride`. A
// group of fewer than 4 ends in zeros; of more, the first 4 are taken.
template <int P, int R>
HSAI_INLINE void gather_chosen(const Planes& x, int row, std::int64_t first, std::int64_t span,
                               const std::uint32_t* choices, std::int64_t stride, std::int64_t pattern,
                               std::uint8_t* to, std::int64_t row_stride, std::int64_t plane_stride) {
  const std::uint8_t* from = x.digits + row * x.stride + first;
  const std::int64_t plane = x.rows * x.stride;
  std::int64_t at = 0;
#if defined(__AVX512BW__)
  if (pattern == 8 && __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512bitalg")) {
    at = compress_chosen(from, x.stride, plane, R, P, span, choices, stride, to, row_stride, plane_stride);
    to += at / 2;
  }
#endif
  while (at < span) {
    std::int64_t filled = 0;
    for (const std::int64_t end = at + pattern; at < end; at += 8) {
      const std::uint32_t set = choices[at / 32 * stride] >> (at & 31) & 255u;
      unroll<P>([&](auto p) HSAI_INLINE_LAMBDA {
        unroll<R>([&](auto r) HSAI_INLINE_LAMBDA {
          compact_bytes(from + p.value * plane + r.value * x.stride + at, kMembers[set],
                        to + p.value * plane_stride + r.value * row_stride + filled);
        });
      });
      filled += __builtin_popcount(set);
      filled = filled < 4 ? filled : 4;
    }
    to += 4;
  }
}

}  // namespace
}  // namespace hsai

#endif  // HSAI_KERNELS_CHOOSE_H_
