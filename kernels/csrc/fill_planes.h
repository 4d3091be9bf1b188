// Splits activations into planes (planes.h). Included by products.cc only, to be vectorized for each instruction set.
#ifndef HSAI_KERNELS_FILL_PLANES_H_
#define HSAI_KERNELS_FILL_PLANES_H_

#include <cmath>
#include <limits>

#include "lanes.h"
#include "planes.h"

namespace hsai {
namespace {

// The bits of the largest magnitude: comparing them orders infinities and NaNs above all numbers.
std::uint32_t find_largest(const float* x, std::int64_t count) {
  std::uint32_t largest = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    std::uint32_t bits;
    __builtin_memcpy(&bits, x + i, sizeof(bits));
    bits &= 0x7fffffffu;
    largest = bits > largest ? bits : largest;
  }
  return largest;
}

// The scale with which numbers up to `largest` (bits of a float) fit P digits; NaN if it is no number, and with it
// everything that is multiplied by the block.
//
// Exact planes have a power of two, which loses nothing of the numbers near the largest. Dynamic int8 has largest / 127.
float choose_scale(std::uint32_t largest, int planes, bool int8) {
  if (largest >= 0x7f800000u) return std::numeric_limits<float>::quiet_NaN();
  float value;
  __builtin_memcpy(&value, &largest, sizeof(value));
  if (int8) return value / 127.0f;
  int exponent;
  const float fraction = std::frexp(value, &exponent);  // value = fraction * 2^exponent, fraction in [0.5, 1)
  // 0x7f7f7f / 2^23 is 0.996: what is above would carry into a fourth digit. Below 2^-126 the inverse overflows.
  exponent += (fraction > 0.99f ? 1 : 0) - (8 * planes - 1);
  return std::ldexp(1.0f, exponent < -126 ? -126 : exponent);
}

// x / scale to the nearest integer. Of int8 in such a way that it vectorizes everywhere and ties go to even: adding
// 1.5 * 2^23 leaves no fraction.
template <bool kInt8>
HSAI_INLINE std::int32_t round_ratio(float x, float scale) {
  const float exact = x / scale;
  if constexpr (kInt8) return static_cast<std::int32_t>((exact + 12582912.0f) - 12582912.0f);
  return static_cast<std::int32_t>(exact + (exact < 0 ? -0.5f : 0.5f));
}

// q = x / scale, as digits; returns their sums in sum[p].
template <int P, bool kBiased>
void split_block(const float* __restrict x, std::int64_t count, float scale, std::uint8_t* __restrict to,
                 std::int64_t plane, std::int32_t* __restrict sum) {
  constexpr std::int32_t bias = kBiased ? 1 << (8 * P - 1) : 0;
  std::int32_t sums[P] = {};
  for (std::int64_t i = 0; i < count; ++i) {
    std::int32_t q = round_ratio<P == 1>(x[i], scale) + bias;
    for (int p = 0; p < P; ++p) {
      const std::int32_t digit = kBiased ? (q & 255) : static_cast<std::int8_t>(q & 255);
      to[p * plane + i] = static_cast<std::uint8_t>(digit);
      sums[p] += digit;
      q = (q - digit) >> 8;
    }
  }
  for (int p = 0; p < P; ++p) sum[p] = sums[p];
}

// The same in planes of two digits each, without sums. A single digit is the upper one.
template <int P>
void split_wide(const Planes& planes, const float* __restrict x, float scale, std::uint8_t* __restrict to) {
  std::uint8_t* __restrict const upper = to + planes.rows * planes.stride;
  for (std::int64_t i = 0; i < planes.span; ++i) {
    const std::int32_t q = round_ratio<P == 1>(x[i], scale) * (P == 1 ? 256 : 1);
    const auto low = static_cast<std::int16_t>(q);
    __builtin_memcpy(to + 2 * i, &low, 2);
    if constexpr (P == 3) {
      const auto high = static_cast<std::int16_t>((q - low) >> 16);
      __builtin_memcpy(upper + 2 * i, &high, 2);
    }
  }
}

template <int P>
void split_block(const Planes& planes, const float* x, float scale, std::uint8_t* to, std::int32_t* sum) {
  const std::int64_t plane = planes.rows * planes.stride;
  if (planes.biased) return split_block<P, true>(x, planes.span, scale, to, plane, sum);
  return split_block<P, false>(x, planes.span, scale, to, plane, sum);
}

void fill_planes(const Planes& planes, int row, const float* x) {
  float scale = 0;
  for (std::int64_t block = 0; block < planes.blocks; ++block, x += planes.span) {
    if (block % planes.shared == 0) {
      scale = choose_scale(find_largest(x, planes.span * planes.shared), planes.planes, planes.int8);
    }
    const int digits = planes.int8 ? 1 : planes.planes;
    planes.scale[row * planes.blocks + block] = scale * static_cast<float>(1 << (8 * (digits - 1)));
    std::uint8_t* to = planes.digits + row * planes.stride + block * planes.padded * (planes.wide ? 2 : 1);
    std::int32_t sum[kMostPlanes] = {};
    planes.total[row * planes.blocks + block] = scale > 0 ? 0 : scale;
    // All zeros, or no numbers: the digits stay zeros, and whatever they are, their product with the scale is right.
    if (!(scale > 0)) continue;
    if (planes.wide) {
      if (digits == 1) {
        split_wide<1>(planes, x, scale, to);
      } else if (digits == 2) {
        split_wide<2>(planes, x, scale, to);
      } else {
        split_wide<3>(planes, x, scale, to);
      }
    } else if (planes.planes == 1) {
      split_block<1>(planes, x, scale, to, sum);
    } else if (planes.planes == 2) {
      split_block<2>(planes, x, scale, to, sum);
    } else {
      split_block<3>(planes, x, scale, to, sum);
    }
    for (int p = 0; p < planes.planes; ++p) planes.sum[(p * planes.rows + row) * planes.blocks + block] = sum[p];
    // int8 weights, the only ones of wide digits, have no minimum. The span of a sparse weight may be of thousands.
    std::int64_t total = planes.biased ? -(planes.span << (8 * planes.planes - 1)) : 0;
    for (int p = 0; p < planes.planes; ++p) total += static_cast<std::int64_t>(sum[p]) * (1 << (8 * p));
    planes.total[row * planes.blocks + block] = static_cast<float>(total) * scale;
  }
}

}  // namespace
}  // namespace hsai

#endif  // HSAI_KERNELS_FILL_PLANES_H_
