// int8 weights in integers: rows are interleaved on the way. Included by products.cc only.
#ifndef HSAI_KERNELS_INT8_CODES_H_
#define HSAI_KERNELS_INT8_CODES_H_

#include "integer_products.h"
#include "interleave.h"

namespace hsai {
namespace {

// int8 weights by digits of a byte, or of two where kWideDigits says so.
struct Int8Codes {
  static constexpr bool kCodes = false;
  static constexpr bool kSparse = false;
  static constexpr bool kChosen = false;
  static constexpr bool kWide = kWideDigits;
  template <int L>
  using Dot = std::conditional_t<kWide, WideDots<L>, Dots<L>>;
  static constexpr int kMostRows = 2;  // more have a panel (plan.cc)
  // Columns that share cache lines are best taken together: of one row in 16 lanes, all 64.
  static constexpr int kMostSums = kManyRegisters ? 12 : kFewSums;
  static constexpr int kStep = 4;  // elements at once, in one word or in two
  // Multiplied as unsigned bytes where Dots wants the first one unsigned.
  static constexpr int kZeroPoint = kWide || !kBiasedDigits ? 0 : 128;
  static constexpr int kUnit = 1;

  // Four elements of each of U * L columns, from rows `stride` apart; `at` is where their digits are.
  template <int L, int P, int R, int U, class Sums>
  static HSAI_INLINE void add_four(const std::int8_t* from, std::int64_t stride, const Planes& x, int row,
                                   std::int64_t at, Sums& sums) {
    using Word = typename Lanes<L>::Word;
    unroll<kWide ? 2 : 1>([&](auto slot) HSAI_INLINE_LAMBDA {
      Word codes[U];
      unroll<U>([&](auto u) HSAI_INLINE_LAMBDA {
        if constexpr (kWide) {
          codes[u.value] = interleave_two<L>(from + 2 * slot.value * stride + u.value * L, stride);
        } else {
          codes[u.value] = interleave_four<L>(from + u.value * L, stride);
          if constexpr (kZeroPoint != 0) codes[u.value] ^= 0x80808080u;
        }
      });
      unroll<P>([&](auto p) HSAI_INLINE_LAMBDA {
        unroll<R>([&](auto r) HSAI_INLINE_LAMBDA {
          const Word digits = Word{} + load_word(find_digits(x, p.value, row + r.value) + at + 4 * slot.value);
          unroll<U>([&](auto u) HSAI_INLINE_LAMBDA { sums.at[p.value][r.value][u.value].add(codes[u.value], digits); });
        });
      });
    });
  }

  template <int L, int P, int R, int U, class Sums, class Excess>
  static HSAI_INLINE void add(const Weight& w, const Planes& x, int row, std::int64_t first, std::int64_t last,
                              std::int64_t column, Sums& sums, Excess&) {
    constexpr std::int64_t kWidth = U * L;
    const auto* from = static_cast<const std::int8_t*>(w.values) + first * w.columns + column;
    std::int64_t stride = w.columns;
    std::int64_t at = first / x.block * x.padded * (kWide ? 2 : 1);
    std::int8_t rest[kStep * kWidth];
    for (std::int64_t left = last - first; left > 0; left -= kStep) {
      if (left < kStep) {
        // A block may end within a word; its digits go on with zeros, and what they meet must be there to be read.
        for (std::int64_t i = 0; i < kStep; ++i) {
          __builtin_memcpy(rest + i * kWidth, from + (i < left ? i : 0) * stride, kWidth);
        }
        from = rest;
        stride = kWidth;
      } else {
        for (int i = 0; i < kStep; ++i) __builtin_prefetch(from + (x.ahead + i) * stride, 0, 2);
      }
      add_four<L, P, R, U>(from, stride, x, row, at, sums);
      from += kStep * stride;
      at += kWide ? 2 * kStep : kStep;
    }
  }

  static constexpr int kFours = 1;

  template <int L, class Sink>
  static HSAI_INLINE void unpack(const Weight& w, std::int64_t element, std::int64_t left, std::int64_t column,
                                 const Sink& sink) {
    const auto* from = static_cast<const std::int8_t*>(w.values) + element * w.columns + column;
    for (int i = 0; i < kStep; ++i) __builtin_prefetch(from + (kUnpackAhead + i) * w.columns, 0, 2);
    if (left >= kStep) return sink(0, interleave_four<L>(from, w.columns));
    std::int8_t rest[kStep * L] = {};
    for (std::int64_t i = 0; i < left; ++i) __builtin_memcpy(rest + i * L, from + i * w.columns, L);
    sink(0, interleave_four<L>(rest, L));
  }
};

}  // namespace
}  // namespace hsai

#endif  // HSAI_KERNELS_INT8_CODES_H_
