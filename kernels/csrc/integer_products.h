// Products of weights of a few bits, in integers: activations are digits of one byte (planes.h), four at a time are
// multiplied by the four weights that a 32-bit lane holds, and only a block's sum becomes a float.
//
// Included by products.cc only. Lanes are columns. R rows, P planes, U vectors of L columns at once.
#ifndef HSAI_KERNELS_INTEGER_PRODUCTS_H_
#define HSAI_KERNELS_INTEGER_PRODUCTS_H_

#include "choose.h"
#include "dots.h"
#include "lanes.h"
#include "planes.h"
#include "products.h"
#include "scales.h"

namespace hsai {
namespace {

template <int L, int P, int R, int U, class Dot = Dots<L>>
struct DotSums {
  Dot at[P][R][U] = {};
};

HSAI_INLINE const std::uint8_t* find_digits(const Planes& x, int plane, int row) {
  return x.digits + (plane * x.rows + row) * x.stride;
}

// Reads 4 bytes as one word.
HSAI_INLINE std::uint32_t load_word(const std::uint8_t* from) {
  std::uint32_t word;
  __builtin_memcpy(&word, from, sizeof(word));
  return word;
}

// Asks for what the same columns need a block later. Runs of a row are too short for the hardware to foresee them.
HSAI_INLINE void fetch_ahead(const std::uint32_t* at) { __builtin_prefetch(at, 0, 2); }

// Elements between what is unpacked and what is asked for.
constexpr std::int64_t kUnpackAhead = 32;

// Adds four codes of each of U vectors times the digits of element `element` and the three behind it.
template <int L, int P, int R, int U>
HSAI_INLINE void add_codes(const typename Lanes<L>::Word (&codes)[U], const Planes& x, int row, std::int64_t element,
                           DotSums<L, P, R, U>& sums) {
  using Word = typename Lanes<L>::Word;
  // Digits innermost but one: in registers there are a word of each vector, one broadcast, and the sums.
  unroll<P>([&](auto p) HSAI_INLINE_LAMBDA {
    unroll<R>([&](auto r) HSAI_INLINE_LAMBDA {
      const Word digits = Word{} + load_word(find_digits(x, p.value, row + r.value) + element);
      unroll<U>([&](auto u) HSAI_INLINE_LAMBDA { sums.at[p.value][r.value][u.value].add(codes[u.value], digits); });
    });
  });
}

// The code that signed ones of a weight with minima count from.
constexpr std::int32_t kMiddle = 8;

// Twice the code that sums are counted from.
HSAI_INLINE std::int32_t find_zero(const Weight& w) { return w.minimum != nullptr ? 2 * kMiddle : w.zero; }

// Codes of 4 bits or fewer as signed bytes: counted from zero, in halves if that lies between two codes.
template <int L>
HSAI_INLINE typename Lanes<L>::Word sign_codes(const typename Lanes<L>::Word& codes, const Weight& w) {
  typedef std::uint8_t Bytes __attribute__((vector_size(4 * L)));
  const std::int32_t zero = find_zero(w);
  const int odd = zero % 2;
  const auto middle = static_cast<std::uint8_t>(odd != 0 ? zero : zero / 2);
  return (typename Lanes<L>::Word)((Bytes)(codes << odd) - middle);
}

// Codes of kBits bits, laid out by packing.py. A block's sum is that of the codes; what they are too large by, the code
// of zero times the sum of the digits, is taken off at the block's end, when all is counted in halves of a level: the
// zero of centered codes lies between two of them.
template <int kBits>
struct Codes {
  template <int L>
  using Dot = Dots<L>;
  static constexpr int kMostRows = 8;  // at a time
  static constexpr int kMostSums = kFewSums;
  static constexpr int kStep = 32 / kBits;  // elements a word
  static constexpr bool kCodes = true;
  static constexpr bool kSparse = false;
  static constexpr bool kWide = false;
  static constexpr bool kChosen = false;
  static constexpr int kZeroPoint = 0;
  static constexpr int kUnit = 2;

