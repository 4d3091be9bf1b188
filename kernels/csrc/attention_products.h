// The two products of attention over a block of keys, for keys and values of each type. Included by products.cc only.
//
// Few rows (decoding) are bound by reading keys: lanes are the head dim, keys are read once as they lie, and four sums
// are folded together. Many rows (prefill) are bound by arithmetic: keys are transposed once a tile, lanes are keys, and
// a block of sums stays in registers. Values are used as they lie by both: lanes are the head dim.
#ifndef HSAI_KERNELS_ATTENTION_PRODUCTS_H_
#define HSAI_KERNELS_ATTENTION_PRODUCTS_H_

#include "attention_tile.h"
#include "lanes.h"

namespace hsai {
namespace {

// Sums in registers: kSumRows x kSumVectors of a product, kDotRows x 4 of dots; the rest holds what is multiplied.
#if defined(__AVX512F__)
constexpr int kSumRows = 6;
constexpr int kSumVectors = 4;
constexpr int kDotRows = 4;
#else
constexpr int kSumRows = 4;
constexpr int kSumVectors = 2;
constexpr int kDotRows = 2;
#endif

// Keys ahead of the one in use that are fetched from memory: those of one kv head lie a stride apart, which hides them
// from the machine's own prefetcher.
constexpr std::int64_t kAhead = 16;

// How elements of a type become floats.
struct Float32 {
  static constexpr std::int64_t kBytes = 4;
  template <int L>
  static HSAI_INLINE typename Lanes<L>::Float read(const void* from) {
    return load<typename Lanes<L>::Float>(from);
  }
};

struct Bfloat16 {
  static constexpr std::int64_t kBytes = 2;
  template <int L>
  static HSAI_INLINE typename Lanes<L>::Float read(const void* from) {
    return load_bfloat16<L>(from);
  }
};

struct Int8Cache {
  static constexpr std::int64_t kBytes = 1;
  template <int L>
  static HSAI_INLINE typename Lanes<L>::Float read(const void* from) {
    return __builtin_convertvector(load_int8<L>(from), typename Lanes<L>::Float);
  }
};

// The half of a head that its bytes have in their low or their high 4 bits: signed integers.
template <bool kHigh>
struct Int4Half {
  static constexpr std::int64_t kBytes = 1;
  template <int L>
  static HSAI_INLINE typename Lanes<L>::Float read(const void* from) {
    using Int = typename Lanes<L>::Int;
    using Word = typename Lanes<L>::Word;
    const Int both = load_int8<L>(from);
    const Int code = kHigh ? both >> 4 : (Int)((Word)both << 28) >> 28;
    return __builtin_convertvector(code, typename Lanes<L>::Float);
  }
};

// The parts of a head: all of it at once, or its halves, each of elements of its own.
template <class Type>
struct WholeHead {
  static constexpr int kParts = 1;
  template <int kPart>
  using Part = Type;
};

struct HeadHalves {
  static constexpr int kParts = 2;
  template <int kPart>
  using Part = Int4Half<kPart == 1>;
};

// Rows of elements in memory, `stride` bytes apart; those from `readable` on may not exist.
struct Rows {
  const char* data;
  std::int64_t stride;
  std::int64_t readable;
};

// Rows of `length` elements as floats, times a scale each, `stride` apart, zeros behind them up to `padded`; reads nothing
// beyond a row.
template <class Type>
void widen_rows(const Rows& from, std::int64_t count, std::int64_t length, const float* scales, std::int64_t padded,
                std::int64_t stride, float* to) {
  for (std::int64_t i = 0; i < count; ++i) {
    const char* row = from.data + i * from.stride;
    float* out = to + i * stride;
    const float scale = scales != nullptr ? scales[i] : 1;
    std::int64_t h = 0;
    for (; h + kLanes <= length; h += kLanes) {
      store(out + h, Type::template read<kLanes>(row + h * Type::kBytes) * scale);
    }
    for (; h < length; ++h) out[h] = Type::template read<1>(row + h * Type::kBytes)[0] * scale;
    for (; h < padded; ++h) out[h] = 0;
  }
}

// to[h * kBlockKeys + i] = from[i * width + h] for i < count; `width` is a multiple of 4.
inline void transpose_rows(const float* from, std::int64_t stride, std::int64_t count, std::int64_t width, float* to) {
  using Four = Lanes<4>::Float;
  std::int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    const float* row = from + i * stride;
    for (std::int64_t h = 0; h < width; h += 4) {
      const Four a = load<Four>(row + h), b = load<Four>(row + stride + h);
      const Four c = load<Four>(row + 2 * stride + h), d = load<Four>(row + 3 * stride + h);
      const Four ab = __builtin_shufflevector(a, b, 0, 4, 1, 5), cd = __builtin_shufflevector(c, d, 0, 4, 1, 5);
      const Four ef = __builtin_shufflevector(a, b, 2, 6, 3, 7), gh = __builtin_shufflevector(c, d, 2, 6, 3, 7);
      float* column = to + h * kBlockKeys + i;
      store(column, __builtin_shufflevector(ab, cd, 0, 1, 4, 5));
      store(column + kBlockKeys, __builtin_shufflevector(ab, cd, 2, 3, 6, 7));
      store(column + 2 * kBlockKeys, __builtin_shufflevector(ef, gh, 0, 1, 4, 5));
      store(column + 3 * kBlockKeys, __builtin_shufflevector(ef, gh, 2, 3, 6, 7));
    }
  }
  for (; i < count; ++i) {
    for (std::int64_t h = 0; h < width; ++h) to[h * kBlockKeys + i] = from[i * stride + h];
  }
}

template <int L, int... I>
HSAI_INLINE typename Lanes<L / 2>::Float add_halves(const typename Lanes<L>::Float& x,
                                                    std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(x, x, I...) + __builtin_shufflevector(x, x, (L / 2 + I)...);
}

// The sums of each run of lanes that are equal modulo 4.
template <int L>
HSAI_INLINE Lanes<4>::Float fold_quads(const typename Lanes<L>::Float& x) {
  if constexpr (L == 4) {
    return x;
  } else {
    return fold_quads<L / 2>(add_halves<L>(x, std::make_integer_sequence<int, L / 2>{}));
  }
}

// In every quad of lanes: a's pairs of sums beside b's.
template <int L, int... I>
HSAI_INLINE typename Lanes<L>::Float add_pairs(const typename Lanes<L>::Float& a, const typename Lanes<L>::Float& b,
                                               std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (I / 4 * 4 + I % 4 / 2 + I % 2 * L)...) +
         __builtin_shufflevector(a, b, (I / 4 * 4 + 2 + I % 4 / 2 + I % 2 * L)...);
}

