// Products in float32: sparse weights of floats. Lanes are columns, activations are broadcast.
//
// Included by products.cc only.
#ifndef HSAI_KERNELS_FLOAT_PRODUCTS_H_
#define HSAI_KERNELS_FLOAT_PRODUCTS_H_

#include "lanes.h"
#include "products.h"
#include "scales.h"

namespace hsai {
namespace {

template <int L, int R, int U>
struct Sums {
  typename Lanes<L>::Float at[R][U] = {};
};

// Each format has kStep, the stored elements a call of `add` handles, kBlock, a multiple of it, and
//   add<L, R, U>(weight, x, element, column, sums): adds `kStep` elements from `element` on, of U * L columns.

// Adds kept element `element + E` of U * L columns: every lane picks its own of the 4 activations of its group.
template <int L, int R, int U>
HSAI_INLINE void add_picked(const Weight& w, const float* x, std::int64_t element, int u,
                            const typename Lanes<L>::Float& value, const typename Lanes<L>::Word& index,
                            Sums<L, R, U>& sums) {
  const float* quad = x + w.quads[element];
  unroll<R>([&](auto r) HSAI_INLINE_LAMBDA { sums.at[r.value][u] += value * pick<L>(quad + r.value * w.dense, index); });
}

template <bool kBfloat16>
struct SparseFloat {
  static constexpr int kStep = 16;
  static constexpr int kBlock = 16;

  template <int L, int R, int U>
  static HSAI_INLINE void add(const Weight& w, const float* x, std::int64_t element, std::int64_t column,
                              Sums<L, R, U>& sums) {
    using Types = Lanes<L>;
    constexpr int kBytes = kBfloat16 ? 2 : 4;
    const auto* rows = static_cast<const char*>(w.values) + (element * w.columns + column) * kBytes;
    const auto* index_row = w.indices + element / 16 * w.columns + column;
    unroll<U>([&](auto u) HSAI_INLINE_LAMBDA {
      const auto index = load<typename Types::Word>(index_row + u.value * L);
      unroll<16>([&](auto e) HSAI_INLINE_LAMBDA {
        constexpr int shift = 8 * (e.value % 4) + 2 * (e.value / 4);
        const char* from = rows + (e.value * w.columns + u.value * L) * kBytes;
        typename Types::Float value;
        if constexpr (kBfloat16) {
          value = load_bfloat16<L>(from);
        } else {
          value = load<typename Types::Float>(from);
        }
        add_picked<L, R, U>(w, x, element + e.value, u.value, value, index >> shift, sums);
      });
    });
  }
};

// out[r][column...] += scale * (elements [first, last) of U * L columns), where `scales` is the scales' row times F.
template <class Format, int L, int R, int U>
HSAI_INLINE void add_block(const Weight& w, const float* x, std::int64_t first, std::int64_t last, std::int64_t scales,
                           std::int64_t column, float* out, std::int64_t length) {
  using Float = typename Lanes<L>::Float;
  Sums<L, R, U> sums;
  for (std::int64_t element = first; element < last; element += Format::kStep) {
    Format::template add<L, R, U>(w, x, element, column, sums);
  }
  unroll<U>([&](auto u) HSAI_INLINE_LAMBDA {
    if (w.scale_type != ScaleType::kNone) {
      const Float scale = load_scale<L>(w, scales + column + u.value * L);
      unroll<R>([&](auto r) HSAI_INLINE_LAMBDA { sums.at[r.value][u.value] *= scale; });
    }
    unroll<R>([&](auto r) HSAI_INLINE_LAMBDA {
      float* to = out + r.value * length + u.value * L;
      store(to, load<Float>(to) + sums.at[r.value][u.value]);
    });
  });
}

template <class Format, int L, int R>
void multiply_rows(const Weight& w, const float* x, std::int64_t begin, std::int64_t length, float* out) {
  // Independent sums hide the latency of the multiply-adds; many rows have enough of them already.
  constexpr int U = L == 1 || R >= 4 ? 1 : 4 / R;
  for (std::int64_t i = 0; i < R * length; ++i) out[i] = 0;
  for (std::int64_t group = 0; group < w.stored; group += w.group) {
    const std::int64_t end = group + w.group;
    const std::int64_t scales = group / w.group * w.columns;
    for (std::int64_t first = group; first < end; first += Format::kBlock) {
      const std::int64_t last = first + Format::kBlock < end ? first + Format::kBlock : end;
      std::int64_t i = 0;
      if constexpr (U > 1) {
        for (; i + U * L <= length; i += U * L) {
          add_block<Format, L, R, U>(w, x, first, last, scales, begin + i, out + i, length);
        }
      }
      for (; i < length; i += L) {
        add_block<Format, L, R, 1>(w, x, first, last, scales, begin + i, out + i, length);
      }
    }
  }
}

template <class Format, int L>
void multiply_lanes(const Weight& w, const float* x, int rows, std::int64_t begin, std::int64_t length, float* out) {
  if (rows == 1) return multiply_rows<Format, L, 1>(w, x, begin, length, out);
  if (rows == 2) return multiply_rows<Format, L, 2>(w, x, begin, length, out);
  if (rows == 4) return multiply_rows<Format, L, 4>(w, x, begin, length, out);
  return multiply_rows<Format, L, 8>(w, x, begin, length, out);
}

template <class Format>
void multiply(const Weight& w, const float* x, int rows, std::int64_t begin, std::int64_t length, float* out) {
  if constexpr (kSingly) {
    if (length % kLanes != 0) return multiply_lanes<Format, 1>(w, x, rows, begin, length, out);
  }
  multiply_lanes<Format, kLanes>(w, x, rows, begin, length, out);
}

}  // namespace
}  // namespace hsai

#endif  // HSAI_KERNELS_FLOAT_PRODUCTS_H_