  template <int L, int P, int R, int U>
  static HSAI_INLINE void add_word(const Weight& w, const Planes& x, int row, std::int64_t element, std::int64_t column,
                                   DotSums<L, P, R, U>& sums) {
    using Word = typename Lanes<L>::Word;
    constexpr std::uint32_t mask = ((1u << kBits) - 1) * 0x01010101u;
    const auto* words = static_cast<const std::uint32_t*>(w.values) + element / kStep * w.columns + column;
    Word packed[U];
    unroll<U>([&](auto u) HSAI_INLINE_LAMBDA {
      packed[u.value] = load<Word>(words + u.value * L);
      fetch_ahead(words + u.value * L + x.ahead / kStep * w.columns);
    });
    unroll<8 / kBits>([&](auto slot) HSAI_INLINE_LAMBDA {
      Word codes[U];
      unroll<U>([&](auto u) HSAI_INLINE_LAMBDA { codes[u.value] = (packed[u.value] >> (kBits * slot.value)) & mask; });
      add_codes<L, P, R, U>(codes, x, row, element + 4 * slot.value, sums);
    });
  }

  template <int L, int P, int R, int U>
  static HSAI_INLINE void add(const Weight& w, const Planes& x, int row, std::int64_t first, std::int64_t last,
                              std::int64_t column, DotSums<L, P, R, U>& sums, DotSums<L, 1, 1, U>&) {
    for (std::int64_t element = first; element < last; element += kStep) {
      add_word<L, P, R, U>(w, x, row, element, column, sums);
    }
  }

  static constexpr int kFours = 8 / kBits;