template <int L, int... I>
HSAI_INLINE typename Lanes<L>::Float add_quads(const typename Lanes<L>::Float& ab, const typename Lanes<L>::Float& cd,
                                               std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(ab, cd, (I / 4 * 4 + I % 2 + I % 4 / 2 * L)...) +
         __builtin_shufflevector(ab, cd, (I / 4 * 4 + 2 + I % 2 + I % 4 / 2 * L)...);
}

// The four sums over all lanes.
template <int L>
HSAI_INLINE Lanes<4>::Float sum_four(const typename Lanes<L>::Float& a, const typename Lanes<L>::Float& b,
                                     const typename Lanes<L>::Float& c, const typename Lanes<L>::Float& d) {
  constexpr auto all = std::make_integer_sequence<int, L>{};
  return fold_quads<L>(add_quads<L>(add_pairs<L>(a, b, all), add_pairs<L>(c, d, all), all));
}

// scores[r * kBlockKeys + i] = q[r][0..width) . keys[i] for R rows of q, `stride` apart, and i < count.
template <class Type, int R>
void dot_rows(const float* q, std::int64_t stride, const Rows& keys, std::int64_t count, std::int64_t width,
              float* scores) {
  using Float = Lanes<kLanes>::Float;
  for (std::int64_t i = 0; i < count; i += 4) {
    // The last keys are multiplied several times where there are fewer than four; the scores' rows have room.
    const char* row[4];
    unroll<4>([&](auto j) HSAI_INLINE_LAMBDA {
      row[j.value] = keys.data + (i + j.value < count ? i + j.value : count - 1) * keys.stride;
      if (i + j.value + kAhead < keys.readable) {
        const char* ahead = row[j.value] + kAhead * keys.stride;
        for (std::int64_t byte = 0; byte < width * Type::kBytes; byte += 64) __builtin_prefetch(ahead + byte);
      }
    });
    Float sums[R][4] = {};
    for (std::int64_t h = 0; h < width; h += kLanes) {
      unroll<4>([&](auto j) HSAI_INLINE_LAMBDA {
        const Float key = Type::template read<kLanes>(row[j.value] + h * Type::kBytes);
        unroll<R>([&](auto r) HSAI_INLINE_LAMBDA { sums[r.value][j.value] += key * load<Float>(q + r.value * stride + h); });
      });
    }
    unroll<R>([&](auto r) HSAI_INLINE_LAMBDA {
      const auto& sum = sums[r.value];
      store(scores + r.value * kBlockKeys + i, sum_four<kLanes>(sum[0], sum[1], sum[2], sum[3]));
    });
  }
}

