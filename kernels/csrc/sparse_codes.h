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

  // Elements 4 * kPart to 4 * kPart + 3 of the 8 at `from`, signed.
  template <int L, int kPart>
  static HSAI_INLINE typename Lanes<L>::Word unpack_four(const Stored* from, std::int64_t) {
    typedef std::uint8_t Bytes __attribute__((vector_size(4 * L)));
    const auto codes = (load<typename Lanes<L>::Word>(from) >> (4 * kPart)) & 0x0f0f0f0fu;
    return (typename Lanes<L>::Word)((Bytes)codes - 8);
  }

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

  template <int L, int kPart>
  static HSAI_INLINE typename Lanes<L>::Word unpack_four(const Stored* from, std::int64_t stride) {
    return interleave_four<L>(from + 4 * kPart * stride, stride);
  }

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
  static constexpr int kMostRows = 8;  // at a time
  static constexpr int kMostSums = kFewSums;
  static constexpr bool kWide = false;
  static constexpr bool kChosen = kM == 4;  // whether V:N:M comes down to it
  static constexpr int kZeroPoint = 0;
  static constexpr int kUnit = Values::kUnit;
  static constexpr int kIndexBits = kM == 4 ? 2 : 4;  // between the index of an element and that of 4 elements later
  static constexpr std::uint32_t kIndexMask = 0x01010101u * (kM - 1);

  static constexpr int kFours = 2;

  template <int L, class Sink>
  static HSAI_INLINE void unpack(const Weight& w, std::int64_t element, std::int64_t, std::int64_t column,
                                 const Sink& sink) {
    using Word = typename Lanes<L>::Word;
    const auto* from = static_cast<const Stored*>(w.values) + element / 8 * Values::kRows * w.columns + column;
    for (int i = 0; i < Values::kRows; ++i) {
      __builtin_prefetch(from + (kUnpackAhead / 8 * Values::kRows + i) * w.columns, 0, 2);
    }
    Word index;
    if constexpr (kM == 8) {
      Word both[1];
      load_index<L, 1>(w, kUnpackAhead, element / 8, column, both);
      index = both[0];
    } else {
      fetch_ahead(w.indices + (element + kUnpackAhead) / 16 * w.columns + column);
      index = load<Word>(w.indices + element / 16 * w.columns + column) >> (element % 16 / 4 * kIndexBits);
    }
    unroll<2>([&](auto part) HSAI_INLINE_LAMBDA {
      sink(part.value, Values::template unpack_four<L, part.value>(from, w.columns),
           ((index >> (part.value * kIndexBits)) & kIndexMask) | w.slots[element / 4 + part.value].offsets);
    });
  }

  // The digits that 4 elements of a lane pick.
  template <int L>
  static HSAI_INLINE typename Lanes<L>::Word pick_digits(const Slot& slot, const std::uint8_t* table,
                                                         const typename Lanes<L>::Word& places) {
    if constexpr (kM == 8) {
      if (slot.next != 0) {
        return join_halves<L>(pick_bytes<L, 16>(table, places), pick_bytes<L, 16>(table + slot.next, places));
      }
    }
    return pick_bytes<L, 16>(table, places);
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
  static HSAI_INLINE void load_index(const Weight& w, std::int64_t ahead, std::int64_t word, std::int64_t column,
                                     typename Lanes<L>::Word (&index)[U]) {
    using Word = typename Lanes<L>::Word;
    const auto turn = static_cast<int>(word % 4);
    const std::uint32_t* high = w.indices + (word / 4 * 3 + 2) * w.columns + column;
    const std::uint32_t* low = high - (turn < 2 ? 2 : 1) * w.columns;
    const std::uint32_t* later = (turn % 2 == 0 ? low : high) + ahead * 3 / 32 * w.columns;
    unroll<U>([&](auto u) HSAI_INLINE_LAMBDA {
      const Word lower = load<Word>(low + u.value * L) >> (turn % 2 * 2);
      const Word upper = load<Word>(high + u.value * L) >> turn;
      index[u.value] = (lower & 0x33333333u) | (upper & 0x11111111u) << 2;
      fetch_ahead(later + u.value * L);
    });
  }

  // The same of N:4, 2 bits each: an index word has those of 16 elements, of the second 8 four bits above those of the
  // first.
  template <int L, int U>
  static HSAI_INLINE void load_index_of_4(const Weight& w, const Planes& x, std::int64_t word, std::int64_t column,
                                          typename Lanes<L>::Word (&index)[U]) {
    const std::uint32_t* from = w.indices + word / 2 * w.columns + column;
    unroll<U>([&](auto u) HSAI_INLINE_LAMBDA {
      index[u.value] = load<typename Lanes<L>::Word>(from + u.value * L) >> static_cast<int>(word % 2 * 4);
      if (word % 2 == 0) fetch_ahead(from + u.value * L + x.ahead / 16 * w.columns);
    });
  }

  template <int L, int P, int R, int U, class Sums, class Excess>
  static HSAI_INLINE void add(const Weight& w, const Planes& x, int row, std::int64_t first, std::int64_t last,
                              std::int64_t column, Sums& sums, Excess& excess) {
    const std::int64_t rows = Values::kRows * w.columns, ahead = x.ahead / 8 * rows;
    typename Lanes<L>::Word index[U];
    for (std::int64_t word = first / 8; word < last / 8; ++word) {
      if constexpr (kM == 8) {
        load_index<L, U>(w, x.ahead, word, column, index);
      } else {
        load_index_of_4<L, U>(w, x, word, column, index);
      }
      const auto* from = static_cast<const Stored*>(w.values) + word * rows + column;
      add_eight<L, P, R, U>(from, w.columns, ahead, w.slots + 2 * word, x, row, index, sums, excess);
    }
  }
};

}  // namespace
}  // namespace hsai

#endif  // HSAI_KERNELS_SPARSE_CODES_H_