  template <int L, class Sink>
  static HSAI_INLINE void unpack(const Weight& w, std::int64_t element, std::int64_t, std::int64_t column,
                                 const Sink& sink) {
    constexpr std::uint32_t mask = ((1u << kBits) - 1) * 0x01010101u;
    const auto* words = static_cast<const std::uint32_t*>(w.values) + element / kStep * w.columns + column;
    const auto packed = load<typename Lanes<L>::Word>(words);
    fetch_ahead(words + kUnpackAhead / kStep * w.columns);
    unroll<kFours>([&](auto four) HSAI_INLINE_LAMBDA {
      sink(four.value, sign_codes<L>((packed >> (kBits * four.value)) & mask, w));
    });
  }
};

// A block's sum as a float, in units of the most significant digit, which is the last, and of kUnit times the code: so the
// scale that it is multiplied with stays far from the smallest floats, which threads of XLA take for zero.
template <int L, int P, int kUnit>
HSAI_INLINE typename Lanes<L>::Float combine_planes(const typename Lanes<L>::Int (&sum)[P]) {
  using Float = typename Lanes<L>::Float;
  constexpr float unit = 1.0f / kUnit;
  if constexpr (P == 1) return __builtin_convertvector(sum[0], Float) * unit;
  // Two planes: at most 255 * 128 * 256 * kMostBlock < 2^31.
  const Float low = __builtin_convertvector(sum[0] + (sum[1] << 8), Float);
  if constexpr (P == 2) return low * (0x1p-8f * unit);
  if constexpr (P == 3) return low * (0x1p-16f * unit) + __builtin_convertvector(sum[P - 1], Float) * unit;
}

// The same of planes of two digits each, which hold `kDigits`.
template <int L, int kDigits>
HSAI_INLINE typename Lanes<L>::Float combine_wide(const typename Lanes<L>::Int (&sum)[kDigits - 1]) {
  using Float = typename Lanes<L>::Float;
  if constexpr (kDigits == 2) return __builtin_convertvector(sum[0], Float) * 0x1p-8f;
  if constexpr (kDigits == 3) {
    return __builtin_convertvector(sum[0], Float) * 0x1p-16f + __builtin_convertvector(sum[1], Float);
  }
}

// How many planes a number of `digits` digits takes.
template <class Format>
constexpr int count_planes(int digits) {
  return Format::kWide ? digits - 1 : digits;
}

// out[r][column...] += scales * the sum over elements [first, last) of U * L columns, which are block `block`.
template <class Format, int L, int P, int R, int U>
HSAI_INLINE void add_integer_block(const Weight& w, const Planes& x, int row, std::int64_t block, std::int64_t first,
                                   std::int64_t last, std::int64_t scales, std::int64_t column, float* out,
                                   std::int64_t length) {
  using Float = typename Lanes<L>::Float;
  using Int = typename Lanes<L>::Int;
  constexpr int kPlanes = count_planes<Format>(P);
  using Dot = typename Format::template Dot<L>;
  DotSums<L, kPlanes, R, U, Dot> sums;
  DotSums<L, 1, 1, U, Dot> excess;
  Format::template add<L, kPlanes, R, U>(w, x, row, first, last, column, sums, excess);
  unroll<U>([&](auto u) HSAI_INLINE_LAMBDA {
    const Float scale = load_scale<L>(w, scales + column + u.value * L);
    fetch_scales(w, (first + x.ahead) / w.group * w.columns + column + u.value * L);
    unroll<R>([&](auto r) HSAI_INLINE_LAMBDA {
      Int sum[kPlanes];
      unroll<kPlanes>([&](auto p) HSAI_INLINE_LAMBDA {
        sum[p.value] = sums.at[p.value][r.value][u.value].finish();
        if constexpr (Format::kSparse) {
          if constexpr (kBiasedDigits && p.value == P - 1) sum[p.value] -= excess.at[0][0][u.value].finish();
        } else if constexpr (Format::kCodes) {
          const std::int32_t digits = x.sum[(p.value * x.rows + row + r.value) * x.blocks + block];
          sum[p.value] = (sum[p.value] << 1) - find_zero(w) * digits;
        } else if constexpr (Format::kZeroPoint != 0) {
          sum[p.value] -= Format::kZeroPoint * x.sum[(p.value * x.rows + row + r.value) * x.blocks + block];
        }
      });
      float* to = out + r.value * length + u.value * L;
      const Float step = scale * x.scale[(row + r.value) * x.blocks + block];
      if constexpr (Format::kWide) {
        store(to, load<Float>(to) + combine_wide<L, P>(sum) * step);
      } else {
        store(to, load<Float>(to) + combine_planes<L, P, Format::kUnit>(sum) * step);
      }
    });
    if constexpr (Format::kCodes) {
      if (w.minimum == nullptr) return;
      // Of the code that digits are counted from.
      const Float offset = load_minimum<L>(w, scales + column + u.value * L) + scale * kMiddle;
      unroll<R>([&](auto r) HSAI_INLINE_LAMBDA {
        float* to = out + r.value * length + u.value * L;
        store(to, load<Float>(to) + offset * x.total[(row + r.value) * x.blocks + block]);
      });
    }
  });
}

// Columns [begin, begin + length) of block `block`; `out` is that of `begin`, and its rows are `stride` apart.
template <class Format, int L, int P, int R>
HSAI_INLINE void add_integer_columns(const Weight& w, const Planes& x, int row, std::int64_t block, std::int64_t begin,
                                     std::int64_t length, float* out, std::int64_t stride) {
  // Sums in registers: enough to hide the latency of a multiply-add, few enough to stay there. Single columns are few.
  constexpr int kFit = Format::kMostSums / (count_planes<Format>(P) * R);
  constexpr int U = L == 1 || kFit < 2 ? 1 : kFit < 4 ? 2 : 4;
  const std::int64_t first = block * x.block, last = first + x.block;
  const std::int64_t scales = first / w.group * w.columns;
  std::int64_t i = 0;
  if constexpr (U > 1) {
    for (; i + U * L <= length; i += U * L) {
      add_integer_block<Format, L, P, R, U>(w, x, row, block, first, last, scales, begin + i, out + i, stride);
    }
  }
  for (; i < length; i += L) {
    add_integer_block<Format, L, P, R, 1>(w, x, row, block, first, last, scales, begin + i, out + i, stride);
  }
}

// The same for sparse weights, of which the columns of V:N:M choose their digits by blocks of V.
template <class Format, int L, int P, int R>
HSAI_INLINE void add_chosen_columns(const Weight& w, const Planes& x, int row, std::int64_t block, std::int64_t begin,
                                    std::int64_t length, float* out, std::int64_t stride) {
  // A kept element is at least one of 4 positions, and a block has 4 elements a dot at most.
  constexpr std::int64_t kGathered = 4 * 4 * kMostDots + kPlanePadding + kGatherPadding;
  alignas(64) std::uint8_t digits[P * R * kGathered];
  Planes chosen = x;
  int first_row = row;
  if (w.choices != nullptr) {
    first_row = 0;
    chosen.digits = digits;
    chosen.rows = R;
    chosen.stride = kGathered;
    chosen.origin = block * x.span / w.pattern * 4;
    chosen.scale = x.scale + row * x.blocks;
  }
  for (std::int64_t column = begin; column < begin + length;) {
    std::int64_t end = begin + length;
    if (w.choices != nullptr) {
      const std::int64_t words = w.columns / w.width;
      const std::int64_t next = (column / w.width + 1) * w.width;
      end = next < end ? next : end;
      const std::uint32_t* choices = w.choices + block * x.span / 32 * words + column / w.width;
      gather_chosen<P, R>(x, row, block * x.span, x.span, choices, words, w.pattern, digits, kGathered, R * kGathered);
    }
    // The one copy of it, for whoever compiles.
    add_integer_columns<Format, L, P, R>(w, chosen, first_row, block, column, end - column, out + (column - begin),
                                         stride);
    column = end;
  }
}

template <class Format, int L, int P, int R>
void multiply_integer_rows(const Weight& weight, const Planes& planes, int row, std::int64_t begin, std::int64_t length,
                           float* out) {
  // Copies, which nothing that is written to `out` can change, so that their fields stay in registers.
  const Weight w = weight;
  Planes x = planes;
  for (std::int64_t i = 0; i < R * length; ++i) out[i] = 0;
  for (std::int64_t block = 0; block < x.blocks; ++block) {
    // Behind the last block is what nobody needs now.
    x.ahead = block + 1 < x.blocks ? x.block : 0;
    if constexpr (Format::kChosen) {
      add_chosen_columns<Format, L, P, R>(w, x, row, block, begin, length, out, length);
    } else {
      add_integer_columns<Format, L, P, R>(w, x, row, block, begin, length, out, length);
    }
  }
}

// R rows at a time while there are so many and their sums fit, then half as many.
template <class Format, int L, int P, int R>
void multiply_integer_planes(const Weight& w, const Planes& x, int row, std::int64_t begin, std::int64_t length,
                             float* out) {
  if constexpr (R == 1 || (L > 1 && R * count_planes<Format>(P) <= kFewSums && R <= Format::kMostRows)) {
    for (; row + R <= x.rows; row += R) {
      multiply_integer_rows<Format, L, P, R>(w, x, row, begin, length, out + row * length);
    }
  }
  if constexpr (R > 1) multiply_integer_planes<Format, L, P, R / 2>(w, x, row, begin, length, out);
}

template <class Format, int L>
void multiply_integer_lanes(const Weight& w, const Planes& x, std::int64_t begin, std::int64_t length, float* out) {
  if constexpr (!Format::kWide) {
    if (x.planes == 1) return multiply_integer_planes<Format, L, 1, 8>(w, x, 0, begin, length, out);
  }
  if (x.planes == 2) return multiply_integer_planes<Format, L, 2, 8>(w, x, 0, begin, length, out);
  return multiply_integer_planes<Format, L, 3, 8>(w, x, 0, begin, length, out);
}

template <class Format>
void multiply_integer(const Weight& w, const Planes& x, std::int64_t begin, std::int64_t length, float* out) {
  if constexpr (kSingly) {
    if (length % kLanes != 0) return multiply_integer_lanes<Format, 1>(w, x, begin, length, out);
  }
  multiply_integer_lanes<Format, kLanes>(w, x, begin, length, out);
}

}  // namespace
}  // namespace hsai

#endif  // HSAI_KERNELS_INTEGER_PRODUCTS_H_
