// Sparse weights in integers: kept values, of 4 bits or of a byte, times the digits that their indices pick. Included by
// products.cc only.
#ifndef HSAI_KERNELS_SPARSE_CODES_H_
#define HSAI_KERNELS_SPARSE_CODES_H_

#include "integer_products.h"
#include "interleave.h"

namespace hsai {
namespace {

// Values that are 4-bit codes in offset binary.
struct NibbleValues {
  template <int L>
  using Dot = Dots<L>;
  using Stored = std::uint32_t;
  static constexpr int kRows = 1;  // of the array, which hold 8 elements
  static constexpr int kUnit = kCodeUnit;

  template <int L, int U>
  struct Eight {
    typename Lanes<L>::Word packed[U];

    // `ahead` leads to the same elements a block later.
    HSAI_INLINE Eight(const Stored* from, std::int64_t, std::int64_t ahead) {
      unroll<U>([&](auto u) HSAI_INLINE_LAMBDA {
        packed[u.value] = load<typename Lanes<L>::Word>(from + u.value * L);
        fetch_ahead(from + u.value * L + ahead);
      });
    }

    // Elements 4 * kPart to 4 * kPart + 3 of vector kVector, signed.
    template <int kPart, int kVector>
    HSAI_INLINE typename Lanes<L>::Word take_four() const {
      return extract_signed<L, kPart>(packed[kVector]);
    }
  };
};

// Values that are bytes, an element a row.
struct ByteValues {
  template <int L>
  using Dot = ByteDots<L>;
  using Stored = std::int8_t;
  static constexpr int kRows = 8;
  static constexpr int kUnit = 1;

  template <int L, int U>
  struct Eight {
    const Stored* from;
    std::int64_t stride;

    HSAI_INLINE Eight(const Stored* first, std::int64_t columns, std::int64_t ahead) : from(first), stride(columns) {
      for (int i = 0; i < 8; ++i) __builtin_prefetch(from + i * stride + ahead, 0, 2);
    }

    template <int kPart, int kVector>
    HSAI_INLINE typename Lanes<L>::Word take_four() const {
      return interleave_four<L>(from + 4 * kPart * stride + kVector * L, stride);
    }
  };
};

// N of kM = 4 or 8. 4 kept elements of a lane pick their 4 digits out of the 16 that begin with the first one's group,
// and those of 1:8 two digits each out of two such 16 (Slot in products.h). Where digits are biased to be unsigned
// (kBiasedDigits), what the bias adds, 128 times the sum of the values, is kept in `excess`.
template <class Values, int kM>
struct SparseCodes {
  template <int L>
  using Dot = typename Values::template Dot<L>;
  using Stored = typename Values::Stored;
  static constexpr bool kCodes = false;
  static constexpr bool kSparse = true;
  static constexpr bool kWide = false;
  static constexpr bool kChosen = kM == 4;  // whether V:N:M comes down to it
  static constexpr int kZeroPoint = 0;
  static constexpr int kUnit = Values::kUnit;
  static constexpr int kIndexBits = kM == 4 ? 2 : 4;  // between the index of an element and that of 4 elements later
  static constexpr std::uint32_t kIndexMask = 0x01010101u * (kM - 1);

  // The digits that 4 elements of a lane pick.
  template <int L>
  static HSAI_INLINE typename Lanes<L>::Word pick_digits(const Slot& slot, const std::uint8_t* table,
                                                         const typename Lanes<L>::Word& places) {
    if constexpr (kM == 8) {
      if (slot.next != 0) return join_halves<L>(pick_bytes<L>(table, places), pick_bytes<L>(table + slot.next, places));
    }
    return pick_bytes<L>(table, places);
  }

  // The kPart-th four of 8 elements, whose indices have been shifted to bit 0.
  template <int kPart, int L, int P, int R, int U, class Sums, class Excess>
  static HSAI_INLINE void add_four(const Slot& slot, const Planes& x, int row,
                                   const typename Values::template Eight<L, U>& eight,
                                   const typename Lanes<L>::Word (&index)[U], Sums& sums, Excess& excess) {
    using Word = typename Lanes<L>::Word;
    Word values[U], places[U];
    unroll<U>([&](auto u) HSAI_INLINE_LAMBDA {
      values[u.value] = eight.template take_four<kPart, u.value>();
      places[u.value] = (index[u.value] & kIndexMask) | slot.offsets;
      if constexpr (kBiasedDigits) excess.at[0][0][u.value].add(Word{} + 0x80808080u, values[u.value]);
    });
    unroll<P>([&](auto p) HSAI_INLINE_LAMBDA {
      unroll<R>([&](auto r) HSAI_INLINE_LAMBDA {
        const std::uint8_t* table = find_digits(x, p.value, row + r.value) + (slot.first - x.origin);
        unroll<U>([&](auto u) HSAI_INLINE_LAMBDA {
          sums.at[p.value][r.value][u.value].add(pick_digits<L>(slot, table, places[u.value]), values[u.value]);
        });
      });
    });
  }

