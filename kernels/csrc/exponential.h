// exp and tanh of vectors. Included by products.cc only.
//
// Coefficients: Moshier's Cephes library (expf, tanhf), minimax polynomials for single precision.
#ifndef HSAI_KERNELS_EXPONENTIAL_H_
#define HSAI_KERNELS_EXPONENTIAL_H_

#include "lanes.h"

namespace hsai {
namespace {

// e**x for x <= 0, to a relative error of 2**-22; 0 below the smallest normal result, NaN for NaN.
HSAI_INLINE Lanes<kLanes>::Float exponentiate(const Lanes<kLanes>::Float& x) {
  using Float = Lanes<kLanes>::Float;
  using Int = Lanes<kLanes>::Int;
  const Float zero = {};
  const auto vanishes = x < zero - 87.33654f;  // also -infinity, whose polynomial would be NaN
  const Float inside = vanishes ? zero : x;
  // Adding 1.5 * 2**23 leaves the nearest integer in the low bits of the mantissa.
  const Float shifted = inside * 1.44269504088896341f + 12582912.0f;
  const Float n = shifted - 12582912.0f;
  const Float r = (inside - n * 0.693359375f) + n * 2.12194440e-4f;
  Float p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  // 0x4b400000 are the bits of 1.5 * 2**23; 127 is the bias of an exponent.
  const Float power = (Float)((((Int)shifted - 0x4b400000) + 127) << 23);
  return vanishes ? zero : p * power;
}

// tanh(x), to a relative error of 2**-22; NaN for NaN.
HSAI_INLINE Lanes<kLanes>::Float tangent(const Lanes<kLanes>::Float& x) {
  using Float = Lanes<kLanes>::Float;
  const Float zero = {};
  const Float size = x < zero ? -x : x;
  const Float square = x * x;
  Float p = square * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const Float near = p * square * x + x;
  const Float t = exponentiate(size * -2.0f);
  const Float far = 1.0f - 2.0f * t / (1.0f + t);
  return size < zero + 0.625f ? near : (x < zero ? -far : far);
}

}  // namespace
}  // namespace hsai

#endif  // HSAI_KERNELS_EXPONENTIAL_H_
