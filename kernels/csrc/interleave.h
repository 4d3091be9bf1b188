// Rows of bytes interleaved: a lane needs consecutive elements of its column, which lie in different rows of an int8 array.
// Included by products.cc only.
#ifndef HSAI_KERNELS_INTERLEAVE_H_
#define HSAI_KERNELS_INTERLEAVE_H_

#include "lanes.h"

namespace hsai {
namespace {

// Four rows, `stride` apart, byte by byte: lane i holds column i of all of them, the first row lowest.
template <int L>
HSAI_INLINE typename Lanes<L>::Word interleave_four(const std::int8_t* from, std::int64_t stride) {
  using Word = typename Lanes<L>::Word;
#if defined(__AVX512F__)
  if constexpr (L == 16) {
    // Four columns of each row to a quarter, then a quarter's 4 x 4 bytes transposed.
    __m512i all = _mm512_castsi128_si512(load<__m128i>(from));
    all = _mm512_inserti32x4(all, load<__m128i>(from + stride), 1);
    all = _mm512_inserti32x4(all, load<__m128i>(from + 2 * stride), 2);
    all = _mm512_inserti32x4(all, load<__m128i>(from + 3 * stride), 3);
    const __m512i quarters = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    const __m512i transposed = _mm512_set4_epi32(0x0f0b0703, 0x0e0a0602, 0x0d090501, 0x0c080400);
    return (Word)_mm512_shuffle_epi8(_mm512_maskz_permutexvar_epi32(0xffff, quarters, all), transposed);
  }
#elif defined(__AVX2__)
  if constexpr (L == 8) {
    const auto load_two = [&](int i) HSAI_INLINE_LAMBDA {
      return _mm_unpacklo_epi64(_mm_loadl_epi64((const __m128i*)(from + i * stride)),
                                _mm_loadl_epi64((const __m128i*)(from + (i + 1) * stride)));
    };
    const __m256i all = _mm256_inserti128_si256(_mm256_castsi128_si256(load_two(0)), load_two(2), 1);
    const __m256i halves = _mm256_set_epi32(7, 5, 3, 1, 6, 4, 2, 0);
    const __m256i transposed = _mm256_broadcastsi128_si256(
        _mm_set_epi32(0x0f0b0703, 0x0e0a0602, 0x0d090501, 0x0c080400));
    return (Word)_mm256_shuffle_epi8(_mm256_permutevar8x32_epi32(all, halves), transposed);
  }
#elif defined(__aarch64__)
  if constexpr (L == 4) {
    Word all = {};
    for (int i = 0; i < 4; ++i) all[i] = load<std::uint32_t>(from + i * stride);
    const Word transposed = {0x0c080400u, 0x0d090501u, 0x0e0a0602u, 0x0f0b0703u};
    return (Word)vqtbl1q_u8((uint8x16_t)all, (uint8x16_t)transposed);
  }
#endif
  Word words = {};
  for (int i = 0; i < 4; ++i) words |= (Word)(load_int8<L>(from + i * stride) & 0xff) << (8 * i);
  return words;
}

// Two rows, `stride` apart, in halves of 16 bits with their signs: lane i holds column i of both, the first row lower.
template <int L>
HSAI_INLINE typename Lanes<L>::Word interleave_two(const std::int8_t* from, std::int64_t stride) {
  using Word = typename Lanes<L>::Word;
#if defined(__AVX2__)
  if constexpr (L == 8) {
    return (Word)_mm256_cvtepi8_epi16(_mm_unpacklo_epi8(_mm_loadl_epi64((const __m128i*)(from)),
                                                        _mm_loadl_epi64((const __m128i*)(from + stride))));
  }
#elif defined(__aarch64__)
  if constexpr (L == 4) {
    const int8x8_t low = vreinterpret_s8_u32(vdup_n_u32(load<std::uint32_t>(from)));
    const int8x8_t high = vreinterpret_s8_u32(vdup_n_u32(load<std::uint32_t>(from + stride)));
    return (Word)vmovl_s8(vzip1_s8(low, high));
  }
#elif defined(__SSE2__)
  if constexpr (L == 4) {
    const __m128i low = _mm_cvtsi32_si128(load<std::int32_t>(from));
    const __m128i high = _mm_cvtsi32_si128(load<std::int32_t>(from + stride));
    const __m128i bytes = _mm_unpacklo_epi8(low, high);
    return (Word)_mm_srai_epi16(_mm_unpacklo_epi8(bytes, bytes), 8);
  }
#endif
  const Word low = (Word)load_int8<L>(from), high = (Word)load_int8<L>(from + stride);
  return (low & 0xffffu) | high << 16;
}

}  // namespace
}  // namespace hsai

#endif  // HSAI_KERNELS_INTERLEAVE_H_