  // 8 elements, whose indices have been shifted to bit 0. `ahead` leads to the same a block later.
  template <int L, int P, int R, int U, class Sums, class Excess>
  static HSAI_INLINE void add_eight(const Stored* from, std::int64_t columns, std::int64_t ahead, const Slot* slots,
                                    const Planes& x, int row, typename Lanes<L>::Word (&index)[U], Sums& sums,
                                    Excess& excess) {
    const typename Values::template Eight<L, U> eight(from, columns, ahead);
    add_four<0, L, P, R, U>(slots[0], x, row, eight, index, sums, excess);
    unroll<U>([&](auto u) HSAI_INLINE_LAMBDA { index[u.value] >>= kIndexBits; });
    add_four<1, L, P, R, U>(slots[1], x, row, eight, index, sums, excess);
  }

  // The 3-bit indices of the elements 8 * word to 8 * word + 7: the last four stand 4 bits above the others. Three words
  // hold those of 32 elements, folded together (packing.py).
  template <int L, int U>
  static HSAI_INLINE void load_index(const Weight& w, const Planes& x, std::int64_t word, std::int64_t column,
                                     typename Lanes<L>::Word (&index)[U]) {
    using Word = typename Lanes<L>::Word;
    const auto turn = static_cast<int>(word % 4);
    const std::uint32_t* high = w.indices + (word / 4 * 3 + 2) * w.columns + column;
    const std::uint32_t* low = high - (turn < 2 ? 2 : 1) * w.columns;
    const std::uint32_t* later = (turn % 2 == 0 ? low : high) + x.block * 3 / 32 * w.columns;
    unroll<U>([&](auto u) HSAI_INLINE_LAMBDA {
      const Word lower = load<Word>(low + u.value * L) >> (turn % 2 * 2);
      const Word upper = load<Word>(high + u.value * L) >> turn;
      index[u.value] = (lower & 0x33333333u) | (upper & 0x11111111u) << 2;
      fetch_ahead(later + u.value * L);
    });
  }

  template <int L, int P, int R, int U, class Sums, class Excess>
  static HSAI_INLINE void add(const Weight& w, const Planes& x, int row, std::int64_t first, std::int64_t last,
                              std::int64_t column, Sums& sums, Excess& excess) {
    constexpr int kRows = Values::kRows;
    const auto at = static_cast<std::size_t>(first);
    const auto* from = static_cast<const Stored*>(w.values) + at / 8 * kRows * w.columns + column;
    const Slot* slots = w.slots + at / 4;
    const std::int64_t ahead = x.block / 8 * kRows * w.columns;
    const std::int64_t count = (last - first) / 8;
    typename Lanes<L>::Word index[U];
    if constexpr (kM == 8) {
      for (std::int64_t word = 0; word < count; ++word) {
        load_index<L, U>(w, x, first / 8 + word, column, index);
        add_eight<L, P, R, U>(from + word * kRows * w.columns, w.columns, ahead, slots + 2 * word, x, row, index, sums,
                              excess);
      }
    } else {
      const auto* indices = w.indices + at / 16 * w.columns + column;
      add_pairs<L, P, R, U>(w, from, indices, ahead, slots, x, row, at / 8 % 2 != 0, count, index, sums, excess);
    }
  }

  // `count` times 8 elements of N:4, of which the first are the second of their word of indices if `odd`.
  template <int L, int P, int R, int U, class Sums, class Excess>
  static HSAI_INLINE void add_pairs(const Weight& w, const Stored* from, const std::uint32_t* indices,
                                    std::int64_t ahead, const Slot* slots, const Planes& x, int row, bool odd,
                                    std::int64_t count, typename Lanes<L>::Word (&index)[U], Sums& sums,
                                    Excess& excess) {
    using Word = typename Lanes<L>::Word;
    const std::int64_t rows = Values::kRows * w.columns;
    // Elements 8 to 15 of an index word stand 4 bits above elements 0 to 7.
    if (odd) {
      unroll<U>([&](auto u) HSAI_INLINE_LAMBDA { index[u.value] = load<Word>(indices + u.value * L) >> 4; });
      add_eight<L, P, R, U>(from, w.columns, ahead, slots, x, row, index, sums, excess);
      from += rows;
      indices += w.columns;
      slots += 2;
      --count;
    }
    for (; count >= 2; count -= 2) {
      unroll<U>([&](auto u) HSAI_INLINE_LAMBDA {
        index[u.value] = load<Word>(indices + u.value * L);
        fetch_ahead(indices + u.value * L + x.block / 16 * w.columns);
      });
      add_eight<L, P, R, U>(from, w.columns, ahead, slots, x, row, index, sums, excess);
      unroll<U>([&](auto u) HSAI_INLINE_LAMBDA { index[u.value] >>= 2; });
      add_eight<L, P, R, U>(from + rows, w.columns, ahead, slots + 2, x, row, index, sums, excess);
      from += 2 * rows;
      indices += w.columns;
      slots += 4;
    }
    if (count != 0) {
      unroll<U>([&](auto u) HSAI_INLINE_LAMBDA { index[u.value] = load<Word>(indices + u.value * L); });
      add_eight<L, P, R, U>(from, w.columns, ahead, slots, x, row, index, sums, excess);
    }
  }
};

}  // namespace
}  // namespace hsai

#endif  // HSAI_KERNELS_SPARSE_CODES_H_
