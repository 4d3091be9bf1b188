// int8 weights in integers: a lane needs consecutive elements of its column, which lie in different rows of the array, so
// rows are interleaved on the way. Included by products.cc only.
#ifndef HSAI_KERNELS_INT8_CODES_H_
#define HSAI_KERNELS_INT8_CODES_H_

#include "integer_products.h"

namespace hsai {
namespace {

// Where the rows of `count` elements from `element` on begin, counted from that of the first. A block may end within a
// word; its digits go on with zeros, and what they meet is the last row once more, never one that is not there.
template <int kCount>
struct RowOffsets {
  std::int64_t at[kCount];

  HSAI_INLINE RowOffsets(const Weight& w, std::int64_t element, std::int64_t last) {
    for (std::int64_t i = 0; i < kCount; ++i) at[i] = (element + i < last ? i : last - 1 - element) * w.columns;
  }
};

// Four rows, byte by byte: lane i holds column i of all of them, the first row lowest.
template <int L>
HSAI_INLINE typename Lanes<L>::Word interleave_four(const std::int8_t* from, const RowOffsets<4>& rows) {
  using Word = typename Lanes<L>::Word;
#if defined(__AVX512F__)
  if constexpr (L == 16) {
    // Four columns of each row to a quarter, then a quarter's 4 x 4 bytes transposed.
    __m512i all = _mm512_castsi128_si512(load<__m128i>(from + rows.at[0]));
    all = _mm512_inserti32x4(all, load<__m128i>(from + rows.at[1]), 1);
    all = _mm512_inserti32x4(all, load<__m128i>(from + rows.at[2]), 2);
    all = _mm512_inserti32x4(all, load<__m128i>(from + rows.at[3]), 3);
    const __m512i quarters = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    const __m512i transposed = _mm512_set4_epi32(0x0f0b0703, 0x0e0a0602, 0x0d090501, 0x0c080400);
    return (Word)_mm512_shuffle_epi8(_mm512_maskz_permutexvar_epi32(0xffff, quarters, all), transposed);
  }
#elif defined(__AVX2__)
  if constexpr (L == 8) {
    const auto load_two = [&](int i) HSAI_INLINE_LAMBDA {
      return _mm_unpacklo_epi64(_mm_loadl_epi64((const __m128i*)(from + rows.at[i])),
                                _mm_loadl_epi64((const __m128i*)(from + rows.at[i + 1])));
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
    for (int i = 0; i < 4; ++i) all[i] = load<std::uint32_t>(from + rows.at[i]);
    const Word transposed = {0x0c080400u, 0x0d090501u, 0x0e0a0602u, 0x0f0b0703u};
    return (Word)vqtbl1q_u8((uint8x16_t)all, (uint8x16_t)transposed);
  }
#endif
  Word words = {};
  for (int i = 0; i < 4; ++i) words |= (Word)(load_int8<L>(from + rows.at[i]) & 0xff) << (8 * i);
  return words;
}

// Two rows, in halves of 16 bits with their signs: lane i holds column i of both, the first row lower.
template <int L>
HSAI_INLINE typename Lanes<L>::Word interleave_two(const std::int8_t* from, const RowOffsets<2>& rows) {
  using Word = typename Lanes<L>::Word;
#if defined(__AVX2__)
  if constexpr (L == 8) {
    return (Word)_mm256_cvtepi8_epi16(_mm_unpacklo_epi8(_mm_loadl_epi64((const __m128i*)(from + rows.at[0])),
                                                        _mm_loadl_epi64((const __m128i*)(from + rows.at[1]))));
  }
#elif defined(__aarch64__)
  if constexpr (L == 4) {
    const int8x8_t low = vreinterpret_s8_u32(vdup_n_u32(load<std::uint32_t>(from + rows.at[0])));
    const int8x8_t high = vreinterpret_s8_u32(vdup_n_u32(load<std::uint32_t>(from + rows.at[1])));
    return (Word)vmovl_s8(vzip1_s8(low, high));
  }
#elif defined(__SSE2__)
  if constexpr (L == 4) {
    const __m128i low = _mm_cvtsi32_si128(load<std::int32_t>(from + rows.at[0]));
    const __m128i high = _mm_cvtsi32_si128(load<std::int32_t>(from + rows.at[1]));
    const __m128i bytes = _mm_unpacklo_epi8(low, high);
    return (Word)_mm_srai_epi16(_mm_unpacklo_epi8(bytes, bytes), 8);
  }
#endif
  const Word low = (Word)load_int8<L>(from + rows.at[0]), high = (Word)load_int8<L>(from + rows.at[1]);
  return (low & 0xffffu) | high << 16;
}

// int8 weights by digits of a byte (kWideDigits says where), or of two.
struct Int8Codes {
  static constexpr bool kSparse = false;
  static constexpr bool kChosen = false;
  static constexpr bool kWide = kWideDigits;
  static constexpr int kStep = kWide ? 2 : 4;  // elements a word
  // Multiplied as unsigned bytes where Dots wants the first one unsigned.
  static constexpr int kZeroPoint = kWide || !kBiasedDigits ? 0 : 128;
  static constexpr int kUnit = 1;

  template <int L, int P, int R, int U, class Sums, class Excess>
  static HSAI_INLINE void add(const Weight& w, const Planes& x, int row, std::int64_t first, std::int64_t last,
                              std::int64_t column, Sums& sums, Excess&) {
    using Word = typename Lanes<L>::Word;
    const std::int64_t padding = first / x.block * (x.padded - x.block);
    for (std::int64_t element = first; element < last; element += kStep) {
      const auto* from = static_cast<const std::int8_t*>(w.values) + element * w.columns + column;
      const RowOffsets<kStep> rows(w, element, last);
      Word codes[U];
      unroll<U>([&](auto u) HSAI_INLINE_LAMBDA {
        if constexpr (kWide) {
          codes[u.value] = interleave_two<L>(from + u.value * L, rows);
        } else {
          codes[u.value] = interleave_four<L>(from + u.value * L, rows);
          if constexpr (kZeroPoint != 0) codes[u.value] ^= 0x80808080u;
        }
      });
      for (int i = 0; i < kStep; ++i) __builtin_prefetch(from + rows.at[i] + x.block * w.columns, 0, 2);
      unroll<P>([&](auto p) HSAI_INLINE_LAMBDA {
        unroll<R>([&](auto r) HSAI_INLINE_LAMBDA {
          const auto* digits = find_digits(x, p.value, row + r.value) + (element + padding) * (kWide ? 2 : 1);
          const Word word = Word{} + load_word(digits);
          unroll<U>([&](auto u) HSAI_INLINE_LAMBDA { sums.at[p.value][r.value][u.value].add(codes[u.value], word); });
        });
      });
    }
  }
};

}  // namespace
}  // namespace hsai

#endif  // HSAI_KERNELS_INT8_CODES_H_
