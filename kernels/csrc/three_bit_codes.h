// Codes of 3 bits in integers: 32 of a column stand in three words, two with their low 2 bits and one with the bits above
// (packing.py). Unfolded, they are four words of 4-bit slots, and the rest is as for codes of 4 bits: a word of them costs
// 8 instructions where 4 bits have 3, and a quarter less memory. Included by products.cc only.
#ifndef HSAI_KERNELS_THREE_BIT_CODES_H_
#define HSAI_KERNELS_THREE_BIT_CODES_H_

#include "integer_products.h"

namespace hsai {
namespace {

// Of every 4 bits the lower two of `low`, the upper two of `high`.
template <int L>
HSAI_INLINE typename Lanes<L>::Word join_slots(const typename Lanes<L>::Word& low,
                                               const typename Lanes<L>::Word& high) {
#if defined(__AVX512F__)
  if constexpr (L == 16) {
    const __m512i lower = _mm512_set1_epi32(0x33333333);
    return (typename Lanes<L>::Word)_mm512_ternarylogic_epi32(lower, (__m512i)low, (__m512i)high, 0xca);
  }
#endif
  return (low & 0x33333333u) | (high & ~0x33333333u);
}

// As Codes, of 3 bits; blocks are of whole threes of words.
struct ThreeBitCodes {
  template <int L>
  using Dot = Dots<L>;
  static constexpr int kMostRows = 8;  // at a time
  static constexpr int kMostSums = kFewSums;
  static constexpr int kStep = 32;  // elements of three words
  static constexpr bool kCodes = true;
  static constexpr bool kSparse = false;
  static constexpr bool kWide = false;
  static constexpr bool kChosen = false;
  static constexpr int kZeroPoint = 0;
  static constexpr int kUnit = 2;

  // Word kWord of four with 4-bit slots, from the word with its low 2 bits and the one with all bits above, which are bit
  // kWord of every slot there.
  template <int kWord, int L>
  static HSAI_INLINE typename Lanes<L>::Word unfold(const typename Lanes<L>::Word& low,
                                                    const typename Lanes<L>::Word& high) {
    if constexpr (kWord < 2) {
      return join_slots<L>(low >> (2 * kWord), high << (2 - kWord));
    } else {
      return join_slots<L>(low >> (2 * kWord - 4), high >> (kWord - 2));
    }
  }

  // 32 elements of U * L columns; `ahead` leads to the same words a block later.
  template <int L, int P, int R, int U>
  static HSAI_INLINE void add_words(const std::uint32_t* words, std::int64_t stride, std::int64_t ahead,
                                    const Planes& x, int row, std::int64_t element, DotSums<L, P, R, U>& sums) {
    using Word = typename Lanes<L>::Word;
    Word low[U], high[U];
    const auto load_row = [&](Word(&to)[U], int index) HSAI_INLINE_LAMBDA {
      unroll<U>([&](auto u) HSAI_INLINE_LAMBDA {
        to[u.value] = load<Word>(words + index * stride + u.value * L);
        fetch_ahead(words + index * stride + u.value * L + ahead);
      });
    };
    load_row(high, 2);
    unroll<4>([&](auto word) HSAI_INLINE_LAMBDA {
      if constexpr (word.value % 2 == 0) load_row(low, word.value / 2);
      Word slots[U];
      unroll<U>([&](auto u) HSAI_INLINE_LAMBDA {
        slots[u.value] = unfold<decltype(word)::value, L>(low[u.value], high[u.value]);
      });
      unroll<2>([&](auto part) HSAI_INLINE_LAMBDA {
        Word codes[U];
        unroll<U>([&](auto u) HSAI_INLINE_LAMBDA {
          codes[u.value] = (slots[u.value] >> (4 * part.value)) & 0x07070707u;
        });
        add_codes<L, P, R, U>(codes, x, row, element + 8 * word.value + 4 * part.value, sums);
      });
    });
  }

  template <int L, int P, int R, int U>
  static HSAI_INLINE void add(const Weight& w, const Planes& x, int row, std::int64_t first, std::int64_t last,
                              std::int64_t column, DotSums<L, P, R, U>& sums, DotSums<L, 1, 1, U>&) {
    const auto* words = static_cast<const std::uint32_t*>(w.values) + first / kStep * 3 * w.columns + column;
    const std::int64_t ahead = x.ahead / kStep * 3 * w.columns;
    for (std::int64_t element = first; element < last; element += kStep, words += 3 * w.columns) {
      add_words<L, P, R, U>(words, w.columns, ahead, x, row, element, sums);
    }
  }

  static constexpr int kFours = 8;

  template <int L, class Sink>
  static HSAI_INLINE void unpack(const Weight& w, std::int64_t element, std::int64_t, std::int64_t column,
                                 const Sink& sink) {
    using Word = typename Lanes<L>::Word;
    const auto* words = static_cast<const std::uint32_t*>(w.values) + element / kStep * 3 * w.columns + column;
    for (int i = 0; i < 3; ++i) fetch_ahead(words + (kUnpackAhead / kStep * 3 + i) * w.columns);
    const Word low[2] = {load<Word>(words), load<Word>(words + w.columns)};
    const auto high = load<Word>(words + 2 * w.columns);
    unroll<4>([&](auto word) HSAI_INLINE_LAMBDA {
      const Word slots = unfold<decltype(word)::value, L>(low[word.value / 2], high);
      unroll<2>([&](auto part) HSAI_INLINE_LAMBDA {
        sink(2 * word.value + part.value, sign_codes<L>((slots >> (4 * part.value)) & 0x07070707u, w));
      });
    });
  }
};

}  // namespace
}  // namespace hsai

#endif  // HSAI_KERNELS_THREE_BIT_CODES_H_