template <class Type, int R = kDotRows>
void dot_few(const float* q, std::int64_t stride, std::int64_t rows, const Rows& keys, std::int64_t count,
             std::int64_t width, float* scores) {
  if constexpr (R > 1) {
    if (rows < R) return dot_few<Type, R - 1>(q, stride, rows, keys, count, width, scores);
  }
  dot_rows<Type, R>(q, stride, keys, count, width, scores);
}

// All rows, as many at a time as there are registers.
template <class Type>
void dot(const float* q, std::int64_t stride, std::int64_t rows, const Rows& keys, std::int64_t count,
         std::int64_t width, float* scores) {
  for (std::int64_t r = 0; r < rows; r += kDotRows) {
    dot_few<Type>(q + r * stride, stride, rows - r, keys, count, width, scores + r * kBlockKeys);
  }
}

// out[r][U vectors] (+)= a[r][0..depth) @ b[0..depth)[U vectors] for R rows.
template <class Type, int R, int U>
HSAI_INLINE void multiply_block(const float* a, std::int64_t a_stride, const Rows& b, const char* column,
                                std::int64_t depth, float* out, std::int64_t out_stride, bool add) {
  using Float = Lanes<kLanes>::Float;
  Float sums[R][U] = {};
  for (std::int64_t e = 0; e < depth; ++e) {
    const char* row = column + e * b.stride;
    if (e + kAhead < b.readable) {
      unroll<U>([&](auto u) HSAI_INLINE_LAMBDA {
        if (u.value * kLanes * Type::kBytes % 64 == 0) {
          __builtin_prefetch(row + kAhead * b.stride + u.value * kLanes * Type::kBytes);
        }
      });
    }
    unroll<U>([&](auto u) HSAI_INLINE_LAMBDA {
      const Float value = Type::template read<kLanes>(row + u.value * kLanes * Type::kBytes);
      unroll<R>([&](auto r) HSAI_INLINE_LAMBDA { sums[r.value][u.value] += value * a[r.value * a_stride + e]; });
    });
  }
  unroll<R>([&](auto r) HSAI_INLINE_LAMBDA {
    unroll<U>([&](auto u) HSAI_INLINE_LAMBDA {
      float* to = out + r.value * out_stride + u.value * kLanes;
      store(to, add ? load<Float>(to) + sums[r.value][u.value] : sums[r.value][u.value]);
    });
  });
}

template <class Type, int R>
void multiply_columns(const float* a, std::int64_t a_stride, const Rows& b, std::int64_t depth, std::int64_t columns,
                      float* out, std::int64_t out_stride, bool add) {
  std::int64_t i = 0;
  for (; i + kSumVectors * kLanes <= columns; i += kSumVectors * kLanes) {
    multiply_block<Type, R, kSumVectors>(a, a_stride, b, b.data + i * Type::kBytes, depth, out + i, out_stride, add);
  }
  for (; i < columns; i += kLanes) {
    multiply_block<Type, R, 1>(a, a_stride, b, b.data + i * Type::kBytes, depth, out + i, out_stride, add);
  }
}

template <class Type, int R = kSumRows>
void multiply_few(std::int64_t rows, const float* a, std::int64_t a_stride, const Rows& b, std::int64_t depth,
                  std::int64_t columns, float* out, std::int64_t out_stride, bool add) {
  if constexpr (R > 1) {
    if (rows < R) return multiply_few<Type, R - 1>(rows, a, a_stride, b, depth, columns, out, out_stride, add);
  }
  multiply_columns<Type, R>(a, a_stride, b, depth, columns, out, out_stride, add);
}

// out (rows, columns) (+)= a (rows, depth) @ b (depth, columns); columns are whole vectors.
template <class Type>
void multiply_rows(std::int64_t rows, const float* a, std::int64_t a_stride, const Rows& b, std::int64_t depth,
                   std::int64_t columns, float* out, std::int64_t out_stride, bool add) {
  // Equal parts: 8 rows are 4 and 4, not 6 and 2.
  const std::int64_t parts = (rows + kSumRows - 1) / kSumRows;
  const std::int64_t most = (rows + parts - 1) / parts;
  for (std::int64_t r = 0; r < rows; r += most) {
    const std::int64_t these = rows - r < most ? rows - r : most;
    multiply_few<Type>(these, a + r * a_stride, a_stride, b, depth, columns, out + r * out_stride, out_stride, add);
  }
}

}  // namespace
}  // namespace hsai

#endif  // HSAI_KERNELS_ATTENTION_PRODUCTS_H_
